"""The audit at 1, 4 and 16 times the size: processor seconds, growth against n log n, and memory, each size in a process of its own.

The texts are recombined clauses of our own sample, with a near-duplicate in every tenth row, so that duplicates grow with the data as they do in
the wild. The released data, where it has been fetched, comes last. No threshold: machines differ.
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


def grown(n, seed=0):
    "Splits of n pairs, n SFT rows and n labelled rows."
    from creawrite import data
    rng = random.Random(seed)
    rows = data.read_sample()
    pieces = [clause for row in rows for text in (row.good, row.weak) for clause in data.CLAUSE_ENDS.split(text) if len(clause) > 3]
    write = lambda low, high: "，".join(rng.sample(pieces, rng.randint(low, high))) + "。"
    near = lambda text, i: text if i % 10 else text.replace("，", "！", 1) + "哦"
    query = lambda: rng.choice(rows).query + rng.choice(pieces)
    pairs = [data.PreferencePair(id=str(i), query=query(), chosen=write(4, 8), rejected=write(1, 3)) for i in range(n)]
    sft = [data.SFTRow(id=str(i), query=query(), response=near(row.chosen, i) if i % 10 == 0 else write(4, 8)) for i, row in enumerate(pairs)]
    evaluation = [data.EvaluationRow(id=str(i), query=query(), response=near(row.chosen, i) if i % 10 == 0 else write(*((4, 8) if i % 2 else (1, 3))), label=i % 2) for i, row in enumerate(pairs)]
    return {"sft": sft, "pairs_train": pairs[n // 5:], "pairs_test": pairs[:n // 5], "evaluation": evaluation}


def one(what):
    "Audit once in this process; prints rows, seconds and MB."
    from creawrite import audit, data
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nbs").mkdir()
        (Path(folder) / "settings.ini").touch()
        splits = data.released_splits(KIT / "data" / "released") if what == "released" else grown(int(what))
        os.environ["CREAWRITE_ROOT"] = folder
        data.write_splits("t", splits)
        began = time.process_time()
        texts = sorted({text for rows in splits.values() for row in rows for text in data.responses(row)})
        audit.near_duplicates(texts)
        search = time.process_time() - began
        began = time.process_time()
        audit.run_audit("t")
        print(json.dumps(dict(rows=sum(map(len, splits.values())), texts=len(texts), search=search, seconds=time.process_time() - began,
                              mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))


if __name__ == "__main__":
    if len(sys.argv) > 1: sys.exit(one(sys.argv[1]))
    os.environ["CREAWRITE_ROOT"] = str(KIT)
    run = lambda what: json.loads(subprocess.run([sys.executable, __file__, str(what)], capture_output=True, text=True, check=True).stdout)
    print(f"{'rows':>8} {'texts':>8} {'search s':>9} {'audit s':>8} {'MB':>6}   growth of search and audit over growth of n log n (at most 1 is as good)")
    first = None
    for factor in (1, 4, 16):
        now = run(BASE * factor)
        first = first or now
        ideal = now["texts"] * math.log(now["texts"]) / (first["texts"] * math.log(first["texts"]))
        growth = [now[key] / first[key] / ideal for key in ("search", "seconds")]
        print(f"{now['rows']:8,} {now['texts']:8,} {now['search']:9.2f} {now['seconds']:8.1f} {now['mb']:6.0f}   {growth[0]:.2f}, {growth[1]:.2f}")
    if (KIT / "data/released/sft").is_dir():
        now = run("released")
        print(f"{now['rows']:8,} {now['texts']:8,} {now['search']:9.2f} {now['seconds']:8.1f} {now['mb']:6.0f}   the released data")
