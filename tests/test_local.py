"A model file as an engine: a real llama.cpp server on a tiny model, shared, killed everywhere, never left behind."
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import httpx2
import openai
import pytest
from conftest import ENDPOINT, REPOSITORY, write_notebook
from pydantic import BaseModel
from tiny_gguf import tiny_gguf

from creawrite import gguf, local, serve
from creawrite.core import KitError, UsageError
from creawrite.engines import endpoint, engine_name
from creawrite.gguf import shown_engine
from creawrite.llm import gather, open_llm
from creawrite.messages import chat

SETTINGS = "[smoke]\noffline = true\n\n[local]\nslots = 2\ncontext = 2048\nthreads = 1\n"
ASKS = """
import asyncio, os, time
from typing import Literal
from pydantic import BaseModel
from creawrite.core import stage_dir, write_json
from creawrite.llm import gather, open_llm
from creawrite.messages import chat
"""
ANSWERS = """
class Verdict(BaseModel): judge: Literal[0, 1]
folder = stage_dir(run, "STAGE")
(folder / "begun.txt").write_text(str(os.getpid()))
llm = open_llm(run, engine)

async def ask(number):
    answer = await llm.ask("judge", chat("判断", {"text": "生日快乐", "n": number}, Verdict), Verdict)
    await asyncio.sleep(wait)
    return answer

async def one_by_one(): return [await ask(number) for number in range(n)]
answers = await one_by_one()
write_json(folder / "answers.json", {"engine": llm.label, "answered": sum(map(bool, answers))})
"""


class Verdict(BaseModel):
    judge: Literal[0, 1]


def servers(room: Path) -> list[int]:
    "Server processes with this temporary folder, zombies not among them."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError: continue
        ours = f"TMPDIR={room}".encode() in environment.split(b"\0")
        if b"creawrite.local" in command and ours and state != "Z": found.append(int(process.name))
    return found


def gone(room: Path) -> bool:
    "Whether the last server ends, which may take a moment."
    deadline = time.monotonic() + 20
    while servers(room) and time.monotonic() < deadline: time.sleep(0.05)
    return not servers(room)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    "A tiny model file, which a test may not change."
    return tiny_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture
def room(tmp_path, monkeypatch):
    "A kit, and folders for locks and digests, of this test alone."
    for name in ENDPOINT: monkeypatch.delenv(name, raising=False)
    kit = tmp_path / "kit"
    for name in ("nbs", "outputs", "data"): (kit / name).mkdir(parents=True)
    (kit / "settings.ini").write_text(SETTINGS)
    for number, stage in enumerate(("first", "second"), 1):
        reads = "reads = []" if number == 1 else 'reads = ["first/answers.json"]'
        given = 'run: str = "lab"\nengine: str = "offline"\nn: int = 3\nwait: float = 0'
        write_notebook(kit / f"nbs/0{number}_{stage}.ipynb", given, reads, ASKS, ANSWERS.replace("STAGE", stage))
    (tmp_path / "tmp").mkdir()
    for name, value in dict(CREAWRITE_ROOT=kit, TMPDIR=tmp_path / "tmp", XDG_CACHE_HOME=tmp_path / "cache").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield tmp_path / "tmp"
    for holding in local.USED.values(): holding.close()
    local.USED.clear()
    assert gone(tmp_path / "tmp"), "a server is left behind"


def command(*arguments: str, program=("-m", "creawrite.cli"), **options) -> subprocess.Popen:
    "The kit's command line as a process."
    streams = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([sys.executable, *program, *arguments], cwd=REPOSITORY, **streams | options)


def run(weights, *options: str) -> subprocess.Popen:
    return command("run", "--run", "lab", "-p", f"engine=local:{weights}", *options)


def outputs(room: Path) -> Path: return room.parent / "kit/outputs/lab"


def until(true, process=None):
    "Wait for something that a process does."
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        assert not process or process.poll() is None, process.communicate()
        time.sleep(0.02)


def asked(engine, numbers=range(4), run="lab", **options):
    "Answers of an engine, and the engine."
    llm = open_llm(run, engine)
    jobs = [llm.ask("judge", chat("判断", {"n": n}, Verdict), Verdict, **options) for n in numbers]

    async def all_of_them(): return await gather(jobs)
    return asyncio.run(all_of_them()), llm


