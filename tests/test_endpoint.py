"The client against endpoints that speak the protocol by half: right answers, or one true sentence and nothing lost."
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from asker import Verdict, questions
from conftest import ENDPOINT, REPOSITORY
from endpoint import Served

from creawrite.core import KitError
from creawrite.judge import Graded
from creawrite.llm import behind, expected, gather, open_llm
from creawrite.messages import chat

KEY = "sk-not-a-real-key-0123456789"
N = 12
SHARED = REPOSITORY.parent / "shared/cases/endpoint.py"


@pytest.fixture
def name(tmp_path, monkeypatch):
    "A throwaway kit; call it with an address to name an endpoint, and with other limits."
    (tmp_path / "nbs").mkdir()
    for variable in ENDPOINT: monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("CREAWRITE_MODEL", "m")

    def address(url, **limits):
        limits = {"retries": 1, "seconds_per_try": 5} | limits
        lines = [f"{limit} = {value}" for limit, value in limits.items()]
        (tmp_path / "settings.ini").write_text("\n".join(["[smoke]", "[limits]", *lines]))
        monkeypatch.setenv("OPENAI_BASE_URL", url)
    return address


@pytest.fixture(scope="module")
def served():
    with Served() as server: yield server


def ask(n=N, run="t", **options):
    "The first questions, as one run asks them."
    llm = open_llm(run, **options)
    return asyncio.run(gather((llm.ask("judge", chat("判断。", {"id": number}, Verdict), Verdict)
                               for number in range(n)), llm=llm)), llm


def right(answers) -> bool:
    return [getattr(answer, "judge", None) for answer in answers] == [number % 7 for number in range(len(answers))]


def goes_on(served):
    "The same command, once the endpoint is well: everything is answered, also what was missing."
    served.becomes("ok")
    answers, llm = ask()
    assert right(answers) and not llm.missing
    assert llm.ledger.query("SELECT count(missing) FROM calls") == [(0,)]
    served.becomes("502")
    assert right(ask()[0]) and right(ask(mode="replay")[0]) and served.told()["tries"] == 0


# ---- what holds the answer

@pytest.mark.parametrize("mode", [
    "ok", "stream", "blank lines", "comments", "mark", "gzip", "no usage", "null usage", "half a usage", "parts",
    "thinking part", "think", "think closes", "reasoned", "fence", "capital STOP", "end_turn", "null end"])
def test_odd_replies_that_hold_the_answer(name, served, mode):
    served.becomes(mode)
    name(served.url)
    answers, llm = ask()
    assert right(answers) and not llm.missing and served.told()["tries"] == N
    assert llm.ledger.query("SELECT count(*) FROM calls WHERE tokens_in > 0 AND form IS NULL") == [(N,)]


def test_every_other_connection_breaks(name, served):
    served.becomes("every other")
    name(served.url, retries=8)
    assert right(ask()[0])


# ---- what an endpoint does not take

@pytest.mark.parametrize("mode, without, form", [
    ("no max_tokens", {"max_tokens"}, {"max_tokens": "max_completion_tokens"}),
    ("no length at all", {"max_tokens", "max_completion_tokens"}, {"max_tokens": None}),
    ("no seed", {"seed"}, {"seed": None}), ("501", {"seed"}, {"seed": None}),
    ("own temperature", {"temperature"}, {"temperature": None}),
    ("no schema", {"response_format"}, {"response_format": None}),
    ("json object", set(), {"response_format": "json_object"}), ("no system", set(), {"system": "user"}),
    ("alternating", set(), {"system": "user"}), ("no system in a body", set(), {"system": "user"}),
    ("extra fields", {"seed", "response_format"}, {"seed": None, "response_format": None})])
def test_what_is_refused_by_name_is_left_out_from_then_on(name, served, capsys, mode, without, form):
    served.becomes(mode)
    name(served.url)
    answers, llm = ask()
    assert right(answers) and not without & set(served.told()["fields"])
    assert capsys.readouterr().out.count("from now on") in (len(form), len(form) + 1), "told once"
    forms = {json.dumps(json.loads(row)["form"], sort_keys=True) for row, in llm.ledger.query("SELECT form FROM calls")}
    known = {part: way for part, way in form.items() if part != "response_format" or mode != "extra fields"}
    assert all(json.loads(row).items() >= known.items() for row in forms), "the ledger tells the form"
    before = served.told()["tries"]
    assert right(ask(2 * N)[0]) and served.told()["tries"] == before + N, "remembered by the next stage of the run"
    assert right(ask(2 * N, mode="replay")[0])


