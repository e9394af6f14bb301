"""`creawrite plan` and `run --dry-run`: what a run would take and lacks, with nothing done; stages of a profile."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ENDPOINT, REPOSITORY, make_kit, write_notebook

from creawrite import plan as planning
from creawrite import runner
from creawrite.core import KitError
from creawrite.forecast import past_records
from creawrite.groups import dead_groups_forecast, dead_groups_sentence
from creawrite.settings import make_plan, unexported
from creawrite.shapes import QWEN_SHAPES, hub_shape, n_parameters
from creawrite.workload import SOURCES


def tree(folder) -> dict:
    "Every file below a folder with its time and size."
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def append(path, text: str): path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.fixture
def real(tmp_path, monkeypatch, no_endpoint):
    "The real kit's notebooks, settings and reference runs, in a folder of its own with no other run."
    for name in ("nbs", "creawrite", "outputs/reference", "data"):
        ignored = shutil.ignore_patterns("__pycache__", ".*", "released")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    shutil.copy(REPOSITORY / "settings.ini", tmp_path)
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A throwaway kit after `creawrite run`."
    folder = make_kit(tmp_path_factory.mktemp("finished") / "kit")
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT}
    done = subprocess.run([sys.executable, "-m", "creawrite.cli", "run"], cwd=folder, capture_output=True, text=True,
                          env=environment | {"CREAWRITE_ROOT": str(folder)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def done(finished, tmp_path, monkeypatch, no_endpoint):
    "A copy of it."
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.fixture
def executed(monkeypatch) -> list:
    "The names of stages that would have been executed, without kernels."
    names = []
    monkeypatch.setattr(runner, "execute", lambda plan, stage, descriptor, say: names.append(stage.name))
    return names


def cells(out: str) -> dict:
    "stage -> its line of a plan that was printed."
    return {line.split()[0]: line for line in out.splitlines() if line and not line.startswith(" ")}


# ---- every profile

@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_a_plan_of_every_profile(real, creawrite, profile):
    "Every stage has its line, nothing is written, and what this machine lacks is named."
    before = tree(real)
    code, out, err = creawrite("plan", profile)
    assert (code, err) == (0, "")
    assert tree(real) == before
    assert set(cells(out)) >= {stage.name for stage in make_plan(profile).stages}
    released = "of the 7 released files: creawrite data fetch" in out
    assert released == (profile != "smoke")
    assert ("GPUs: grpo wants" in out) == (profile in ("gpu", "paper") and not runner.hardware()["gpus"])
    assert ("is not in the hub's cache" in out) == (profile in ("gpu", "paper"))


def test_a_dry_run_says_the_same(kit, creawrite):
    before = tree(kit)
    code, dry, err = creawrite("run", "--dry-run", "-p", "double.factor=5")
    assert (code, err) == (0, "") and tree(kit) == before
    assert creawrite("plan", "smoke", "-p", "double.factor=5")[1] == dry
    assert "factor=5" in dry.splitlines()[0] and dry.count("not run yet") == 3


def test_a_plan_imports_no_weights():
    "Neither torch nor transformers: it is there to be quick."
    script = ("import sys, creawrite.cli as cli\ntry: cli.main(['plan', 'paper'])\nexcept SystemExit: pass\n"
              "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "in all" in done.stdout, done.stderr


def test_usage(kit, creawrite):
    code, out, err = creawrite("plan", "smok")
    assert code == 2 and "settings.ini has no profile 'smok'; the nearest is 'smoke'" in err and not out
    assert creawrite("plan", "smoke", "--only", "x")[0] == 2
    assert creawrite("plan", "smoke", "--only", "data", "--from", "data")[0] == 2
    assert creawrite("plan", "--run", "../x")[0] == 2


# ---- what runs, and why

def test_what_runs_after_a_run(done, creawrite):
    assert cells(creawrite("plan")[1])["in"].split()[2:4] == ["0", "run"]
    out = creawrite("plan", "-p", "double.factor=4")[1]
    assert "unchanged" in cells(out)["data"] and "parameters factor" in cells(out)["double"]
    assert "reads double" in cells(out)["report"]
    assert "redone" in cells(creawrite("plan", "--force")[1])["data"]
    later = cells(creawrite("plan", "--from", "double")[1])
    assert "not looked at" in later["data"] and "redone" in later["double"]
    before = tree(done)
    creawrite("run", "--dry-run", "--force")
    assert tree(done) == before


def test_time_is_that_of_an_earlier_run_of_the_same_sizes(done, creawrite):
    record = json.loads((done / "outputs/smoke/run.json").read_text())["stages"]
    same, other = make_plan("smoke", "two"), make_plan("smoke", "two", ["double.factor=9"])
    double = next(stage for stage in same.stages if stage.name == "double")
    assert planning.past_seconds(same, double, past_records()) == (record["double"]["seconds"], "smoke")
    assert math.isnan(planning.past_seconds(other, double, past_records())[0])
    assert "time of data, double, report: as in smoke" in creawrite("plan", "smoke", "--run", "two")[1]


# ---- what is missing

def missing(out: str) -> list[str]:
    "The sentences at the end of a plan."
    return [line.strip() for line in out.partition("missing:\n")[2].splitlines() if not line.startswith("  package:")]


def test_missing_key_and_price(real, creawrite, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    [engine] = missing(creawrite("plan", "smoke", "-p", "engine=endpoint")[1])
    assert engine == "engine: an endpoint is set but no key: export OPENAI_API_KEY (any word for a local server), " \
                     "or run with engine=offline"
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    out = creawrite("plan", "smoke", "-p", "engine=endpoint")[1]
    [cost] = missing(out)
    assert "[prices] has no row for some-model" in cost and "more than" in cells(out)["multi_agent"]
    append(real / "settings.ini", "\nsome-model = 1, 2\n")
    out = creawrite("plan", "smoke", "-p", "engine=endpoint")[1]
    table = planning.table_plan(make_plan("smoke", overrides=["engine=endpoint"])).set_index("stage")
    assert not missing(out) and table.money.multi_agent > 0 and table.money.sft == 0


def test_missing_weights(real, creawrite, monkeypatch):
    [told] = missing(creawrite("plan", "smoke", "-p", "sft.model=Qwen/Qwen2.5-0.5B-Instruct")[1])
    assert told == ("weights: sft.model = Qwen/Qwen2.5-0.5B-Instruct, 1.0 GB is not in the hub's cache, and the hub "
                    "may not be asked: download it first, or set offline = false")
    (real / "half").mkdir()
    config = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=64, tie_word_embeddings=True)
    (real / "half/config.json").write_text(json.dumps(config))
    assert missing(creawrite("plan", "smoke", "-p", "sft.model=half")[1]) == [
        "weights: sft.model = half: that folder holds no whole model"]
    assert n_parameters(hub_shape("half")) == 32 * 100 + (2 * 32**2 + 2 * 32 * 16 + 32 + 32 + 3 * 32 * 64 + 64) + 32
    (real / "half/model.safetensors").touch()
    assert not missing(creawrite("plan", "smoke", "-p", "sft.model=half")[1])


def test_missing_data(real, creawrite):
    assert missing(creawrite("plan", "smoke", "-p", "source=nowhere")[1]) == [
        "data: data reads nowhere, which is not there"]
    assert missing(creawrite("plan", "smoke", "--only", "audit")[1]) == [
        "data: audit reads what data would write, which neither is there nor will be: run those stages, too"]
    manifest = json.loads((real / "data/manifest.json").read_text())["files"]
    for name, facts in manifest.items():  # sparse files of the right size
        path = real / "data/released" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file: file.truncate(facts["bytes"])
    assert not missing(creawrite("plan", "cpu")[1])
    os.truncate(path, 5)
    assert "data: 1 of the 7 released files" in missing(creawrite("plan", "cpu")[1])[0]


def test_missing_gpus_vllm_and_room(real):
    plan = make_plan("paper")
    here = planning.Machine(2, 2**30, [], True, True)
    told = planning.missing_gpus(plan, plan.stages, here)
    assert told[0] == "GPUs: grpo wants 4, and this machine has none"
    assert planning.missing_gpus(plan, plan.stages, here._replace(gpus=["A, 81920 MiB"] * 4)) == told[1:]
    shared, alone = (planning.table_plan(each).set_index("stage").memory.grpo
                     for each in (plan, make_plan("paper", overrides=["grpo.accelerate_config="])))
    assert shared < 80e9 < alone  # FSDP shares the weights between the GPUs
    table = planning.table_plan(make_plan("paper", overrides=["grpo.accelerate_config="]))
    assert any("of a GPU, and the paper's GPUs have" in each for each in planning.missing_room(table, here))
    small = planning.missing_room(table, here._replace(gpus=["A, 8192 MiB"]))
    assert any("memory: sft takes" in each and "this one has 8.0" in each for each in small)


# ---- the forecast itself

def test_rows_of_our_sample_are_as_the_plan_has_them():
    from creawrite.data import read_sample, sample_splits
    assert SOURCES["sample"][0] == {name: len(rows) for name, rows in sample_splits(read_sample()).items()}


def test_further_seeds_cost_what_they_cost(real):
    if "seeds" not in make_plan("cpu").stages[6].parameters: pytest.skip("stage grpo has no seeds")
    one, three = (planning.table_plan(make_plan("cpu", overrides=[f"grpo.seeds={seeds}"])).set_index("stage")
                  for seeds in ("[]", "[43, 44]"))
    assert three.steps.grpo == 2 * one.steps.grpo  # four runs, and two of them twice more
    assert three.disk.grpo > one.disk.grpo and three.calls.grpo > one.calls.grpo


def test_known_shapes():
    "Parameters as the model cards give them."
    assert [round(n_parameters(shape) / 1e9, 2) for shape in QWEN_SHAPES.values()] == [0.49, 1.54, 3.09, 7.62]


def test_from_scratch_shapes_are_those_that_are_built():
    from creawrite.policies import new_model, train_tokenizer
    from creawrite.shapes import policy_shape
    tokenizer = train_tokenizer([[{"role": "user", "content": "祝你生日快乐"}]], 300)
    shape = dict(hidden=64, layers=2, heads=4, intermediate=192)
    built = new_model(tokenizer, seed=1, **shape)
    told = policy_shape(dict(model="", vocabulary=len(tokenizer), **shape))
    assert built.num_parameters() == n_parameters(told)


def test_dead_groups():
    "6 % good samples in groups of 4: 78 % teach nothing, and more where prompts differ."
    table = dead_groups_forecast(6, 100, 4).set_index("option")
    assert table.dead["as set"] == pytest.approx(0.7808, abs=1e-4)
    assert table.dead["groups of 16"] < table.dead["groups of 8"] < table.dead["as set"]
    unequal = dead_groups_forecast([6] + [0] * 9, [10] * 10, 4)
    assert unequal.dead[0] > 0.9
    assert "at least 78 %" in dead_groups_sentence(dead_groups_forecast(6, 100, 4))
    with pytest.raises(KitError, match="no more good ones"): dead_groups_forecast(7, 6, 4)


# ---- stages that a profile names

@pytest.fixture
def few(kit):
    "A kit with a profile that runs two of three stages."
    append(kit / "settings.ini", '\n[few]\nstages = ["double", "data"]\nseed = 3\n')
    return kit


def test_a_profile_runs_the_stages_that_it_names(few, creawrite, executed):
    assert cells(creawrite("plan", "few")[1])["in"].split()[2:4] == ["2", "run"]
    code, out, err = creawrite("run", "--profile", "few")
    assert (code, err) == (0, "") and "[ 1/2] data" in out and "[ 2/2] double" in out
    assert executed == ["data", "double"]
    assert list(runner.table_status("few").stage) == ["data", "double"]
    creawrite("run", "--profile", "few", "--only", "double")
    creawrite("run", "--profile", "few", "--from", "double")
    assert executed == ["data", "double", "double", "double"]


def test_a_run_keeps_the_record_of_stages_left_out_later(kit, creawrite, executed):
    assert creawrite("run", "--profile", "other")[0] == 0
    append(kit / "settings.ini", '\nstages = ["data", "double"]\n')
    assert creawrite("run", "--profile", "other", "--force")[0] == 0
    assert list(json.loads((kit / "outputs/other/run.json").read_text())["stages"]) == ["data", "double", "report"]


@pytest.mark.parametrize("arguments", [["--only", "report"], ["--from", "report"], ["-p", "report.wait=1"]])
def test_a_stage_left_out_is_refused(few, creawrite, arguments):
    code, _, err = creawrite("run", "--profile", "few", *arguments)
    assert code == 2 and "profile few does not run stage report, only data, double: name it under stages" in err


@pytest.mark.parametrize("lines, sentence", [
    ('stages = ["dubble"]', "no stage 'dubble' in nbs; the nearest is 'double'"),
    ("stages = data", "settings.ini [bad]: stages = 'data' is not a JSON list"),
    ("stages = []", "settings.ini [bad]: stages names none"),
    ('stages = ["data"]\n[bad.double]\nfactor = 1', "profile bad does not run stage double, only data"),
    ('stages = ["data"]\nfactor = 1', "settings.ini [bad]: stage data has no parameter 'factor'"),
])
def test_stages_that_cannot_be_named(kit, creawrite, lines, sentence):
    append(kit / "settings.ini", f"\n[bad]\n{lines}\n")
    code, _, err = creawrite("plan", "bad")
    assert code == 2 and sentence in err


# ---- hints

@pytest.mark.parametrize("option, hint", [
    ("sft.num_generations=8", "stage sft has no parameter 'num_generations'; write grpo.num_generations"),
    ("lr=1", "no stage has a parameter 'lr'; perhaps "),
    ("grpo.kl=1", "stage grpo has no parameter 'kl'; perhaps beta"),
    ("zzzzzz=1", "what can be set stands in the parameters cell of each notebook"),
])
def test_far_names_get_a_hint(real, creawrite, option, hint):
    code, _, err = creawrite("plan", "smoke", "-p", option)
    assert code == 2 and hint in err and len(err) < 500


# ---- notebooks that were not exported

def test_status_tells_of_a_notebook_that_was_not_exported(done, creawrite):
    (done / "nbs/lib").mkdir()
    shutil.copy(REPOSITORY / "nbs/lib/budget.ipynb", done / "nbs/lib")
    assert not unexported() and "exported" not in creawrite("status")[1]
    path = done / "nbs/lib/budget.ipynb"
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace("retries: NonNegativeInt = 8", "retries: NonNegativeInt = 9"), encoding="utf-8")
    assert unexported() == ["nbs/lib/budget.ipynb"]
    assert "edited and not exported: nbs/lib/budget.ipynb" in creawrite("status")[1]
    assert "warning: edited and not exported" in creawrite("run")[1]


def test_a_cell_taken_away_is_noticed(kit):
    (kit / "nbs/lib").mkdir()
    notebook = json.loads((REPOSITORY / "nbs/lib/budget.ipynb").read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if "def told_budget" in "".join(cell["source"]))
    notebook["cells"].remove(first)
    (kit / "nbs/lib/budget.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    assert unexported() == ["nbs/lib/budget.ipynb"]


def test_a_stage_notebook_without_a_module_is_none(kit):
    write_notebook(kit / "nbs/04_more.ipynb", 'run: str = "lab"', "reads = []", "#| export\nx = 1", "x")
    assert unexported() == []