# ---- the file

def test_a_name_is_made_of_the_content_alone(room, weights, tmp_path):
    label = engine_name(f"local:{weights}")
    assert re.fullmatch(r"Tiny Test Instruct F32 \([0-9a-f]{8}\), llama.cpp of xllamacpp [\d.]+", label)
    moved = shutil.copy(weights, tmp_path / "other name.gguf")
    assert engine_name(f"local:{moved}") == label
    assert engine_name(f"local:{tiny_gguf(tmp_path / 'tiny.gguf', seed=1)}") != label
    assert engine_name(shown_engine(f"local:{weights}")) == label and str(weights.parent) not in repr(endpoint(
        f"local:{weights}"))


def test_a_digest_is_read_once_and_a_changed_file_anew(room, weights, tmp_path, monkeypatch):
    path, reads = Path(shutil.copy(weights, tmp_path / "a.gguf")), []
    whole = gguf.file_digest
    monkeypatch.setattr(gguf, "file_digest", lambda place: reads.append(place) or whole(place))
    first = [engine_name(f"local:{path}") for _ in range(3)]
    tiny_gguf(path, seed=2)
    assert len(reads) == 1 and engine_name(f"local:{path}") not in first and len(reads) == 2


@pytest.mark.parametrize("name, content, sentence", [
    ("none.gguf", None, "there is no file"), ("text.gguf", b"no model at all", "not GGUF"),
    ("pointer.gguf", b"version https://git-lfs", "a pointer"), ("cut.gguf", b"GGUF\x03\0\0\0\x01", "is cut off"),
    ("new.gguf", b"GGUF\x09\0\0\0", "version 9")])
def test_what_is_no_model_file_is_told_in_a_sentence(room, tmp_path, name, content, sentence):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(KitError, match=sentence) as told: endpoint(f"local:{tmp_path / name}")
    assert str(tmp_path) not in str(told.value) and "\n" not in str(told.value)


def test_without_llama_cpp_a_sentence_says_what_to_install(room, weights, monkeypatch):
    def missing(name): raise gguf.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(gguf.importlib.metadata, "version", missing)
    with pytest.raises(KitError, match=r"pip install -e '.\[local\]'"): endpoint(f"local:{weights}")


# ---- the server

def test_answers_are_typed_probabilities_come_and_the_ledger_tells_the_server(room, weights):
    answers, llm = asked(f"local:{weights}")
    assert all(isinstance(answer, Verdict) for answer in answers) and llm.limits.in_flight == 2
    rows = llm.ledger.query("SELECT DISTINCT engine, form FROM calls")
    assert rows == [(engine_name(f"local:{weights}"), '{"server": "2 slots of 2,048 tokens, prefix cache"}')]
    [server] = servers(room)
    client = openai.OpenAI(**told(room))
    one = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "祝福"}], max_tokens=1,
                                         logprobs=True, top_logprobs=20, logit_bias={"66": 100})  # an ASCII token
    assert len(one.choices[0].logprobs.content[0].top_logprobs) == 20
    stranger = openai.OpenAI(**told(room) | {"api_key": "no"}, max_retries=0)
    with pytest.raises(openai.AuthenticationError): stranger.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "祝福"}], max_tokens=1)
    key = told(room)["api_key"].encode()
    for facts in ("cmdline", "environ"): assert key not in Path(f"/proc/{server}/{facts}").read_bytes()
    [facts] = room.glob("creawrite-*/*.json")
    assert facts.stat().st_mode & 0o77 == 0, "nobody else reads the key"


def told(room) -> dict:
    "Address and key of the only server."
    [facts] = room.glob("creawrite-*/*.json")
    found = json.loads(facts.read_text())
    return {"base_url": found["url"], "api_key": found["key"]}


def test_answers_that_stand_in_the_ledger_need_no_server(room, weights, monkeypatch):
    first, _ = asked(f"local:{weights}")
    for holding in local.USED.values(): holding.close()
    local.USED.clear()
    assert gone(room)
    monkeypatch.setattr(local, "spawn", lambda wanted: pytest.fail("a server is started"))
    assert asked(f"local:{weights}")[0] == first


