"What a ledger promises: shared, replayed, checked, priced, free of keys; and a run told to stop loses no call."
import asyncio
import gc
import gzip
import json
import lzma
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from asker import Verdict, questions
from conftest import ENDPOINT, REPOSITORY, make_kit, write_notebook
from faults import Served

from creawrite.answers import Detection
from creawrite.budget import price, table_cost
from creawrite.core import KitError, run_dir
from creawrite.data import read_sample
from creawrite.engines import Endpoint, embedded_client, remote_client
from creawrite.flaws import FLAWS, flaws_in
from creawrite.judge import Framework, ask_detector
from creawrite.ledger import LEDGER_COLUMNS, OFFLINE, Ledger, call_sum, export_ledger, key_of, ledger_rows
from creawrite.llm import LLM, gather, open_llm
from creawrite.messages import CLOSE, OPEN, chat, injections, unwrap
from creawrite.offline import violations

KEY = "sk-not-a-real-key-0123456789"
NO_ENDPOINT = {name: value for name, value in os.environ.items() if name not in ENDPOINT + ["CREAWRITE_ROOT"]}


@pytest.fixture
def ledger(kit) -> Ledger:
    "Thirty answers of two roles in the ledger of run `one`, asked of the fault server; one question is missing."
    with Served(always={3: "broken schema"}) as server:
        client = open_llm("one", stage="multi_agent")
        client.client = remote_client(Endpoint(base_url=server.url, model="m"))
        client.label, client.model = "m @ faults", "m"
        asyncio.run(gather(questions(client, 20)))
        client.stage = "grpo"
        ask = lambda number: client.ask("detector", chat("判断。", {"id": number}, Verdict), Verdict)
        asyncio.run(gather(ask(number) for number in range(10, 20)))
    return client.ledger


@pytest.fixture(autouse=True)
def key(monkeypatch, no_endpoint): monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_costs_by_stage_and_role(ledger, kit, creawrite):
    with (kit / "settings.ini").open("a") as file: file.write("[prices]\nm = 10, 20\n")
    table = table_cost("one").set_index("stage")
    assert table.calls.to_dict() == {"multi_agent": 22, "grpo": 10}
    assert table.missing.to_dict() == {"multi_agent": 1, "grpo": 0}
    assert table.money["grpo"] == pytest.approx(10 * (100 * 10 + 10 * 20) / 1e6)
    assert (table.tokens_in == 100 * table.calls).all()
    code, out, _ = creawrite("ledger", "stats", "one")
    assert code == 0 and "multi_agent  judge" in out and "missing 1 x judge: reply fits no schema" in out


def test_a_model_without_a_price_has_no_cost_rather_than_none(ledger): assert table_cost("one").money.isna().all()


def test_export_import_replay_without_an_engine(ledger, kit, creawrite, tmp_path):
    file, again = tmp_path / "one.jsonl.xz", tmp_path / "again.jsonl.xz"
    assert creawrite("ledger", "export", "one", str(file))[:2] == (0, "32 calls in one.jsonl.xz\n")
    assert creawrite("ledger", "import", "two", str(file))[:2] == (0, "32 new calls in the ledger of two\n")
    assert creawrite("ledger", "import", "two", str(file))[:2] == (0, "0 new calls in the ledger of two\n")
    assert creawrite("ledger", "export", "two", str(again))[0] == 0 and again.read_bytes() == file.read_bytes()
    pd.testing.assert_frame_equal(table_cost("one"), table_cost("two"))
    answers = asyncio.run(gather(questions(open_llm("two", mode="replay"), 20)))
    right = [None if number == 3 else number % 7 for number in range(20)]
    assert [answer.judge if answer else None for answer in answers] == right
    with pytest.raises(KitError, match="role 'judge' with key [0-9a-f]{12}"):
        asyncio.run(gather(questions(open_llm("two", mode="replay"), 21)))
    assert creawrite("ledger", "check", "two")[:2] == (0, "32 calls, 32 stop, 1 missing\n")