def test_token_probabilities_that_are_refused_are_refused_once(name, served):
    served.becomes("no logprobs")
    name(served.url, in_flight=1)
    llm = behind(Graded, open_llm("t"))
    jobs = [llm.ask("judge", chat("判断。", {"id": number}, Verdict), Verdict) for number in range(N)]

    async def all_of_them(): return [await job for job in jobs]
    assert right(asyncio.run(all_of_them())) and served.told()["tries"] == N + 1


def test_a_refusal_that_names_no_field_is_told_in_the_words_of_the_server(name, served):
    served.becomes("bad request")
    name(served.url)
    with pytest.raises(KitError, match="refused a request with 400 .your account may not use this region"): ask()
    goes_on(served)


# ---- what is no completion

@pytest.mark.parametrize("mode, words", [
    ("page", "Welcome to the gateway"), ("error in a body", "answered 502 .* .Provider is asleep"),
    ("error without code", "Provider is asleep"), ("base_resp", "Provider is asleep"), ("no choices", '"choices": '),
    ("null choices", '"choices": null'), ("cut JSON", '"mess'), ("cut stream", "delta"), ("empty", "an empty reply"),
    ("list", "1, 2"), ("502", "502 Bad Gateway"), ("network_error", "ended with network_error")])
def test_a_body_without_a_completion_stops_the_run_and_nothing_is_final(name, served, mode, words):
    served.becomes(mode)
    name(served.url)
    with pytest.raises(KitError, match=words) as caught: ask()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and served.told()["tries"] > N / 2
    goes_on(served)


# ---- what is no answer

@pytest.mark.parametrize("mode, words", [
    ("only reasoned", "thoughts alone .*raise max_tokens = 1024"), ("reasoned to the end", "thoughts alone"),
    ("thinks on", "fits no schema"), ("cut", "length: raise max_tokens = 1024"), ("MAX_TOKENS", "raise max_tokens"),
    ("refusal", "refusal.*抱歉，我无法协助"), ("filtered", "content_filter"), ("chatter", "no schema.*抱歉，我不清楚")])
def test_a_stage_fails_in_which_too_many_answers_are_missing(name, served, mode, words):
    served.becomes(mode)
    name(served.url)
    with pytest.raises(KitError, match=f"of 1. questions unanswered.*missing_share = 0.2.*1. times judge: .*{words}"):
        ask()
    served.becomes(mode)
    with pytest.raises(KitError): ask(500, run="many")
    assert served.told()["tries"] < 3 * 256 + 100, "a hopeless run ends early"
    goes_on(served)


def test_the_share_is_a_setting(name, served):
    served.becomes("cut")
    name(served.url, missing_share=1)
    answers, llm = ask()
    assert not any(answers) and len(llm.missing) == N
    goes_on(served)


def test_a_longer_answer_is_another_try_at_the_same_question(name, served):
    name(served.url, missing_share=1, max_tokens=77)
    served.becomes("cut")
    ask()
    assert served.told()["length"] == 77
    name(served.url, max_tokens=4096)
    goes_on(served)
    rows = open_llm("t", mode="replay").ledger.query("SELECT request, form FROM calls WHERE status = 'stop'")
    assert {json.loads(request)["max_tokens"] for request, _ in rows} == {1024}
    assert {form for _, form in rows} == {'{"max_tokens": 4096}'}


def test_answers_are_not_asked_again(name, served):
    served.becomes("ok")
    name(served.url)
    ask()
    name(served.url, max_tokens=4096)
    served.becomes("cut")
    assert right(ask()[0]) and served.told()["tries"] == 0


# ---- what cannot pass

@pytest.mark.parametrize("mode, words", [
    ("401", "rejected the key.*OPENAI_API_KEY"), ("402", "used up .Insufficient Balance.*OPENAI_API_KEY"),
    ("quota", "used up .You exceeded your current quota"), ("arrears", "used up .您的账户已欠费"),
    ("no model", "no such model .*CREAWRITE_MODEL"), ("bad model", "no such model .Model m not found"),
    ("long pause", "daily limit.*pause of 3,600 s")])
def test_what_cannot_pass_ends_the_run_at_once(name, served, mode, words):
    served.becomes(mode)
    name(served.url, retries=8)
    began = time.monotonic()
    with pytest.raises(KitError, match=words) as caught: ask()
    assert time.monotonic() - began < 3 and served.told()["tries"] <= N and KEY not in str(caught.value)
    goes_on(served)