def test_a_server_that_is_killed_is_told_and_the_same_questions_go_on(room, weights):
    first, _ = asked(f"local:{weights}", range(2))
    llm = open_llm("lab", f"local:{weights}")

    async def killed():
        for number in range(2, 100):
            await llm.ask("judge", chat("判断", {"n": number}, Verdict), Verdict)
            if number == 4: os.kill(servers(room)[0], signal.SIGKILL)
    with pytest.raises(KitError, match="has ended in the middle of its work.*the same command goes on"):
        asyncio.run(killed())
    assert llm.ledger.query("SELECT count(*) FROM calls WHERE missing IS NOT NULL OR status LIKE 'failed%'") == [(0,)]
    answers, _ = asked(f"local:{weights}", range(6))
    assert all(answers) and answers[:2] == first


@pytest.mark.parametrize("tokenizer, words", [
    (False, "no tokenizer that llama.cpp knows"), (True, "cut off or damaged")])
def test_a_file_that_llama_cpp_refuses_is_told_once(room, tmp_path, capsys, tokenizer, words):
    path = tiny_gguf(tmp_path / "bad.gguf", tokenizer=tokenizer)
    if tokenizer: path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(KitError, match=f"does not start: .*{words}.*its log is outputs/lab/llama-"):
        asked(f"local:{path}")
    assert capsys.readouterr().out.count("starts here") == 1, "not once for each question"


def test_a_prompt_that_is_too_long_is_refused_in_words(room, weights):
    with pytest.raises(KitError, match="exceeds the available context size"):
        llm = open_llm("lab", f"local:{weights}")
        asyncio.run(llm.ask("judge", chat("判断", {"text": "福" * 3000}, Verdict), Verdict))


def test_a_setting_that_is_none_is_told(room, weights):
    for line, sentence in (("slot = 2", "no setting 'slot'; the nearest is 'slots'"), ("slots = 0", "slots = '0'")):
        (room.parent / "kit/settings.ini").write_text(f"[smoke]\n[local]\n{line}\n")
        with pytest.raises(UsageError, match=re.escape(sentence)): open_llm("lab", f"local:{weights}")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_slot_keeps_the_text_whose_questions_it_answers(room, weights, at_once):
    "Questions about long texts, all at once or each after the last one's answer, evaluate only what is new in them."
    _, llm = asked(f"local:{weights}", [0])
    server, text = told(room), "愿你平安。" * 40

    async def evaluated(gate):
        client = local.LocalClient(openai.AsyncOpenAI(**server), gate, None, "tiny")
        counts = []

        async def one(which, question):
            messages = [{"role": "user", "content": f"{which}{text}{question}"}]
            async with gate.of({"messages": messages}):
                body = {"model": "any", "messages": messages, "max_tokens": 1}
                raw = await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
                counts.append(raw.json()["timings"]["prompt_n"])

        async def in_turn(which):
            for question in "一二三四":
                await one(which, question)
                await asyncio.sleep(0.001)  # it is recorded
        if at_once: await asyncio.gather(*(one(which, question) for question in "一二三四" for which in "甲乙丙丁"))
        else: await asyncio.gather(*map(in_turn, "甲乙丙丁"))
        return sorted(counts)
    counts = asyncio.run(evaluated(local.Slots(2)))
    assert len(counts) == 16 and counts[9] < 100 < 400 < counts[12], "four whole texts, hardly more, and ends"


# ---- the run