def changed(line):
    row = json.loads(line)
    return json.dumps(row | {"request": row["request"].replace("判断", "夸奖")}, ensure_ascii=False)


def other(line, **values): return json.dumps(json.loads(line) | values, ensure_ascii=False)


def without_sum(line): return json.dumps({name: value for name, value in json.loads(line).items() if name != "sum"})


@pytest.mark.parametrize("spoil, says", [
    (lambda lines: [*lines[:5], changed(lines[5]), *lines[6:]], "line 6: its key is not the hash of its request"),
    (lambda lines: [*lines[:4], lines[4][:50]], "line 5 is not JSON"),
    (lambda lines: [*lines, '{"key": "x"}'], "line 33 is not a call"),
    (lambda lines: [*lines, "[]"], "line 33 is not a call"),
    (lambda lines: [*lines[:2], "", *lines[2:]], "line 3 is not JSON"),
    (lambda lines: [*lines, '{"a":' * 9999], "line 33 is not JSON"),
    (lambda lines: [*lines, lines[0].replace('"key"', '"clé"')], "line 33 is not a call"),
    (lambda lines: [*lines[:8], other(lines[8], reply='{"judge": 99}')], "line 9: its checksum does not fit"),
    (lambda lines: [*lines[:8], other(lines[8], missing="judge: never asked")], "line 9: its checksum does not fit"),
    (lambda lines: [*lines[:8], other(lines[8], sum=None)], "line 9: its checksum does not fit"),
    (lambda lines: [without_sum(line) for line in lines], "line 1 has no checksum, as in exports of an older kit"),
])
def test_a_spoilt_export_is_refused_whole(ledger, creawrite, tmp_path, spoil, says):
    file = tmp_path / "one.jsonl.xz"
    creawrite("ledger", "export", "one", str(file))
    lines = lzma.decompress(file.read_bytes()).decode().split("\n")[:-1]
    file.write_bytes(lzma.compress("\n".join(spoil(lines)).encode()))
    code, _, err = creawrite("ledger", "import", "two", str(file))
    assert code == 1 and f"one.jsonl.xz, {says}" in err and err.count("\n") == 1 and "Traceback" not in err
    assert not run_dir("two").exists(), "nothing is made for a file that is none"


@pytest.fixture
def recorded(kit) -> Ledger:
    "Three calls in the ledger of run `one`, asked of nobody."
    ledger = Ledger(run_dir("one") / "ledger.sqlite")
    for number, engine in enumerate(["m @ a", "m @ b", "m @ b"]): ledger.put(**call(number, engine))
    return ledger


def call(number: int, engine="m @ a", **values) -> dict:
    request = json.dumps({"model": "m", "sample": number})
    return {"key": key_of(engine, request), "engine": engine, "stage": "grpo", "role": "judge", "request": request,
            "status": "stop", "reply": '{"judge": 1}', "tokens_in": 100, "tokens_out": 5, "seconds": 1.5} | values


@pytest.mark.parametrize("column, value", [
    ("tokens_in", "100"), ("tokens_in", -1), ("tokens_in", 1.5), ("tokens_in", True), ("tokens_in", None),
    ("tokens_out", 10**30), ("calls", [1]), ("retries", {"of": 1}), ("seconds", "1.5"), ("seconds", float("nan")),
    ("seconds", float("inf")), ("at", None), ("key", None), ("key", 7), ("engine", ["m"]), ("request", {"model": "m"}),
    ("request", "no JSON"), ("request", "[]"), ("status", None), ("reply", None), ("reply", {"judge": 1}),
    ("stage", 3), ("missing", 1), ("reply", "\ud83d")])
