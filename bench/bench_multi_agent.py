"""Path A's own cost: the index, the work per candidate beside waiting for an endpoint, memory at 40,000 candidates.

Prints seconds and milliseconds of processor time, which other work on the machine hardly touches, and ratios, each
part in a process of its own. No threshold: machines differ.
"""
import asyncio
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from creawrite.data import read_sample, sample_splits
from creawrite.ledger import Ledger
from creawrite.llm import LLM
from creawrite.multi_agent import (
    judge_candidates, pair_of, read_groups, record_facts, table_report, without_repeats, write_candidates, write_groups)
from creawrite.retrieval import Retriever
from creawrite.settings import defaults
from creawrite.splits import SFTRow

SAMPLE, DEFAULTS = sample_splits(read_sample()), defaults("multi_agent")
CLAUSES = [clause for row in SAMPLE["sft"] for clause in re.split("[。，]", row.response) if len(clause) > 3]
REPLY = {"Candidate": '{"text": "%s"}',
         "Strengths": '{"points": [{"point": "语言优美", "reason": "晚霞"}]}',
         "Weaknesses": '{"points": [{"point": "套话空泛", "reason": "万事如意"}]}',
         "Verdict": '{"judge": %d, "reason": "缺点：套话空泛"}',
         "Reflection": '{"judge": %d, "reason": "维持原判"}'}


def greeting(rng): return "，".join(rng.sample(CLAUSES, 5)) + "。"


class Instant(LLM):
    "An endpoint that answers at once: what is left is prompts, ledger, parsing and files."
    rng = random.Random(0)

    async def send(self, client, request, schema):
        text = REPLY[schema.__name__]
        if "%" in text: text %= greeting(self.rng) if schema.__name__ == "Candidate" else self.rng.random() < 0.5
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        return httpx2.Response(200, json=body, request=httpx2.Request("POST", "http://instant"))


class Nobody:
    "In the place of a client: `Instant` asks none."
    async def close(self): pass


def index(n=25_000, asked=1_000):
    "Build once, ask many; then the same from the cache."
    rng = random.Random(0)
    rows = [SFTRow(id=str(i), query=rng.choice(SAMPLE["sft"]).query + str(i), response=greeting(rng)) for i in range(n)]
    queries = [rng.choice(SAMPLE["sft"]).query for _ in range(asked)]
    settings = {name: DEFAULTS[name] for name in ("k_search", "k_final", "encoder")}
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            start = time.process_time()
            retrieve = Retriever(rows, set(), **settings, cache=Path(folder))
            seconds.append(time.process_time() - start)
        start = time.process_time()
        retrieve.search(queries)
        print(f"index of {n:,} rows: {seconds[0]:.1f} s, from the cache {seconds[1]:.1f} s "
              f"({seconds[0] / seconds[1]:.1f} x); {asked:,} queries: {time.process_time() - start:.2f} s")


async def label(llm, path, n_queries, n_candidates):
    "Candidates, debates and verdicts for made-up queries."
    examples = SAMPLE["sft"][:DEFAULTS["k_final"]]
    queries = [f"{SAMPLE['sft'][i % len(SAMPLE['sft'])].query}{i}" for i in range(n_queries)]

    async def work(query):
        texts = await write_candidates(llm, query, examples, n_candidates)
        return await judge_candidates(llm, query, texts, DEFAULTS["n_votes"])

    await write_groups(path, "bench", work, lambda first: queries[first:])


def stage(n_queries=10_000, n_candidates=4):
    "The whole stage against an endpoint that answers at once."
    with tempfile.TemporaryDirectory() as folder:
        llm = Instant(Ledger(Path(folder) / "ledger.sqlite"), "instant", lambda *_: Nobody(), "instant")
        path, start = Path(folder) / "records.jsonl", time.process_time()
        asyncio.run(label(llm, path, int(n_queries), n_candidates))
        sampled = [pair_of(group.records, str(i), random.Random(i), 0) for i, group in enumerate(read_groups(path))]
        pairs, facts = without_repeats([pair for pair in sampled if pair]), record_facts(read_groups(path))
        table_report(facts, pairs, int(n_queries))
        milliseconds = 1000 * (time.process_time() - start) / len(facts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(facts):,} candidates, {len(pairs):,} pairs: {milliseconds:.2f} ms per candidate "
              f"(prompts, ledger, parsing, files, pairs, report); peak {peak:.0f} MB resident")


if __name__ == "__main__":
    if sys.argv[1:]: globals()[sys.argv[1]](*sys.argv[2:])
    else:
        for part in (["index"], ["stage", "1000"], ["stage"]):
            subprocess.run([sys.executable, __file__, *part], check=True)