def test_stages_share_one_server_and_nothing_tells_the_path(room, weights):
    process = run(weights)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count("starts here") == 1, "the second stage asks the server of the first"
    assert gone(room), "it ends with the run"
    assert [json.loads((outputs(room) / f"{stage}/answers.json").read_text())["answered"]
            for stage in ("first", "second")] == [3, 3]
    written = [path for path in outputs(room).rglob("*") if path.is_file() and path.name != ".options.json"]
    assert {"run.json", "01_first.ipynb", "ledger.sqlite"} <= {path.name for path in written}
    for path in written: assert str(weights.parent).encode() not in path.read_bytes(), path.name
    record = json.loads((outputs(room) / "run.json").read_text())
    assert record["stages"]["first"]["engine"] == engine_name(f"local:{weights}")
    assert record["stages"]["first"]["parameters"]["engine"] == shown_engine(f"local:{weights}")
    moved = shutil.copy(weights, room.parent / "moved.gguf")
    assert run(moved).communicate()[0].count("unchanged, skipped") == 2, "the content counts"
    other = tiny_gguf(room.parent / "other.gguf", seed=5)
    assert "add --change" in run(other).communicate()[0], "another model in the same run is refused"


def listening(room): return list(room.glob("creawrite-*/*.json"))


def begun(room, stage="first"): return (outputs(room) / stage / "begun.txt").exists() and listening(room)


KILLS = [  # who, when, options of the command, what it says
    ("runner", servers, ["--only", "first", "-p", "wait=0.3"], ""),
    ("server", servers, ["--only", "first"], "does not start: it was killed, most often because memory"),
    ("runner", begun, ["--only", "first"], ""),
    ("kernel", begun, ["--only", "first"], "the kernel died"),
    ("server", begun, ["--only", "first"], "has ended in the middle of its work"),
    ("runner", lambda room: begun(room, "second"), ["-p", "wait=0", "-p", "second.wait=0.3"], "")]


def test_kill_9_anywhere_leaves_no_server_and_the_same_command_goes_on(room, weights):
    for who, when, options, sentence in KILLS:
        for path in outputs(room).glob("*/begun.txt"): path.unlink()
        process = run(weights, *options, "-p", "n=8")
        until(lambda: when(room), process)
        kernel = outputs(room) / "first/begun.txt"
        pid = {"runner": lambda: process.pid, "server": lambda: servers(room)[0],
               "kernel": lambda: int(kernel.read_text())}
        os.kill(pid[who](), signal.SIGKILL)
        output = process.communicate()[0] if who != "runner" else process.wait() and ""
        assert sentence in output and "Traceback" not in output, output
        assert who == "runner" or process.returncode == 1 and "the same command" in output
        assert gone(room), f"a server is left behind when the {who} was killed"
    again = run(weights, "-p", "second.wait=0")
    output = again.communicate()[0]
    assert again.returncode == 0 and "first … unchanged" in output, output
    assert json.loads((outputs(room) / "second/answers.json").read_text())["answered"] == 8


# ---- by hand

def exports(process) -> dict:
    "What a server says to export."
    found = {}
    while len(found) < 3:
        line = process.stdout.readline()
        assert line, "it ended"
        if line.startswith("export "): found |= [line[7:].strip().split("=", 1)]
    return {name: value.strip("'") for name, value in found.items()}


def test_a_file_is_served_by_hand(room, weights):
    process = command("serve", str(weights))
    found = exports(process)
    try:
        assert found["OPENAI_BASE_URL"].startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=found["OPENAI_BASE_URL"], api_key=found["OPENAI_API_KEY"])
        written = client.chat.completions.create(model=found["CREAWRITE_MODEL"], max_tokens=2,
                                                 messages=[{"role": "user", "content": "祝福"}])
        assert written.usage.completion_tokens == 2
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 0 and gone(room)


def test_a_port_that_is_taken_is_told(room, weights):
    with serve.listening_socket(0) as taken:
        taken.listen()
        process = command("serve", str(weights), "--port", str(taken.getsockname()[1]))
        output = process.communicate()[0]
    assert process.returncode == 1 and "choose another with --port" in output and "Traceback" not in output


@pytest.mark.skipif("CREAWRITE_TEST_GGUF" not in os.environ, reason="CREAWRITE_TEST_GGUF names no model file")
def test_real_files_answer(room):
    for path in os.environ["CREAWRITE_TEST_GGUF"].split(os.pathsep):
        answers, llm = asked(f"local:{Path(path).expanduser().absolute()}", range(2), max_tokens=40)
        assert all(isinstance(answer, Verdict) for answer in answers)
        assert llm.ledger.query("SELECT count(*) FROM calls WHERE tokens_in > 0") == [(2,)]
