"""The client beside upstream's pattern (100 threads, one requests.post per call), re-implemented plainly, in one run.

Both ask the same server, a process of its own. Prints calls per second, CPU per call, the time that random faults and
overload cost, replay speed and memory, as ratios. No threshold: machines differ.
"""
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from asker import Verdict, questions
from faults import Served

from creawrite.budget import Limits
from creawrite.engines import Endpoint, remote_client
from creawrite.ledger import Ledger, key_of
from creawrite.llm import LLM, gather, stream
from creawrite.messages import chat, parse_reply

os.environ["OPENAI_API_KEY"] = "none"


def measured(work):
    "Seconds on the clock, and of this process's CPU."
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def threads(url, n):
    "Upstream's pattern: every call opens a connection, and a pool of 100 threads waits for it."
    def ask(number):
        body = {"model": "m", "messages": chat("判断。", {"id": number}, Verdict), "temperature": 0.0, "max_tokens": 64}
        headers = {"Authorization": "Bearer none"}
        reply = requests.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
        return parse_reply(reply.json()["choices"][0]["message"]["content"], Verdict)
    with ThreadPoolExecutor(100) as pool: assert all(pool.map(ask, range(n)))


def ours(folder, url, n, mode="auto", in_flight=64):
    "The same questions through the client, into a ledger."
    endpoint, limits = remote_client(Endpoint(base_url=url, model="m")), Limits(in_flight=in_flight)
    llm = LLM(Ledger(folder / "ledger.sqlite"), "m @ bench", endpoint, "m", mode, limits)
    assert all(asyncio.run(gather(questions(llm, n))))


def faults(folder):
    "How much longer it takes when a share of all tries fails at random, and when the server is asked too much."
    n, latency, in_flight = 640, 1.0, 64
    ideal = n * latency / in_flight
    print(f"{n} questions, {latency:g} s latency, {in_flight} in flight; the ideal is {ideal:.1f} s")
    mixed = ["500", "503", "reset", "truncated"]
    servers = {f"{rate:4.0%} of tries fail": dict(rate=rate, kinds=mixed) for rate in (0, 0.01, 0.05, 0.3)}
    servers |= {"answers 48 at once, else 429": dict(most=48), "429 for 1 % of tries": dict(rate=0.01, kinds=["429"])}
    for number, (label, options) in enumerate(servers.items()):
        (folder / f"faults-{number}").mkdir()
        with Served(latency=latency, spread=False, **options) as server:
            clock, _ = measured(lambda: ours(folder / f"faults-{number}", server.url, n))
            tries = server.told()["tries"]
        print(f"  {label:28s} {clock:6.1f} s  {clock / ideal:5.2f} x the ideal, {tries / n:.2f} tries per question")


def record(folder, n):
    "n answers in a ledger, without a server."
    llm = LLM(Ledger(folder / "ledger.sqlite"), "m @ bench", None, "m")
    for number in range(n):
        request = llm.request(chat("判断。", {"id": number}, Verdict), Verdict, 0, 0.0, 64, 0)
        text = json.dumps(request, ensure_ascii=False, sort_keys=True)
        llm.ledger.put(key=key_of(llm.label, text), engine=llm.label, role="judge", request=text, status="stop",
                       reply='{"judge": 1}', tokens_in=100, tokens_out=10, seconds=0.1)


async def replay(llm, n):
    "n answers from a ledger of 1,000, kept by nobody."
    ended = 0
    again = (answer for _ in range(n // 1000) for answer in questions(llm, 1000))
    async for _, answer in stream(again): ended += bool(answer)
    assert ended == n


def memory() -> float: return psutil.Process().memory_info().rss / 2**20


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for part in ("slow", "fast", "replay"): (folder / part).mkdir()
    with Served(latency=0.1, spread=False) as server:
        slow, _ = measured(lambda: ours(folder / "slow", server.url, 2000))
    ideal = 2000 * 0.1 / 64
    print(f"2,000 requests, 100 ms latency, 64 in flight: {slow:.2f} s, {slow / ideal:.2f} x the ideal {ideal:.2f} s")

    faults(folder)

    with Served() as server:
        theirs = measured(lambda: threads(server.url, 2000))
        mine = measured(lambda: ours(folder / "fast", server.url, 2000))
    for label, (clock, cpu) in {"upstream's pattern, 100 threads": theirs, "this client, 64 in flight": mine}.items():
        print(f"zero-latency server, {label:31s} {2000 / clock:8,.0f} calls/s  {cpu / 2:6.2f} ms CPU per call")
    print(f"  this client / upstream's pattern: {theirs[0] / mine[0]:.2f} x calls per second, "
          f"{mine[1] / theirs[1]:.2f} x CPU per call")

    record(folder / "replay", 20_000)
    again, _ = measured(lambda: ours(folder / "replay", "http://127.0.0.1:9/v1", 20_000, "replay"))
    print(f"replay of 20,000 recorded answers: {20_000 / again:,.0f} per second, {20_000 / again / 5000:.2f} x 5,000")

    llm = LLM(Ledger(folder / "replay" / "ledger.sqlite"), "m @ bench", None, "m", "replay")
    asyncio.run(replay(llm, 1000))
    before = memory()
    asyncio.run(replay(llm, 100_000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory: {before:.0f} MB resident after 1,000 requests, {memory() - before:+.1f} MB after 100,000 more; "
          f"peak {peak:.0f} MB")
