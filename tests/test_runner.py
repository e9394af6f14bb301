"""The runner: what it refuses, what it skips, how it fails, and that it picks up where it was."""
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENDPOINT, REPOSITORY, make_kit

from creawrite import kernels, runner
from creawrite.settings import KINDS, make_plan, parameters, read_patterns

SECRETS = {"DEMO_TOKEN": "hush-hush-hush", "AUTHORIZATION": "Bearer very.private"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A kit after `creawrite run`, with secrets in the environment; and what the command printed."
    folder = make_kit(tmp_path_factory.mktemp("finished") / "kit")
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT} | SECRETS
    environment["PATH"] = "/usr/bin:/bin"  # the virtual environment is not activated
    command = [sys.executable, "-m", "creawrite.cli", "run"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def done(finished, tmp_path, monkeypatch, no_endpoint) -> Path:
    "A copy of the finished kit, in another folder."
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.fixture
def executed(monkeypatch) -> list:
    "The names of stages that would have been executed, without kernels."
    names = []
    monkeypatch.setattr(runner, "execute", lambda plan, stage, descriptor, say: names.append(stage.name))
    return names


def statuses(run="smoke"): return dict(zip(*[runner.table_status(run)[column] for column in ("stage", "status")]))


def why(stage, run="smoke"): return runner.table_status(run).set_index("stage").why[stage]


def edit(path: Path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---- what it refuses

REFUSED = [
    (["run", "--profile", "smok"], "settings.ini has no profile 'smok'; the nearest is 'smoke'"),
    (["run", "--profile", "smoke.double"], "has no profile 'smoke.double'"),
    (["run", "--from", "doubel"], "no stage 'doubel' in nbs; the nearest is 'double'"),
    (["run", "--only", "x"], "no stage 'x' in nbs; there is data, double, report"),
    (["run", "--only", "data", "--from", "data"], "--from and --only exclude each other"),
    (["run", "-p", "data.sead=1"], "-p data.sead: stage data has no parameter 'sead'; the nearest is 'seed'"),
    (["run", "-p", "sead=1"], "-p sead: no stage has a parameter 'sead'; the nearest is 'seed'"),
    (["run", "-p", "dat.seed=1"], "no stage 'dat' in nbs; the nearest is 'data'"),
    (["run", "-p", "seed"], "-p seed: write stage.key=value"),
    (["run", "-p", "data.=1"], "write stage.key=value"),
    (["run", "-p", "seed=one"], "-p seed: seed = 'one' is not a whole number (int)"),
    (["run", "-p", "seed=1.5"], "seed = '1.5' is not a whole number (int)"),
    (["run", "-p", "double.factor=much"], "factor = 'much' is not a number (float)"),
    (["run", "-p", "strict=maybe"], "strict = 'maybe' is not true or false (bool)"),
    (["run", "-p", "kinds=a"], """kinds = 'a' is not a JSON list such as ["a", "b"] (list[str])"""),
    (["run", "-p", "kinds={}"], "is not a JSON list"),
    (["run", "-p", "run=x"], "name the run with --run"),
    (["run", "--run", "../x"], "run name '../x' must be a plain folder name"),
    (["run", "--run", ".x"], "must be a plain folder name"),
    (["run", "-p", "api_key=1"], "api_key looks like a secret"),
    (["run", "-p", "hf_token=1"], "hf_token looks like a secret"),
    (["status", "nothing"], "no run 'nothing' in outputs; there is none"),
    (["data", "fetch", "--from", "nowhere"], "--from nowhere: no such folder"),
]


@pytest.mark.parametrize("arguments, sentence", REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_usage_errors_are_one_sentence_and_exit_2(kit, creawrite, arguments, sentence):
    code, out, err = creawrite(*arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
    assert "Traceback" not in out + err
    assert not list((kit / "outputs").iterdir())


SETTINGS = [
    ("[smoke]\nsead = 1\n", "settings.ini [smoke]: no stage has a parameter 'sead'; the nearest is 'seed'"),
    ("[smoke]\n[smoke.double]\nseed = 1\n", "settings.ini [smoke.double]: stage double has no parameter 'seed'"),
    ("[smoke]\n[smoke.dubble]\nfactor = 1\n",
     "settings.ini [smoke.dubble]: no stage 'dubble' in nbs; the nearest is 'double'"),
    ("[smoke]\n[smoke.double]\nfactor = many\n",
     "settings.ini [smoke.double]: factor = 'many' is not a number (float)"),
    ("[smoke]\nFactor = 1\n", "no stage has a parameter 'Factor'; the nearest is 'factor'"),
    ("[smoke]\noffline = perhaps\n", "settings.ini [smoke]: offline = 'perhaps' is not true or false"),
    ("[smoke]\nseed = 1\nseed = 2\n", "settings.ini cannot be read:"),
    ("[smoke\n", "settings.ini cannot be read:"),
    ("seed = 1\n", "settings.ini cannot be read:"),
    ("[smoke]\nseed\n", "settings.ini cannot be read:"),
    ("[smoke.data]\nseed = 1\n", "settings.ini has no profile 'smoke'; there is none"),
    ("[smoke]\nsource = sk-1234567890abcdef\n", "settings.ini [smoke]: source looks like a secret"),
]


@pytest.mark.parametrize("text, sentence", SETTINGS)
def test_settings_errors(kit, creawrite, text, sentence):
    (kit / "settings.ini").write_text(text)
    code, _, err = creawrite("run")
    assert (code, err.count("\n")) == (2, 1) and sentence in err


FORMS = ["sk-proj-0123456789", "Bearer abcdef", "hf_abcdefghijklmnopqrst", "0123456789abcdef0123456789abcdef",
         "q7Zp2LmX9vK4tR8wB3nY6cD1", "my-own-word"]
ORDINARY = ["Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            "f7a4813cc8bedf99b21a7bb15134a2231e7e4945", "data/of 2025-01-01", "祝福语"]


@pytest.mark.parametrize("value", FORMS)
def test_secrets_are_refused_and_not_repeated(kit, creawrite, monkeypatch, value):
    monkeypatch.setenv("SOME_API_KEY", "my-own-word")
    code, _, err = creawrite("run", "-p", f"source={value}")
    assert code == 2 and "looks like a secret" in err and "environment variable" in err and value not in err


@pytest.mark.parametrize("value", ORDINARY)
def test_ordinary_values_are_no_secrets(kit, value):
    assert make_plan("smoke", overrides=[f"source={value}"]).given["data"]["source"] == value


def test_an_endpoint_without_a_key_is_told_before_anything_runs(kit, creawrite, monkeypatch):
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    code, out, err = creawrite("run")
    assert code == 1 and "OPENAI_API_KEY" in err and err.count("\n") == 1 and "sum:" not in out


@pytest.mark.parametrize("damage, sentence", [
    (lambda path: path.write_text("{"), "01_data.ipynb is not a notebook"),
    (lambda path: edit(path, "seed: int = 1", "seed: int = 2 ** 3"),
     "01_data.ipynb: the default of parameter 'seed' must be a plain value"),
    (lambda path: edit(path, "\"reads\"", "\"raeds\""), "01_data.ipynb has no cell tagged reads"),
    (lambda path: edit(path, "reads = [", "reads = ['double/out.json', "), "which no earlier stage writes"),
    (lambda path: edit(path, "print(", "print(("), "01_data.ipynb: not Python"),
])
def test_a_broken_notebook(kit, creawrite, damage, sentence):
    damage(kit / "nbs/01_data.ipynb")
    code, _, err = creawrite("run")
    assert code == 1 and sentence in err and err.count("\n") == 1


def test_a_broken_record(done, creawrite):
    (done / "outputs/smoke/run.json").write_text("{")
    for command in (["status", "smoke"], ["run"]):
        code, _, err = creawrite(*command)
        assert code == 1 and "run.json is not valid JSON" in err


def test_outside_a_kit(tmp_path, creawrite, monkeypatch):
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    code, _, err = creawrite("run")
    assert code == 1 and "no settings.ini" in err


def test_a_run_keeps_its_profile(done, creawrite):
    code, _, err = creawrite("run", "--profile", "other", "--run", "smoke")
    assert code == 2 and "holds a run of profile smoke" in err


# ---- settings

def test_later_settings_beat_earlier_ones(kit):
    assert make_plan("smoke").given == {"data": {"seed": 7}, "double": {"factor": 3.0}, "report": {}}
    plan = make_plan("smoke", "mine", ["data.seed=3", "seed=2", "strict=yes", 'kinds=["b", "c"]'])
    assert plan.given["data"] == {"seed": 3, "strict": True, "kinds": ["b", "c"]} and plan.run == "mine"
    assert make_plan("other").given == {"data": {}, "double": {}, "report": {}}


def test_kernels_go_offline_only_when_the_profile_says_so(kit):
    for profile, offline in (("smoke", "1"), ("other", None)):
        plan = make_plan(profile)
        assert kernels.kernel_environment(plan, plan.stages[0]).get("HF_HUB_OFFLINE") == offline


# ---- a whole run

def test_output_streams_with_stage_and_time(finished):
    lines = finished[1].splitlines()
    assert lines[0] == "run smoke, profile smoke"
    assert lines[1:3] == ["[ 1/3] data … time unknown", "        sum: 10"]
    assert re.fullmatch(r"        done in \d+\.\d s", lines[3])
    assert lines[-1].endswith("everything lies in outputs/smoke/")
    assert json.loads((finished[0] / "outputs/smoke/double/out.json").read_text()) == 30


def test_the_kernel_is_this_python(finished):
    notebook = json.loads((finished[0] / "outputs/smoke/03_report.ipynb").read_text())
    shown = "".join(notebook["cells"][-1]["outputs"][-1]["data"]["text/plain"])
    assert [Path(place).name for place in re.findall(r"'([^']*)'", shown)] == [Path(sys.executable).name, "bin", "1"]


def test_no_secret_and_no_machine_in_what_is_kept(finished):
    folder, printed = finished
    files = [path for path in (folder / "outputs").rglob("*") if path.is_file()]
    kept = {path: path.read_text(encoding="utf-8") for path in files} | {"terminal": printed}
    report = kept[folder / "outputs/smoke/03_report.ipynb"]
    assert report.count("*** *** ") == 2 and "./outputs 1" in report and "*** *** ./outputs 1" in printed
    for place, text in kept.items():
        for word in ["hush-hush-hush", "very.private", "sk-abcdefgh", str(folder)]: assert word not in text, place
    record = (folder / "outputs/smoke/run.json").read_text(encoding="utf-8")
    names = "|".join(map(re.escape, (socket.gethostname(), getpass.getuser())))
    assert not re.search(r'"[/~]', record) and not re.search(rf"\b({names})\b", record)
    assert not list(folder.glob("outputs/**/*.part*"))


def test_the_record(finished):
    record = json.loads((finished[0] / "outputs/smoke/run.json").read_text(encoding="utf-8"))
    assert record["seeds"] == {"data": 7} and record["git"] is None and record["hardware"]["cores"] >= 1
    assert {"torch", "transformers", "trl", "papermill", "creawrite"} <= set(record["packages"])
    data, double, report = record["stages"].values()
    assert data["parameters"] == {"source": "sample", "seed": 7, "kinds": ["a"], "strict": False}
    assert double["parameters"] == {"factor": 3.0}
    assert list(data["inputs"]) == ["./data/{source}/"] and list(report["inputs"]) == ["double/out.json"]
    assert "offline" in report["engine"]
    for stage in record["stages"].values(): assert stage["seconds"] > 0 and len(stage["fingerprint"]) == 64


# ---- skipping

def test_an_unchanged_run_is_skipped_anywhere(done, creawrite, executed):
    code, out, _ = creawrite("run")
    assert code == 0 and out.count("unchanged, skipped") == 3 and executed == []
    assert set(statuses().values()) == {"done"}


def changed(place: str, old: str, new: str):
    "An edit of one file of a kit."
    return lambda kit: edit(kit / place, old, new)


CHANGES = {  # what is done to a finished kit, the stages that are stale then, and why
    "notebook": (changed("nbs/02_double.ipynb", "write_json(stage", "write_json( stage"), {"double"}, "notebook"),
    "prose": (changed("nbs/02_double.ipynb", "## Run", "## Runs"), set(), ""),
    "module": (changed("creawrite/helper.py", "times(value", "times(1 * value"), {"double"}, "code of helper"),
    "module of a module": (changed("creawrite/times.py", "a * b", "b * a"), {"double"}, "code of times"),
    "comment": (changed("creawrite/times.py", "# a comment", "# another"), set(), ""),
    "figure": (changed("creawrite/helper.py", "'red'", "'blue'"), set(), ""),
    "runner": (changed("creawrite/runner.py", "self.known = json.loads(", "self.known = dict() | json.loads("),
               set(), ""),
    "command line": (changed("creawrite/cli.py", "widths =", "sizes = widths ="), set(), ""),
    "message": (changed("creawrite/core.py", "is missing: run the stage", "is not there: run the stage"), set(), ""),
    "shared": (changed("creawrite/core.py", "indent=2", "indent=1"), {"data", "double"}, "code of core"),
    "used by all": (changed("creawrite/core.py", "mkdir(parents=True", "mkdir(0o755, parents=True"),
                    {"data", "double", "report"}, "code of core"),
    "not reached": (changed("creawrite/messages.py", "<material>", "<text>"), set(), ""),
    "default": (changed("nbs/02_double.ipynb", "factor: float = 2", "factor: float = 4"), {"double"}, "notebook"),
    "settings": (changed("settings.ini", "factor = 3", "factor = 4"), {"double"}, "parameters factor"),
    "input": (lambda kit: (kit / "data/sample/numbers.txt").write_text("1\n3\n"), {"data"}, "inputs ./data/{source}/"),
    "new input": (lambda kit: (kit / "data/sample/more.txt").write_text("1\n"), {"data"}, "inputs ./data/{source}/"),
    "unread output": (lambda kit: (kit / "outputs/smoke/data/more.txt").write_text("1\n"), {"data"}, "outputs"),
    "deleted output": (lambda kit: (kit / "outputs/smoke/double/out.json").unlink(), {"double", "report"}, "outputs"),
    "changed output": (changed("outputs/smoke/double/out.json", "30", "31"), {"double", "report"}, "outputs"),
    "executed copy": (lambda kit: (kit / "outputs/smoke/02_double.ipynb").unlink(), {"double"}, "executed notebook"),
    "ledger": (lambda kit: (kit / "outputs/smoke/double/ledger.sqlite").write_text("x"), set(), ""),
    "leftover": (lambda kit: (kit / "outputs/smoke/double/.out.json.7.part").write_text("x"), set(), ""),
    "time stamp": (lambda kit: os.utime(kit / "outputs/smoke/double/out.json"), set(), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_a_stage_stale(done, change):
    act, stale, reason = CHANGES[change]
    act(done)
    assert {stage for stage, found in statuses().items() if found == "stale"} == stale
    for stage in stale - {"report"}: assert reason in why(stage)


def test_another_engine_makes_a_stage_stale(done, monkeypatch):
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    assert statuses()["report"] == "stale" and "OPENAI_API_KEY" in why("report")
    monkeypatch.setenv("OPENAI_API_KEY", "a-private-key")
    assert statuses() == {"data": "done", "double": "done", "report": "stale"} and why("report") == "changed: engine"


def test_only_from_and_force(done, creawrite, executed):
    for arguments, expected in [("--only double", ""), ("--only double --force", "double"),
                                ("--from double", "double report"), ("--from 02_double", "double report"),
                                ("--force", "data double report"), ("-p factor=4", "double")]:
        executed.clear()
        code, out, _ = creawrite("run", *arguments.split())
        assert code == 0 and executed == expected.split(), arguments
    assert "[ 2/3] double … about" in out and " left" in out


def test_the_stages_a_run_has_ahead(done):
    plan, hashes = make_plan("smoke", overrides=["seed=8"]), runner.Hashes(done / "hashes.json")
    assert runner.ahead(plan, runner.read_record("smoke"), hashes, plan.stages) == ["data", "double", "report"]


def test_status_remembers_the_options_of_the_run(done, creawrite, executed):
    creawrite("run", "-p", "factor=4")
    assert statuses()["double"] == "done"
    assert runner.read_record("smoke")["stages"]["double"]["parameters"] == {"factor": 4.0}
    assert runner.read_record("smoke")["options"] == ["factor=4"]


# ---- failing and resuming

def test_a_failing_stage_stops_the_run_and_resumes(done, creawrite):
    (done / "broken").touch()
    code, out, err = creawrite("run", "--from", "report")
    sentence, rest = err.splitlines()
    assert code == 1 and sentence == "error: ./broken is in the way: remove it"
    assert "outputs/smoke/03_report.ipynb" in rest and "resumes there" in rest
    assert statuses()["report"] == "failed" and "in the way" in why("report")
    copy = (done / "outputs/smoke/03_report.ipynb").read_text()
    assert "KitError" in copy and str(done) not in copy
    (done / "broken").unlink()
    code, out, _ = creawrite("run")
    assert code == 0 and out.count("unchanged, skipped") == 2 and "about" in out
    assert set(statuses().values()) == {"done"}


OTHERS = [("bug", "ZeroDivisionError: division by zero (under “Run”)"), ("deadly", "the kernel died without a word")]


@pytest.mark.parametrize("cause, sentence", OTHERS)
def test_other_failures(done, creawrite, cause, sentence):
    (done / cause).touch()
    code, _, err = creawrite("run", "--only", "report", "--force")
    assert code == 1 and err.startswith(f"error: {sentence}") and "Traceback" not in err
    assert statuses()["report"] == "failed" and (done / "outputs/smoke/03_report.ipynb").is_file()


# ---- reads are declared

@pytest.mark.parametrize("statement, sentence", [
    ('(root() / "outputs" / run / "data/sum.json").read_text()',
     "stage report reads outputs/smoke/data/sum.json and does not declare it"),
    ('(root() / "data/sample/numbers.txt").open()',
     "stage report reads data/sample/numbers.txt and does not declare it"),
    ('(root() / "outputs" / run / "double/more.json").write_text("1")',
     "stage report writes outputs/smoke/double/more.json"),
])
def test_an_undeclared_read_is_an_error_that_names_file_and_stage(done, creawrite, statement, sentence):
    edit(done / "nbs/03_report.ipynb", 'time.sleep(wait)', f"time.sleep(wait)\\n{json.dumps(statement)[1:-1]}")
    code, _, err = creawrite("run")
    assert code == 1 and sentence in err and "Traceback" not in err
    assert statuses()["report"] == "failed"


def test_a_declared_read_is_none(done, creawrite):
    more = r'total = read_json(stage_dir(run, \"data\") / \"sum.json\")'
    edit(done / "nbs/03_report.ipynb", "time.sleep(wait)", more)
    edit(done / "nbs/03_report.ipynb", 'reads = [', 'reads = [\\"data/*.json\\", ')
    code, _, err = creawrite("run")
    assert code == 0, err


# ---- kept on record

def test_keep_accepts_a_stale_stage_on_record(done, creawrite):
    edit(done / "creawrite/times.py", "a * b", "b * a")
    code, out, _ = creawrite("keep", "smoke", "double", "--why", "multiplication commutes")
    assert code == 0 and "although it changed: code of times" in out and statuses()["double"] == "done"
    assert "multiplication commutes" in why("double")
    entry = runner.read_record("smoke")["stages"]["double"]
    [note] = entry["kept"]
    assert (note["why"], note["changed"]) == ("multiplication commutes", "changed: code of times")
    assert json.loads((done / "outputs/smoke/double/kept.json").read_text()) == entry["kept"]
    edit(done / "creawrite/times.py", "b * a", "1 * b * a")
    assert statuses()["double"] == "stale"
    code, _, _ = creawrite("run", "--only", "double")
    assert code == 0 and "kept" not in runner.read_record("smoke")["stages"]["double"]
    assert not (done / "outputs/smoke/double/kept.json").exists()


@pytest.mark.parametrize("arguments, sentence", [
    (["smoke", "double", "--why", "x"], "stage double of run smoke is done: only a stale one"),
    (["smoke", "double", "--why", " "], "--why is empty"), (["smok", "double", "--why", "x"], "the nearest is 'smoke'"),
    (["smoke", "dubble", "--why", "x"], "the nearest is 'double'")])
def test_keep_refuses(done, creawrite, arguments, sentence):
    code, _, err = creawrite("keep", *arguments)
    assert code == 2 and sentence in err


# ---- a run stands on what it was made with

def test_a_forgotten_option_does_not_replace_own_data(done, creawrite):
    (done / "own").mkdir()
    (done / "own/numbers.txt").write_text("10\n")
    code, out, err = creawrite("run", "--run", "mine", "-p", f"data.source={done / 'own'}")
    assert code == 0 and "run mine, profile smoke, data.source=own" in out and "sum: 17" in out, err
    code, out, _ = creawrite("run", "--run", "mine", "--only", "data")
    assert code == 0 and "unchanged, skipped" in out
    record = runner.read_record("mine")
    assert record["options"] == ["data.source=own"] and record["stages"]["data"]["parameters"]["source"] == "own"


def test_another_data_source_is_refused_unless_told(done, creawrite):
    (done / "own").mkdir()
    (done / "own/numbers.txt").write_text("10\n")
    code, _, err = creawrite("run", "-p", f"source={done / 'own'}")
    assert code == 2 and "data's source 'sample', and this command says 'own'" in err and "--change" in err
    assert json.loads((done / "outputs/smoke/data/sum.json").read_text()) == 10 and set(statuses().values()) == {"done"}
    code, _, _ = creawrite("run", "-p", f"source={done / 'own'}", "--change")
    assert code == 0 and json.loads((done / "outputs/smoke/data/sum.json").read_text()) == 17


def test_another_engine_is_refused_unless_told(done, creawrite, monkeypatch, executed):
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    monkeypatch.setenv("OPENAI_API_KEY", "a-private-key")
    code, _, err = creawrite("run")
    assert code == 2 and "report's engine" in err and "some-model @ api.openai.com" in err and executed == []
    assert creawrite("run", "--change")[0] == 0 and executed == ["report"]


def test_a_run_keeps_its_profile_without_being_told(done, creawrite):
    creawrite("run", "--profile", "other", "--run", "mine", "-p", "seed=3")
    code, out, _ = creawrite("run", "--run", "mine", "-p", "factor=4")
    assert code == 0 and "run mine, profile other, seed=3, factor=4" in out
    assert runner.read_record("mine")["stages"]["data"]["parameters"]["seed"] == 3


def test_a_passing_mode_is_not_inherited(kit):
    (kit / "outputs/mine").mkdir()
    (kit / "outputs/mine/run.json").write_text(json.dumps({"profile": "smoke", "stages": {}}))
    (kit / "outputs/mine/.options.json").write_text('["report.mode=live", "seed=4"]')
    assert runner.plan_run("mine").overrides == ["seed=4"]


def test_an_endpoint_that_is_not_asked_is_told(kit, creawrite, monkeypatch, executed):
    edit(kit / "settings.ini", "seed = 7", "seed = 7\nengine = offline")
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    monkeypatch.setenv("OPENAI_API_KEY", "a-private-key")
    code, out, _ = creawrite("run")
    assert code == 0 and "some-model @ api.openai.com, named in the environment, is not asked" in out


@pytest.mark.parametrize("text", ["calls=3", "requests", "requests=many", "tokens=-1", "requests=3;tokens=4"])
def test_a_budget_that_is_none(kit, creawrite, text):
    code, _, err = creawrite("run", "--budget", text)
    assert code == 2 and err.startswith(f"error: --budget {text}:") and "write requests=N" in err


# ---- nothing missing is final

def test_a_stage_with_missing_answers_is_asked_again_until_kept(done, creawrite, executed):
    from creawrite.ledger import Ledger
    ledger = Ledger(done / "outputs/smoke/ledger.sqlite")
    ledger.put(key="k", engine="e", stage="report", role="judge", request="{}", status="length", reply="", tokens_in=1,
               tokens_out=1, seconds=0.1, missing="judge: cut")
    assert statuses()["report"] == "stale" and why("report") == "answers missing: 1; asked for again"
    assert creawrite("run")[0] == 0 and executed == ["report"]
    assert creawrite("keep", "smoke", "report", "--why", "the engine refuses this one")[0] == 0
    assert statuses()["report"] == "done"


# ---- runs made before

def test_a_run_of_an_earlier_kit_is_understood_and_renumbered(done, creawrite):
    place, record = done / "outputs/smoke", runner.read_record("smoke")
    (place / "02_double.ipynb").rename(place / "05_double.ipynb")
    double = record["stages"]["double"]
    record["stages"]["double"] = {**double, "code": "abc", "notebook": "def", "inputs": {"data": "x"}}
    (place / "run.json").write_text(json.dumps(record))
    assert statuses() == {"data": "done", "double": "stale", "report": "done"} and "earlier version" in why("double")
    code, _, err = creawrite("run")
    assert code == 0, err
    copies = sorted(path.name for path in place.glob("*.ipynb"))
    assert copies == ["01_data.ipynb", "02_double.ipynb", "03_report.ipynb"]


def test_force_redoes_what_a_stage_has_cached(done, creawrite):
    cached = done / "outputs/smoke/double/cache.json"
    cached.write_text("1")
    code, _, _ = creawrite("run", "--only", "double", "--force")
    assert code == 0 and not cached.exists() and statuses()["double"] == "done"


def test_a_forced_stage_that_fails_at_once_keeps_what_it_had(done, creawrite):
    edit(done / "nbs/02_double.ipynb", "scale(read_json", "1 / 0, scale(read_json")
    code, _, _ = creawrite("run", "--only", "double", "--force")
    assert code == 1 and json.loads((done / "outputs/smoke/double/out.json").read_text()) == 30


# ---- killed

def begin(kit: Path, *arguments: str):
    "A runner in a process of its own, once its last stage is at work; and the process number of its kernel."
    log = kit / "outputs/smoke/report/log.txt"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "creawrite.cli", "run", "-p", "wait=3", *arguments]
    runner = subprocess.Popen(command, cwd=kit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not log.is_file() or not log.read_text().endswith("\n"):
        assert runner.poll() is None, runner.stderr.read()
        time.sleep(0.05)
    return runner, int(log.read_text().split()[1])


def gone(pid: int) -> bool:
    "Whether a process ends within ten seconds; a dead one that nobody has waited for counts as ended."
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        zombie = stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
        if zombie or not runner.alive(str(pid)): return True
        time.sleep(0.1)
    return False


def test_kill_9_and_the_same_command_completes(done, creawrite):
    runner, kernel = begin(done)
    assert statuses()["report"] == "running"
    code, _, err = creawrite("run")
    assert code == 1 and "run 'smoke' is in progress" in err
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    code, out, err = creawrite("run", "-p", "wait=3")
    assert code == 0, err
    assert out.count("unchanged, skipped") == 2 and gone(kernel)
    log = [line.split() for line in (done / "outputs/smoke/report/log.txt").read_text().splitlines()]
    assert [(word, pid == str(kernel)) for word, pid in log] == [("begin", True), ("begin", False), ("end", False)]
    assert set(statuses().values()) == {"done"} and not list((done / "outputs").rglob("*.part*"))


def test_ctrl_c(done, creawrite):
    runner, kernel = begin(done)
    runner.send_signal(signal.SIGINT)
    assert runner.wait() == 130 and runner.stderr.read().strip() == "stopped; the same command resumes there"
    assert gone(kernel) and statuses()["report"] == "failed" and why("report") == "interrupted"


# ---- the kit itself

NOTEBOOKS = sorted((REPOSITORY / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_one_parameters_cell_and_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    declared = parameters(tagged[0], path.name)
    assert declared["run"].kind == "str"
    assert all(parameter.kind.partition("[")[0] in KINDS for parameter in declared.values())
    assert len(tagged[0].splitlines()) > 1, "IPython reads a lone `run: str = ...` as its magic %run"
    for cell in cells: assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_every_profile_fits_the_notebooks(profile, monkeypatch):
    monkeypatch.setenv("CREAWRITE_ROOT", str(REPOSITORY))
    plan = make_plan(profile)
    for stage in plan.stages:
        assert stage.reads or stage.name == "laboratory", stage.name  # which makes its own world
        assert bool(read_patterns(plan, stage)) == bool(stage.reads)


def test_the_command_starts_quickly():
    began = time.monotonic()
    code = "import sys, creawrite.cli; print(*{'torch', 'papermill', 'transformers', 'matplotlib'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert told.returncode == 0 and told.stdout.split() == []
    assert time.monotonic() - began < 10
