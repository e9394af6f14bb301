"""The audit at 1, 4 and 16 times the size: processor seconds, growth against n log n, and memory, each size in its own
process.

The texts are recombined clauses of our own sample, with a near-duplicate in every tenth row, so that duplicates grow
with the data as they do in the wild. The released data, where it has been fetched, comes last. No threshold: machines
differ.
"""
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT, BASE = Path(__file__).resolve().parents[1], 500
COLUMNS = "    rows    texts  search s  audit s     MB"


def grown(n, seed=0):
    "Splits of n pairs, n SFT rows and n labelled rows."
    from creawrite.data import read_sample
    from creawrite.splits import EvaluationRow, PreferencePair, SFTRow
    from creawrite.text import CLAUSE_ENDS
    rng, sample, pieces = random.Random(seed), read_sample(), []
    for row in sample:
        for text in (row.good, row.weak): pieces += [clause for clause in CLAUSE_ENDS.split(text) if len(clause) > 3]
    write = lambda low, high: "，".join(rng.sample(pieces, rng.randint(low, high))) + "。"
    query = lambda: rng.choice(sample).query + rng.choice(pieces)
    pairs = [PreferencePair(id=str(i), query=query(), chosen=write(4, 8), rejected=write(1, 3)) for i in range(n)]
    near = lambda i: pairs[i].chosen.replace("，", "！", 1) + "哦"
    text = lambda i, low, high: write(low, high) if i % 10 else near(i)
    sft = [SFTRow(id=str(i), query=query(), response=text(i, 4, 8)) for i in range(n)]
    clauses = {0: (1, 3), 1: (4, 8)}  # label -> fewest and most
    evaluation = [EvaluationRow(id=str(i), query=query(), response=text(i, *clauses[i % 2]), label=i % 2)
                  for i in range(n)]
    return {"sft": sft, "pairs_train": pairs[n // 5:], "pairs_test": pairs[:n // 5], "evaluation": evaluation}


def one(what):
    "Audit once in this process; prints rows, seconds and MB."
    from creawrite.audit import run_audit
    from creawrite.data import released_splits
    from creawrite.settings import defaults
    from creawrite.splits import responses, write_splits
    from creawrite.text import near_duplicates
    settings = defaults("audit")
    splits = released_splits(KIT / "data" / "released") if what == "released" else grown(int(what))
    texts = sorted({text for rows in splits.values() for row in rows for text in responses(row)})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nbs").mkdir()
        (Path(folder) / "settings.ini").touch()
        os.environ["CREAWRITE_ROOT"] = folder
        write_splits("t", splits)
        began = time.process_time()
        near_duplicates(texts)
        search = time.process_time() - began
        began = time.process_time()
        run_audit("t", **settings)
        seconds = time.process_time() - began
    mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = sum(map(len, splits.values()))
    print(json.dumps(dict(rows=rows, texts=len(texts), search=search, seconds=seconds, mb=mb)))


def measured(what):
    "What one process printed."
    done = subprocess.run([sys.executable, __file__, str(what)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def shown(now):
    "One line of the table."
    return f"{now['rows']:8,} {now['texts']:8,} {now['search']:9.2f} {now['seconds']:8.1f} {now['mb']:6.0f}"


if __name__ == "__main__":
    if len(sys.argv) > 1: sys.exit(one(sys.argv[1]))
    os.environ["CREAWRITE_ROOT"] = str(KIT)
    print(f"{COLUMNS}   growth of search and audit over growth of n log n (at most 1 is as good)")
    first, size = None, lambda row: row["texts"] * math.log(row["texts"])
    for factor in (1, 4, 16):
        now = measured(BASE * factor)
        first = first or now
        growth = [now[key] / first[key] / (size(now) / size(first)) for key in ("search", "seconds")]
        print(f"{shown(now)}   {growth[0]:.2f}, {growth[1]:.2f}")
    if (KIT / "data/released/sft").is_dir(): print(f"{shown(measured('released'))}   the released data")