@pytest.mark.parametrize("address, words", [
    ("127.0.0.1:8000/v1", "export OPENAI_BASE_URL=http://127.0.0.1:8000/v1"), ("https:///v1", "is no address"),
    ("http://no-such-host.invalid/v1", "no such host.*OPENAI_BASE_URL"),
    ("http://127.0.0.1:1/v1", "nothing listens there"), ("http://[::1/v1", "is no address")])
def test_an_address_that_leads_nowhere(name, address, words):
    name(address, retries=8)
    began = time.monotonic()
    with pytest.raises(KitError, match=words): ask()
    assert time.monotonic() - began < 5


def test_an_address_without_its_path(name, served):
    served.becomes("ok")
    name(served.host)
    with pytest.raises(KitError, match=f"export OPENAI_BASE_URL={served.url}"): ask()
    name(served.url + "/nowhere")
    with pytest.raises(KitError, match="is not there .404.*check OPENAI_BASE_URL"): ask()


def test_azure(name, served):
    served.becomes("ok")
    name(f"{served.host}/openai/deployments/m/chat/completions?api-version=2024-10-21")
    assert right(ask()[0])
    told = served.told()
    assert told["path"].endswith("/m/chat/completions?api-version=2024-10-21") and told["api-key"]


@pytest.mark.parametrize("key", ["sk-“quoted”", "ｓｋ-wide", "sk-a b", "sk-a\nb"])
def test_a_key_that_no_header_can_carry(name, served, monkeypatch, key):
    name(served.url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(KitError, match="OPENAI_API_KEY holds a letter that no header can carry") as caught: ask()
    assert key not in str(caught.value)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for(name, tmp_path):
    pem = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2",
                    "-keyout", pem[0], "-out", pem[1]], check=True, capture_output=True)
    with Served("ok", pem[1], pem[0]) as server:
        for address, words in [(server.url, "self-signed certificate.*SSL_CERT_FILE"),
                               (server.url.replace("https", "http"), "OPENAI_BASE_URL")]:
            name(address, retries=0)
            began = time.monotonic()
            with pytest.raises(KitError, match=words): ask()
            assert time.monotonic() - began < 5
    with Served() as server:
        name(server.url.replace("http", "https"), retries=8)
        with pytest.raises(KitError, match="does not speak TLS: write http://"): ask()


# ---- told by the clock

def test_progress_is_told_while_nothing_ends(name, served, capsys):
    served.becomes("silent")
    name(served.url, in_flight=4, seconds_per_try=0.9, retries=0)

    async def watched():
        llm = open_llm("t")
        with expected(llm, N, every=0.2):
            with pytest.raises(KitError, match="no whole reply within 1 s: raise seconds_per_try"):
                await asyncio.gather(*questions(llm, N))
    asyncio.run(watched())
    lines = [line for line in capsys.readouterr().out.splitlines() if "under way" in line]
    assert len(lines) >= 3 and "12 asked, 0 answered, 0 missing, 12 under way, 0.0 tokens/s" in lines[0]


# ---- the cases that others made

def shared_modes() -> list[str]:
    if not SHARED.is_file(): return []
    return sorted({part.split("'")[1] for part in SHARED.read_text(encoding="utf-8").split("m==")[1:]})


HELD = ["ok", "err200once", "think", "thinkclose", "fence", "prosefence", "parts", "nousage", "nullusage", "partusage",
        "gzip", "429", "o1", "noschema", "jsonobj", "seed", "422", "azure", "needv1", "sse", "keepalive", "drop"]


@pytest.mark.skipif(not SHARED.is_file(), reason="no shared cases here")
@pytest.mark.parametrize("mode", shared_modes() or ["none"])
def test_shared_cases(name, mode):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SHARED), mode, str(port)])
    address = f"http://127.0.0.1:{port}/v1"
    if mode == "azure": address = f"http://127.0.0.1:{port}/openai/deployments/m?api-version=1".replace("/m?", "/fake?")
    try:
        for _ in range(100):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
            except OSError: time.sleep(0.05)
            else: break
        name(address, retries=8 if mode in HELD else 1, seconds_per_try=1 if mode == "hang" else 5)
        if mode in HELD: assert all(ask()[0])
        else:
            with pytest.raises(KitError, match="goes on|asks for the rest again"): ask()
    finally:
        process.kill()
        process.wait()