def test_a_value_of_the_wrong_type_is_named_with_its_line(recorded, creawrite, tmp_path, column, value):
    rows = [row | {"sum": call_sum(row)} for row in ledger_rows(recorded)]
    spoilt = rows[1] | {column: value}
    if column == "request" and isinstance(value, str): spoilt["key"] = key_of(spoilt["engine"], value)
    if value != "\ud83d": spoilt["sum"] = call_sum({name: spoilt[name] for name in LEDGER_COLUMNS})
    lines = "".join(json.dumps(row) + "\n" for row in (rows[0], spoilt, rows[2]))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    code, _, err = creawrite("ledger", "import", "two", str(tmp_path / "x.jsonl.xz"))
    named = column if value != "\ud83d" else "half a character"
    assert code == 1 and "x.jsonl.xz, line 2" in err and named in err and err.count("\n") == 1
    assert not run_dir("two").exists()


@pytest.mark.parametrize("content", [
    b"", b"\0" * 64, b"not xz", b'{"key": "x"}\n', gzip.compress(b"{}\n", mtime=0), lzma.compress(b"{}\n" * 999)[:40],
    lzma.compress(b"{}\n", lzma.FORMAT_ALONE), lzma.compress(b"")[:-1]])
def test_a_file_that_is_no_export(kit, creawrite, tmp_path, content):
    (tmp_path / "x.jsonl.xz").write_bytes(content)
    code, _, err = creawrite("ledger", "import", "two", str(tmp_path / "x.jsonl.xz"))
    assert code == 1 and "x.jsonl.xz" in err and "export the ledger again" in err and err.count("\n") == 1
    assert not run_dir("two").exists()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_an_export_that_was_cut_off(recorded, creawrite, tmp_path, share):
    file = tmp_path / "one.jsonl.xz"
    creawrite("ledger", "export", "one", str(file))
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    code, _, err = creawrite("ledger", "import", "two", str(file))
    assert code == 1 and "one.jsonl.xz cannot be read" in err and err.count("\n") == 1
    assert not run_dir("two").exists()


@pytest.mark.parametrize("filling, says", [
    (b" ", "line 1 is longer than 16 MiB"), (b"[", "line 1 is longer than 16 MiB"), (b"\n", "line 1 is not JSON"),
    (None, "unpacks to more than")])
