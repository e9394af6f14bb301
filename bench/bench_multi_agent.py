"""Path A's own cost: the index, the work per candidate that is not waiting for an endpoint, and memory at 40,000 candidates.

Prints seconds and milliseconds of processor time, which other work on the machine hardly touches, and ratios, each part in a process of its own.
No threshold: machines differ.
"""
import asyncio
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from creawrite.data import SFTRow, read_sample, sample_splits
from creawrite.llm import LLM, Ledger
from creawrite.multi_agent import Retriever, distinct, facts, groups, label, pair, progress, report, write

SAMPLE = sample_splits(read_sample())
LINES = [clause for row in SAMPLE["sft"] for clause in row.response.replace("。", "，").split("，") if len(clause) > 3]
REPLY = {"Candidate": '{"text": "%s"}', "Strengths": '{"points": [{"point": "语言优美", "reason": "晚霞"}]}', "Weaknesses": '{"points": [{"point": "套话空泛", "reason": "万事如意"}]}',
         "Verdict": '{"judge": %d, "reason": "缺点：套话空泛"}', "Reflection": '{"judge": %d, "reason": "维持原判"}'}


def greeting(rng): return "，".join(rng.sample(LINES, 5)) + "。"


class Instant(LLM):
    "An endpoint that answers at once: what is left is prompts, ledger, parsing and files."
    rng = random.Random(0)

    async def send(self, client, request, schema):
        text = REPLY[schema.__name__]
        text = text % (greeting(self.rng) if schema.__name__ == "Candidate" else self.rng.random() < 0.5) if "%" in text else text
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text, refusal=None), finish_reason="stop")], usage=None)


def index(n=25_000, asked=1_000):
    "Build once, ask many; then the same from the cache."
    rng = random.Random(0)
    rows = [SFTRow(id=str(i), query=rng.choice(SAMPLE["sft"]).query + str(i), response=greeting(rng)) for i in range(n)]
    queries = [rng.choice(SAMPLE["sft"]).query for _ in range(asked)]
    with tempfile.TemporaryDirectory() as folder:
        took = []
        for work in (lambda: Retriever(rows, cache=Path(folder)), lambda: Retriever(rows, cache=Path(folder))):
            start = time.process_time()
            retrieve = work()
            took.append(time.process_time() - start)
        start = time.process_time()
        retrieve.search(queries)
        print(f"index of {n:,} rows: {took[0]:.1f} s, from the cache {took[1]:.1f} s ({took[0] / took[1]:.1f} x); {asked:,} queries: {time.process_time() - start:.2f} s")


def stage(n_queries=10_000, n=4):
    "The whole stage against an endpoint that answers at once."
    queries = [f"{SAMPLE['sft'][i % len(SAMPLE['sft'])].query}{i}" for i in range(int(n_queries))]
    with tempfile.TemporaryDirectory() as folder:
        llm, path = Instant(Ledger(Path(folder) / "ledger.sqlite"), "instant", lambda: None, "instant"), Path(folder) / "records.jsonl"
        async def work(query): return await label(llm, query, await write(llm, query, SAMPLE["sft"][:3], n))
        start = time.process_time()
        asyncio.run(progress(path, "bench", work, lambda first: queries[first:]))
        pairs = [made for i, group in enumerate(groups(path)) if (made := pair(group.records, str(i), random.Random(i)))]
        kept, numbers = distinct(pairs), facts(groups(path))
        report(numbers, kept, len(queries))
        seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(numbers):,} candidates, {len(kept):,} pairs: {1000 * seconds / len(numbers):.2f} ms per candidate (prompts, ledger, parsing, files, pairs, report); peak {peak:.0f} MB resident")


if __name__ == "__main__":
    if sys.argv[1:]: globals()[sys.argv[1]](*sys.argv[2:])
    else:
        for part in (["index"], ["stage", "1000"], ["stage"]): subprocess.run([sys.executable, __file__, *part], check=True)
