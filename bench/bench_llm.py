"""Overhead of the client: the same 2,000 questions through the wire format, from the ledger, and as bare function calls.

Prints calls per second and ratios, side by side in one process. No threshold: machines differ.
"""
import asyncio
import random
import tempfile
import time
from pathlib import Path

from creawrite import offline
from creawrite.data import read_sample, sample_splits
from creawrite.llm import OFFLINE, LLM, Ledger, chat, embedded, gather
from creawrite.multi_agent import NEGATIVE, Weaknesses

rows = (sample_splits(read_sample())["evaluation"] * 20)[:2000]


def rate(label, work):
    "Run once, print calls per second."
    start = time.perf_counter()
    work()
    speed = len(rows) / (time.perf_counter() - start)
    print(f"{label:32s} {speed:10,.0f} calls/s")
    return speed


with tempfile.TemporaryDirectory() as folder:
    llm = LLM(Ledger(Path(folder) / "ledger.sqlite"), OFFLINE, embedded(), "offline-rulebook")
    ask = lambda: asyncio.run(gather([llm.ask("negative", chat(NEGATIVE, {"query": r.query, "response": r.response}, Weaknesses), Weaknesses, sample=i) for i, r in enumerate(rows)]))
    bare = rate("bare rulebook", lambda: [offline.say_weaknesses({"query": r.query, "response": r.response}, random.Random(0)) for r in rows])
    wire = rate("client, wire format, ledger", ask)
    again = rate("the same from the ledger", ask)
    print(f"ledger / wire: {again / wire:.1f} x; wire / bare rulebook: {wire / bare:.2f} x")