def test_a_compressed_bomb_takes_little_memory(kit, tmp_path, filling, says):
    "Concatenated streams of 16 MiB, 2.5 kB each when packed, and 2.5 MB that would be 16 GB."
    row = call(1, reply=" " * (15 * 2**20)) | {"calls": 1, "retries": 0, "missing": None, "at": 1.0, "form": None}
    stream = filling * 2**24 if filling else json.dumps(row | {"sum": call_sum(row)}).encode() + b"\n"
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(stream) * (1000 if filling else 40))
    program = """
import resource, sys
from creawrite.cli import main
import creawrite.ledger
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: main(["ledger", "import", "two", sys.argv[1]])
finally: print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.jsonl.xz")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert float(done.stdout) < 200, f"{done.stdout} MB"


def test_an_import_that_is_killed_brings_nothing_and_then_all(kit, creawrite, tmp_path):
    ledger, file = Ledger(run_dir("one") / "ledger.sqlite"), tmp_path / "one.jsonl.xz"
    ledger.query("BEGIN")
    for number in range(2500): ledger.put(**call(number, reply=os.urandom(600).hex()))
    ledger.query("COMMIT")
    assert export_ledger("one", file) == 2500
    command = [sys.executable, "-m", "creawrite.cli", "ledger", "import", "two", str(file)]
    log = run_dir("two") / "ledger.sqlite-wal"
    with subprocess.Popen(command, cwd=kit) as process:
        while not log.exists() or log.stat().st_size < 2**20:
            assert process.poll() is None, "ended too early to prove anything"
            time.sleep(0.001)
        process.kill()
    assert Ledger(run_dir("two") / "ledger.sqlite").query("SELECT count(*) FROM calls") == [(0,)]
    assert creawrite("ledger", "import", "two", str(file))[1] == "2,500 new calls in the ledger of two\n"


def test_where_an_export_must_not_go(recorded, kit, creawrite, tmp_path):
    (tmp_path / "notes.txt").write_text("not to be lost")
    database = run_dir("one") / "ledger.sqlite"
    for place, says in [(tmp_path / "missing" / "x.jsonl.xz", "there is no folder"), (tmp_path, "is a folder"),
                        (tmp_path / "notes.txt", "is no export"), (database, "is no export"),
                        (Path("/dev/full"), "is no export")]:
        code, _, err = creawrite("ledger", "export", "one", str(place))
        assert code == 1 and says in err and place.name in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "not to be lost"
    assert Path("/dev/full").is_char_device() and creawrite("ledger", "check", "one")[0] == 0


def test_stats_by_engine(recorded, kit, creawrite):
    with (kit / "settings.ini").open("a") as file: file.write("[prices]\nm = 10, 20\n")
    recorded.put(**call(9, "other @ c"))
    recorded.miss(call(1, "m @ b")["key"], "judge: reply ended with length")
    lines = creawrite("ledger", "stats", "one")[1].splitlines()
    assert lines[0].split()[:4] == ["engine", "stage", "role", "calls"]
    assert [line.split()[:3] + line.split()[5:6] for line in lines[1:4]] == [
        ["m", "@", "a", "1"], ["m", "@", "b", "2"], ["other", "@", "c", "1"]]
    assert lines[1].endswith("0.0011") and lines[3].endswith(" 0"), "no price, no cost"
    assert lines[4:] == ["missing 1 x judge: reply ended with length (m @ b)"]
    assert table_cost("one").money.isna().all(), "a sum with an unknown part is unknown"


# ---- what lies in the place of a ledger

def sqlite_file(path: Path, *statements: str):
    with sqlite3.connect(path) as db:
        for statement in statements: db.execute(statement)
    db.close()


def spoil_pages(path: Path):
    content = bytearray(path.read_bytes())
    content[4096 * 3:4096 * 6] = os.urandom(4096 * 3)
    path.write_bytes(content)


def cut(path: Path, size: int): os.truncate(path, size if size > 0 else path.stat().st_size + size)


IMPOSTORS = {
    "random bytes": lambda path: path.write_bytes(os.urandom(9000)),
    "zeros": lambda path: path.write_bytes(bytes(8192)),
    "a text": lambda path: path.write_text("key,engine\n" * 900),
    "a short text": lambda path: path.write_text("x"),
    "another database": lambda path: (path.unlink(), sqlite_file(path, "CREATE TABLE songs (name TEXT)")),
    "another database's calls": lambda path: (path.unlink(), sqlite_file(path, "CREATE TABLE calls (name TEXT)")),
    "a ledger without its key": lambda path: (path.unlink(), sqlite_file(path, "CREATE TABLE calls ({})".format(
        ", ".join(f"{name} {kind.split()[0]}" for name, kind in LEDGER_COLUMNS.items())))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "cut in its first page": lambda path: cut(path, 1000),
    "cut at a page": lambda path: cut(path, 8192),
    "cut by a few bytes": lambda path: cut(path, -100),
    "pages overwritten": spoil_pages}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_is_no_ledger_is_refused_by_name_and_left_alone(kit, creawrite, tmp_path, kind):
    path, file = run_dir("one") / "ledger.sqlite", tmp_path / "one.jsonl.xz"
    ledger = Ledger(path)
    for number in range(60): ledger.put(**call(number))
    ledger.db.close()
    export_ledger("one", file)
    gc.collect()  # its connection, too, so that no log beside it holds the truth
    IMPOSTORS[kind](path)
    before = None if path.is_dir() else path.read_bytes()
    for command in (["stats", "one"], ["check", "one"], ["import", "one", str(file)],
                    ["export", "one", str(tmp_path / "new.jsonl.xz")]):
        code, _, err = creawrite("ledger", *command)
        assert code == 1 and err.startswith("error: outputs/one/ledger.sqlite ") and err.count("\n") == 1, err
        assert "move it away" in err
    for open_it in (lambda: open_llm("one", "offline"), lambda: open_llm("one", mode="replay")):
        with pytest.raises(KitError, match="outputs/one/ledger.sqlite .*move it away"): open_it()
    assert before is None or path.read_bytes() == before
    assert not (tmp_path / "new.jsonl.xz").exists()


def test_a_ledger_damaged_while_it_is_open_is_one_sentence(recorded):
    for number in range(200): recorded.put(**call(number, reply="x" * 4000))
    recorded.query("PRAGMA wal_checkpoint(TRUNCATE)")
    spoil_pages(recorded.path)
    recorded.query("PRAGMA shrink_memory")
    with pytest.raises(KitError, match="outputs/one/ledger.sqlite is no whole ledger"): list(ledger_rows(recorded))


def test_half_a_character_in_a_reply_is_recorded_as_a_question_mark(recorded, creawrite, tmp_path):
    assert recorded.put(**call(7, reply='{"judge": "\ud83d"}')) == ("stop", '{"judge": "?"}')
    recorded.miss(call(7)["key"], "the server said \udce8")
    assert creawrite("ledger", "check", "one")[0] == 0
    assert creawrite("ledger", "export", "one", str(tmp_path / "x.jsonl.xz"))[0] == 0


def test_missing_and_damaged_ledgers_are_one_sentence(ledger, kit, creawrite, tmp_path):
    for command in (["stats", "ones"], ["check", "ones"], ["export", "ones", str(tmp_path / "x.jsonl.xz")]):
        code, _, err = creawrite("ledger", *command)
        assert code == 2 and "run 'ones' has no ledger; the nearest is 'one'" in err
    assert creawrite("ledger", "import", "two", str(tmp_path / "none.jsonl.xz"))[0] == 1
    ledger.query("UPDATE calls SET request = '{}' WHERE rowid = 7")
    assert "call 7 of one: its key is not the hash" in creawrite("ledger", "check", "one")[2]
    code, _, err = creawrite("ledger", "export", "one", str(tmp_path / "one.jsonl.xz"))
    assert code == 1 and not list(tmp_path.glob("*one.jsonl*")), "nothing half-written"


def test_a_secret_under_judgement_is_not_exported(ledger, creawrite, tmp_path):
    row = dict(zip(LEDGER_COLUMNS, ledger.query("SELECT * FROM calls LIMIT 1")[0]))
    request = row["request"].replace("判断", KEY)
    ledger.put(**row | {"request": request, "key": key_of(row["engine"], request)})
    code, _, err = creawrite("ledger", "export", "one", str(tmp_path / "one.jsonl.xz"))
    assert code == 1 and "call 33 of one holds a secret" in err and KEY not in err


@pytest.mark.parametrize("text, says", [
    ("budget = 3", "no limit 'budget'; the nearest is 'budget_money'"), ("in_flight = 0", "in_flight = '0'"),
    ("retries = many", "retries = 'many'")])
def test_a_wrong_limit_is_named(kit, text, says):
    with (kit / "settings.ini").open("a") as file: file.write(f"[limits]\n{text}\n")
    with pytest.raises(KitError) as caught: open_llm("t", "offline")
    assert says in str(caught.value)


def test_a_wrong_price_is_named(kit):
    with (kit / "settings.ini").open("a") as file: file.write("[prices]\nqwen:7b = 2\n")
    assert price("gpt") is None
    with pytest.raises(KitError, match=r"\[prices\]: qwen:7b = '2' is not two numbers"): price("qwen:7b")


# ---- in a run

def asking_kit(folder: Path, server, questions=200):
    "A kit whose last stage asks, and a function that starts its runner with an endpoint in the environment."
    kit = make_kit(folder / "asking")
    imports = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / 'tests')!r})
from asker import questions
from creawrite.llm import gather, open_llm
"""
    asking = f"""
answers = await gather(questions(open_llm(run, engine), {questions}))
print(len(answers), 'answers')
"""
    write_notebook(kit / "nbs/04_ask.ipynb", 'run: str = "lab"\nengine: str = "auto"', "reads = []", imports, asking)
    environment = NO_ENDPOINT | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY, "CREAWRITE_MODEL": "m"}
    command = [sys.executable, "-m", "creawrite.cli", "run", "--only", "ask"]
    streams = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return kit, lambda: subprocess.Popen(command, cwd=kit, env=environment, **streams)


