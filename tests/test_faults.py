"The client against an endpoint that fails, stalls, answers nonsense and is killed beside it."
import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from asker import questions
from conftest import ENDPOINT, REPOSITORY
from faults import ASKED_AGAIN, HARMLESS, RETRIED, Served

from creawrite.budget import Limits
from creawrite.core import KitError
from creawrite.engines import Endpoint, remote_client
from creawrite.ledger import Ledger
from creawrite.llm import LLM, gather, open_llm, stream
from creawrite.messages import Missing, unwrap

KEY = "sk-not-a-real-key-0123456789"
LIMITS = "[smoke]\n[limits]\nin_flight = 64\nseconds_per_try = 10\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A throwaway kit with 64 calls in flight."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text(LIMITS)
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    for name in ENDPOINT: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


def client(folder, server, mode="auto", name="ledger", **limits):
    "A client of the fault server with limits of its own."
    limits = Limits(**{"seconds_per_try": 1, "in_flight": 64, **limits})
    endpoint = remote_client(Endpoint(base_url=server.url, model="m"))
    return LLM(Ledger(folder / f"{name}.sqlite"), "m @ faults", endpoint, "m", mode, limits)


def ask(llm, n, **options): return asyncio.run(gather(questions(llm, n), **options))


def ignore_interrupts(): signal.signal(signal.SIGINT, signal.SIG_IGN)