def test_a_run_told_to_stop_records_what_is_in_flight_and_goes_on(tmp_path):
    with Served(latency=0.4, spread=False) as server:
        kit, start = asking_kit(tmp_path, server)
        runner = start()
        while server.told().get("under way", 0) < 32:
            assert runner.poll() is None, runner.stdout.read()
            time.sleep(0.02)
        runner.send_signal(signal.SIGTERM)
        told = runner.communicate()[0]
        assert runner.returncode == 130 and "Traceback" not in told
        assert "stopped; the same command resumes there" in told
        served, ledger = server.told(), Ledger(kit / "outputs/smoke/ledger.sqlite")
        recorded = ledger.query("SELECT count(*) FROM calls WHERE stage = 'ask'")[0][0]
        assert served["tries"] == served["whole"] == recorded < 200
        told = start().communicate()[0]
        assert "200 answers" in told and server.told()["whole"] == 200, "nothing was asked twice"


@pytest.mark.parametrize("rate, kinds", [(0.2, ["500", "no JSON", "reset"]), (1.0, ["400"])])
def test_no_key_in_ledger_notebooks_records_or_messages(tmp_path, rate, kinds):
    with Served(rate=rate, kinds=kinds) as server:
        kit, start = asking_kit(tmp_path, server, 30)
        told = start().communicate()[0]
    assert KEY not in told and ("30 answers" in told) == (rate < 1)
    files = [path for path in (kit / "outputs").rglob("*") if path.is_file()]
    assert {"run.json", "ledger.sqlite", "04_ask.ipynb"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_smoke_run_replays_in_a_fresh_clone(smoke_run, tmp_path):
    "Every stage that asks runs again from the exported calls alone; trained models are taken along, they ask nobody."
    clone, file = tmp_path / "clone", tmp_path / "smoke.jsonl.xz"
    listing = ["git", "ls-files", "-z", "nbs", "creawrite", "data", "settings.ini", "pyproject.toml"]
    names = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, clone / name)

    def command(folder, *arguments):
        line = [sys.executable, "-m", "creawrite.cli", *arguments]
        return subprocess.run(line, cwd=folder, env=NO_ENDPOINT, capture_output=True, text=True)
    assert command(REPOSITORY, "ledger", "export", smoke_run, str(file)).returncode == 0
    assert command(clone, "ledger", "import", "again", str(file)).returncode == 0
    old, new = REPOSITORY / "outputs" / smoke_run, clone / "outputs" / "again"
    for stage in ("data", "audit", "sft", "reward_model", "grpo"): shutil.copytree(old / stage, new / stage)
    for stage in ("multi_agent", "adversarial", "evaluate", "paper"):
        done = command(clone, "run", "--run", "again", "--only", stage, "-p", "mode=replay")
        assert done.returncode == 0, done.stdout + done.stderr
    patterns = {"multi_agent": "*.jsonl", "adversarial": "*.json*", "evaluate": "*.csv", "paper": "table*"}
    for stage, pattern in patterns.items():
        files = sorted(path.name for path in (old / stage).glob(pattern))
        files = [name for name in files if name != "evaluators.csv"]  # it holds the scorers' own seconds
        differ = [name for name in files if (old / stage / name).read_bytes() != (new / stage / name).read_bytes()]
        assert files and differ == [], stage

    def unhurried(folder):
        table = pd.read_csv(folder / "evaluate/evaluators.csv")
        return table[~table.measure.str.startswith("seconds")].reset_index(drop=True)
    pd.testing.assert_frame_equal(unhurried(old), unhurried(new))
    assert (old / "paper/table_cost.csv").read_bytes() == (new / "paper/table_cost.csv").read_bytes()
    calls = [Ledger(folder / "ledger.sqlite").query("SELECT count(*) FROM calls") for folder in (old, new)]
    assert calls[0] == calls[1]


# ---- untrusted text

ATTACKS = injections()
RULES = [f"有「{flaw.zh}」的判 Bad" for flaw in FLAWS.values()]


def test_the_injection_set_is_what_it_says():
    texts = [attack["text"] for attack in ATTACKS]
    assert len(texts) == len(set(texts)) >= 60 and len({attack["id"] for attack in ATTACKS}) == len(texts)
    kinds = {attack["kind"] for attack in ATTACKS}
    assert {"ignore", "verdict", "role", "delimiter", "unicode", "base64", "padding"} <= kinds
    chinese = sum(any("\u4e00" <= char <= "\u9fff" for char in text) for text in texts)
    assert chinese >= 20 and len(texts) - chinese >= 20


def test_injections_reach_the_endpoint_only_as_data(tmp_path):
    from test_llm import Server, scripted
    app, bodies = scripted((200, '{"judge": 0}', {}))
    texts = [attack["text"] for attack in ATTACKS]
    payloads = [{"query": text, "response": text, "points": [{text: text}]} for text in texts]
    with Server(app) as url:
        endpoint = remote_client(Endpoint(base_url=url, model="m"))
        client = LLM(Ledger(tmp_path / "ledger.sqlite"), "m", endpoint, "m")
        asyncio.run(gather(client.ask("judge", chat("判断。", payload, Verdict), Verdict) for payload in payloads))
    users = [body["messages"][-1]["content"] for body in bodies]
    without_block = {json.dumps(body | {"messages": body["messages"][:-1]}) for body in bodies}
    assert len(without_block) == 1, "only the user's block differs"
    assert all([message["role"] for message in body["messages"]] == ["system", "user"] for body in bodies)
    for user in users:
        assert user.count(OPEN) == user.count(CLOSE) == 1 and user.startswith(OPEN) and user.endswith(CLOSE)
    key = lambda payload: json.dumps(payload, sort_keys=True)
    assert sorted(map(key, map(unwrap, users))) == sorted(map(key, payloads))