def start(folder, server, n, run="t", **how):
    "The program tests/asker.py on n questions."
    environment = os.environ | {"CREAWRITE_ROOT": str(folder), "PYTHONPATH": str(REPOSITORY), "CREAWRITE_MODEL": "m",
                                "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    command = [sys.executable, str(REPOSITORY / "tests/asker.py"), run, str(n)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **how)


def recorded(folder, run="t") -> int:
    "Calls in a ledger that another process writes."
    path = folder / "outputs" / run / "ledger.sqlite"
    if not path.is_file(): return 0
    try: return sqlite3.connect(path).execute("SELECT count(*) FROM calls").fetchone()[0]
    except sqlite3.OperationalError: return 0


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def test_thirty_per_cent_faults_and_two_kills_lose_and_double_nothing(folder):
    with Served(rate=0.3, latency=0.02, after="0.1") as server:
        for share in (150, 350):
            process = start(folder, server, 500)
            wait_until(lambda: recorded(folder) > share, process)
            process.kill()
            process.communicate()
            assert recorded(folder) < 500, "killed too late to prove anything"
        told = start(folder, server, 500).communicate()[0]
        served = server.told()
    assert " answered, " in told and "Traceback" not in told, told
    llm = open_llm("t", mode="replay")
    answers = ask(llm, 500)
    graded = [(number, answer.judge) for number, answer in enumerate(answers) if not isinstance(answer, Missing)]
    assert all(judge == number % 7 for number, judge in graded), "a fault became a grade"
    rows = [(json.loads(request), status) for request, status in llm.ledger.query("SELECT request, status FROM calls")]
    asked = {(unwrap(row["messages"][-1]["content"])["id"], row["attempt"]) for row, _ in rows}
    assert len(asked) == len(rows) and {number for number, _ in asked} == set(range(500))
    missing = llm.ledger.query("SELECT count(missing) FROM calls")[0][0]
    assert len(llm.missing) == missing == sum(not answer for answer in answers) < 25
    assert {"length", "refusal", "stop"} == {status for _, status in rows}, "a body that is none is no reply"
    assert served["whole"] <= len(rows) + 2 * 64, "only what was in flight at a kill is asked again"


def test_what_may_pass_is_tried_again(folder):
    with Served(rate=0.5, kinds=RETRIED, drip=0.5, after="0.1") as server:
        llm = client(folder, server, seconds_per_try=1)
        assert [answer.judge for answer in ask(llm, 60)] == [number % 7 for number in range(60)]
        told = server.told()
    retries = [told[kind] for kind in RETRIED]
    assert min(retries) > 0 and llm.ledger.costs().retries.sum() == sum(retries)


@pytest.mark.parametrize("kind", ASKED_AGAIN)
def test_nonsense_is_asked_again_and_then_missing_with_its_reason(folder, kind):
    with Served(always={3: kind}) as server:
        llm = client(folder, server)
        answers = ask(llm, 6)
    assert [number for number, answer in enumerate(answers) if not answer] == [3] and len(llm.missing) == 1
    nonsense = "SELECT count(*), count(missing) FROM calls WHERE status != 'stop' OR reply LIKE '%也许%'"
    assert llm.ledger.query(nonsense) == [(3, 1)]
    reasons = {"broken schema": "fits no schema", "cut off": "ended with length", "refusal": "refusal"}
    assert reasons[kind] in answers[3].reason == llm.missing[0]
    billed = llm.ledger.query("SELECT tokens_in FROM calls")
    assert all(tokens > 0 for tokens, in billed), "billed although it could not be read"


@pytest.mark.parametrize("kind", ["no JSON", "empty choices", "no choices"])
def test_a_reply_that_is_none_is_a_fault_of_the_transport(folder, kind):
    with Served(always={3: kind}, latency=0.05) as server:
        answers = ask(client(folder, server, retries=1, in_flight=4), 40)
        [absent] = [answer for answer in answers if not answer]
        assert "failed without a reply" in absent.reason and ("busy" in absent.reason or "usage" in absent.reason)
        tries = server.told()["tries"]
        assert [number for number, answer in enumerate(ask(client(folder, server, retries=0), 40)) if not answer] == [3]
        assert server.told()["tries"] - tries == 1, "only what is missing is asked again"
    with Served() as server: assert all(ask(client(folder, server), 40)), "and it may be answered then"


@pytest.mark.parametrize("kind", HARMLESS)
def test_odd_replies_that_hold_the_answer(folder, kind):
    with Served(rate=1, kinds=[kind]) as server:
        assert [answer.judge for answer in ask(client(folder, server), 8)] == [number % 7 for number in range(8)]


def test_a_question_that_breaks_the_endpoint_is_missing_and_the_others_are_not(folder):
    with Served(always={2: "400", 4: "500"}, latency=0.05) as server:
        llm = client(folder, server, retries=1, in_flight=4)
        answers = ask(llm, 40)
    assert [(number, answer.reason) for number, answer in enumerate(answers) if not answer] == [
        (2, "judge: reply ended with refused 400 (no, Bearer ***)"),
        (4, "judge: reply ended with failed 500 (no, Bearer ***)")]


@pytest.mark.parametrize("kind, says", [
    ("500", "answered 500 after retries"), ("reset", "does not answer"), ("429", "answered 429 after retries"),
    ("404", "is not there"), ("403", "rejected the key"), ("400", "refused a request")])
def test_an_endpoint_that_answers_nothing_stops_the_run_and_grades_nothing(folder, kind, says):
    with Served(rate=1, kinds=[kind]) as server:
        llm = client(folder, server, retries=1)
        with pytest.raises(KitError, match=says): ask(llm, 3)
    assert llm.ledger.query("SELECT count(*) FROM calls") == [(0,)] and not llm.missing


def test_lasting_throttling_stops_although_others_are_answered(folder):
    with Served(always={5: "429"}) as server:
        llm = client(folder, server, retries=1)
        with pytest.raises(KitError, match="429"): ask(llm, 60)
        assert not llm.missing
    with Served() as server:
        assert all(ask(client(folder, server), 60)), "the same command goes on"


def test_a_question_has_a_deadline(folder):
    with Served(always={1: "503"}) as server:
        llm = client(folder, server, retries=50, seconds_per_question=2)
        answers = ask(llm, 3)
    assert answers[0] and answers[2] and answers[1].reason == "judge: reply ended with failed 503 (no, Bearer ***)"


def test_random_faults_cost_their_own_retry_only(folder):
    mixed = ["500", "503", "reset", "truncated"]
    with Served(rate=0.05, kinds=mixed, latency=0.3, spread=False) as server:
        began = time.monotonic()
        assert all(ask(client(folder, server, in_flight=16), 160))
        assert time.monotonic() - began < 2 * 160 * 0.3 / 16, "twice the ideal, on a busy machine"
        assert 3 <= sum(server.told()[kind] for kind in mixed if kind in server.told())


def test_concurrency_falls_to_what_the_endpoint_bears_and_climbs_again(folder):
    with Served(most=8, latency=0.02) as server:
        llm = client(folder, server)
        seen = []

        async def watched():
            async for _ in stream(questions(llm, 400)): seen.append((await llm.here())[1].gate.limit)
        asyncio.run(watched())
        told = server.told()
    speed = f"{min(seen)} at once, {told['throttled']} throttled"
    assert min(seen) < 40 and 0 < told["throttled"] < 400, f"it must not go on at full speed: {speed}"
    assert any(later > earlier for earlier, later in zip(seen, seen[1:])), "it never climbed"


def test_a_server_that_asks_for_a_pause_gets_it_from_every_call(folder):
    with Served(always={0: "429 after"}, after="1") as server:
        llm = client(folder, server, retries=0, in_flight=1)

        async def both():
            results = await asyncio.gather(*questions(llm, 2), return_exceptions=True)
            return results, (await llm.here())[1].gate.opens - time.monotonic()
        (throttled, _), left = asyncio.run(both())
    assert isinstance(throttled, KitError) and left < 0, "the second question was sent only after the pause"


def test_minute_limits(folder):
    with Served() as server:
        began = time.monotonic()
        ask(client(folder, server, requests_per_minute=600), 30)
        assert time.monotonic() - began >= 1.8, "600 a minute are 10 a second, the first 10 at once"
        began = time.monotonic()
        ask(client(folder, server, name="tokens", tokens_per_minute=12_000), 20)
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("limit, most", [("budget_requests", 40), ("budget_tokens", 40 * 110), ("budget_money", 0.05)])
def test_a_budget_is_never_passed_and_the_run_goes_on_under_a_larger_one(folder, limit, most):
    (folder / "settings.ini").write_text(LIMITS + "[prices]\nm = 10, 20\n")
    with Served(rate=0.3, kinds=ASKED_AGAIN, latency=0.01) as server:
        llm = client(folder, server, **{limit: most})
        with pytest.raises(KitError, match=f"raise {limit} in settings.ini"): ask(llm, 200)
        bill = llm.budget.bill(*llm.ledger.spent(llm.label))
        assert 0.5 * most < bill[limit.removeprefix("budget_")] <= most
        assert server.told()["tries"] == bill["requests"], "nothing was sent that is not billed"
        done = ask(client(folder, server, **{limit: 100 * most}), 200)
        assert len(done) == 200 and server.told()["tries"] < 200 * 3


def test_a_budget_of_money_needs_a_price(folder):
    with Served() as server, pytest.raises(KitError, match=r"\[prices\] has no row"):
        client(folder, server, budget_money=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_records_what_is_in_flight(folder, number):
    with Served(latency=0.5, spread=False) as server:
        process = start(folder, server, 300)
        wait_until(lambda: recorded(folder) >= 64, process)
        wait_until(lambda: server.told()["under way"] == 64, process)
        process.send_signal(number)
        process.communicate()
        told = server.told()
        assert process.returncode != 0
        assert told["tries"] == told["whole"] == recorded(folder) < 300, "sent, answered and recorded are the same"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_silent_server_is_not_waited_for(folder, number):
    with Served(latency=0.2, spread=False, always=dict.fromkeys(range(40, 300), "silent")) as server:
        process = start(folder, server, 300)
        wait_until(lambda: server.told().get("silent", 0) >= 64, process)
        began = time.monotonic()
        process.send_signal(number)
        process.communicate()
        assert time.monotonic() - began < 6 and process.returncode != 0
        assert recorded(folder) == 40, "what was answered is recorded"


def test_sigterm_ends_what_a_script_started_in_the_background(folder):
    "A shell without job control has such a program ignore Ctrl-C."
    with Served(latency=0.2, spread=False) as server:
        process = start(folder, server, 300, preexec_fn=ignore_interrupts)
        wait_until(lambda: recorded(folder) >= 64, process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode != 0 and server.told()["whole"] < 300


def test_what_only_waits_for_a_place_is_not_late(folder):
    with Served(latency=0.3, spread=False, places=4) as server:
        assert all(ask(client(folder, server, in_flight=32, seconds_per_try=0.9), 64))
        assert server.told()["tries"] == 64, "no work was asked for twice"


def test_a_slow_engine_gets_more_time_instead_of_the_same_work_again(folder):
    with Served(latency=1.5, spread=False) as server:
        assert all(ask(client(folder, server, seconds_per_try=0.5), 8))
        assert server.told()["tries"] == 8 * 3, "0.5 s, 1 s, and then 2 s"


def test_two_processes_share_a_ledger(folder):
    with Served(latency=0.01) as server:
        both = [start(folder, server, 200) for _ in range(2)]
        ends = [process.communicate()[0].splitlines()[-1] for process in both]
        assert ends == ["200 answered, 0 missing"] * 2
        assert recorded(folder) == 200
        billed = open_llm("t", mode="replay").ledger.costs().calls.sum()
        assert billed == server.told()["whole"], "each call is billed, also the one that came second"


def test_memory_does_not_grow_with_the_number_of_questions(folder):
    made, most = 0, 0

    async def question():
        await asyncio.sleep(0)
        return 1

    def jobs():
        nonlocal made
        for _ in range(20_000):
            made += 1
            yield question()

    async def all_of_them():
        nonlocal most
        ended = 0
        async for _ in stream(jobs()):
            ended += 1
            most = max(most, made - ended)
        return ended
    assert asyncio.run(all_of_them()) == 20_000 and most < 300


def test_one_failure_calls_the_others_off(folder):
    ended = []

    async def job(number):
        await asyncio.sleep(0.01 if number == 5 else 5)
        if number == 5: raise KitError("broken")
        ended.append(number)
    with pytest.raises(KitError, match="broken"):
        asyncio.run(gather([job(number) for number in range(400)]))
    assert not ended