@pytest.mark.parametrize("place", ["before", "after", "in the query"])
def test_injections_do_not_change_the_offline_verdict(tmp_path, place):
    client = LLM(Ledger(tmp_path / "ledger.sqlite"), OFFLINE, embedded_client(), "offline-rulebook")
    # flaws of words, which the rules find: a repetition is diluted by any sentence more,
    # and a text off topic gains the wish that an attack may hold
    rows = [row for row in read_sample() if row.flaw in ("pressure", "taboo", "advertising", "wrong_tone")]

    async def verdicts():
        framework = Framework(client)
        clean = await framework.verdicts([row.query for row in rows], [row.weak for row in rows])
        bad = [row for row, verdict in zip(rows, clean) if verdict == 0 and row.flaw in flaws_in(row.query, row.weak)]
        attacked = [(bad[number % len(bad)], attack["text"]) for number, attack in enumerate(ATTACKS)]
        queries = [row.query + (text if place == "in the query" else "") for row, text in attacked]
        texts = [{"before": text + row.weak, "after": row.weak + text}.get(place, row.weak) for row, text in attacked]
        debated, pairs = await framework.verdicts(queries, texts), list(zip(queries, texts))
        return len(bad), debated, pairs, await gather(ask_detector(client, RULES, query, text) for query, text in pairs)
    bad, debated, pairs, detections = asyncio.run(verdicts())
    assert bad >= 30 and debated == [0] * len(ATTACKS)
    assert all(isinstance(answer, Detection) and answer.verdict == "Bad" for answer in detections)
    direct = [violations(RULES, query, text)[1] == 1 for query, text in pairs]
    assert [answer.verdict == "Good" for answer in detections] == direct, "the wire changes nothing"
