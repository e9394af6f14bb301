"The whole kit as its user runs it: end to end, killed and resumed, exported, packaged."
import json
import lzma
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import REPOSITORY, kit_command

STAGES = sorted(path.stem for path in (REPOSITORY / "nbs").glob("[0-9][0-9]_*.ipynb"))
OUTPUTS = REPOSITORY / "outputs"
TABLES = ["table1", "table2", "table3", "table4", "table_rewards", "audit_a1"]


def tracked(*patterns):
    "Files that git tracks."
    command = ["git", "ls-files", "-z", *patterns]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in listed.split("\0") if name]


def text_in(path) -> str:
    "What a tracked file says, packed or not."
    return (lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")).read()


def wait_for(process, line, seconds=0.0):
    "Read a process's output up to a line, then let it go on for a while."
    for output in process.stdout:
        if line in output: break
    else: pytest.fail(f"{line!r} never came")
    try: process.wait(seconds)
    except subprocess.TimeoutExpired: pass


def test_smoke_ends_with_every_table_and_says_where_it_lies(smoke_run):
    process = kit_command("run", "--profile", "smoke", "--run", smoke_run)
    output = process.communicate()[0]
    assert process.returncode == 0 and "everything lies in outputs/test-smoke/" in output
    assert all(f"Table {n}." in output for n in range(1, 5)) and "offline rulebook engine (not an LLM)" in output
    assert len(STAGES) >= 9 and output.count("unchanged, skipped") == len(STAGES), "a second run has nothing to do"


def test_every_table_has_three_formats_and_every_figure_two(smoke_run):
    paper = OUTPUTS / smoke_run / "paper"
    for name in TABLES:
        assert {path.suffix for path in paper.glob(f"{name}.*")} == {".csv", ".md", ".tex"}
        assert r"\toprule" in (paper / f"{name}.tex").read_text() and not pd.read_csv(paper / f"{name}.csv").empty
    for name in ("figure2", "figure_training", "figure_excellence"):
        assert (paper / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (paper / f"{name}.svg").read_text()


def test_every_rate_has_an_interval_that_holds_it(smoke_run):
    for name in ("frameworks", "excellence"):
        table = pd.read_csv(OUTPUTS / smoke_run / "evaluate" / f"{name}.csv").dropna(subset="value")
        assert len(table) and table.eval("0 <= low <= value <= high <= 1").all() and (table.low < table.high).any()
    frameworks = pd.read_csv(OUTPUTS / smoke_run / "evaluate" / "frameworks.csv")
    assert {"length only", "multi_agent", "adversarial"} <= set(frameworks.evaluator)
    assert frameworks.slice.nunique() == 4


def test_the_four_rl_policies_learned_from_where_they_should(smoke_run):
    for policy, reward in product(("base", "sft"), ("rm", "judge")):
        facts = json.loads((OUTPUTS / smoke_run / "grpo" / f"{policy}-{reward}" / "policy.json").read_text())
        assert facts["parent"] == policy


def test_no_pickle_among_the_artifacts(smoke_run):
    paths = [path for path in (OUTPUTS / smoke_run).rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {path.suffix for path in paths} <= {
        ".ipynb", ".jsonl", ".json", ".csv", ".md", ".tex", ".svg", ".png", ".html", ".safetensors", ".jinja",
        ".sqlite", ".sqlite-wal", ".sqlite-shm", ".parquet", ".yaml", ".toml", ".py", ".sh"}


def test_executed_notebooks_are_whole_and_name_no_machine(smoke_run):
    notebooks = sorted((OUTPUTS / smoke_run).glob("*.ipynb"))
    assert [path.stem for path in notebooks] == STAGES
    for path in notebooks:
        nbformat.validate(nbformat.read(path, 4))
        assert str(REPOSITORY) not in path.read_text(encoding="utf-8")


def test_killed_in_three_stages_it_ends_with_the_same_tables(smoke_run):
    "Seeds make two CPU runs agree, and nothing of a killed stage is left or counted twice."
    shutil.rmtree(OUTPUTS / "test-killed", ignore_errors=True)
    command = ("run", "--profile", "smoke", "--run", "test-killed")
    for stage in ("multi_agent", "sft", "grpo"):
        process = kit_command(*command)
        wait_for(process, f"] {stage} …", 4)
        assert process.poll() is None, f"{stage} was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = kit_command(*command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    for name, suffix in product(TABLES, ("csv", "md", "tex")):
        undisturbed = (OUTPUTS / smoke_run / "paper" / f"{name}.{suffix}").read_text()
        killed = (OUTPUTS / "test-killed" / "paper" / f"{name}.{suffix}").read_text()
        assert killed == undisturbed, f"{name}.{suffix}"
    assert not [path for path in (OUTPUTS / "test-killed").rglob("*.part*")]
    shutil.rmtree(OUTPUTS / "test-killed")


def test_a_broken_row_of_ones_own_data_is_named(tmp_path):
    whole, torn = '{"id": "1", "query": "生日", "response": "愿笑声比蜡烛多"}', '{"id": "2", "query": "中秋", "resp'
    (tmp_path / "sft.jsonl").write_text(f"{whole}\n{torn}", encoding="utf-8")
    process = kit_command("run", "--profile", "smoke", "--run", "test-broken", "--only", "data",
                          "-p", f"data.source={tmp_path}")
    output = process.communicate()[0]
    shutil.rmtree(OUTPUTS / "test-broken", ignore_errors=True)
    assert process.returncode == 1 and "sft.jsonl, row 2" in output and "Traceback" not in output


def test_notebooks_and_package_say_the_same(tmp_path):
    for path in tracked("nbs", "pyproject.toml", "settings.ini", "README.md", "creawrite/__init__.py"):
        copy = tmp_path / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    imports = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export"
    subprocess.run([sys.executable, "-c", f"{imports}; nbdev_export(); nbdev_clean()"], cwd=tmp_path, check=True)
    names = {path.relative_to(REPOSITORY).as_posix() for path in tracked("nbs", "creawrite")}
    assert {"nbs/lib/core.ipynb", "creawrite/core.py", "nbs/01_data.ipynb", "creawrite/data.py"} <= names
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("creawrite/*.py")} <= names
    for name in names:
        assert (tmp_path / name).is_file(), f"{name} comes from no notebook"
        same = (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
        assert same, f"run nbdev-export and nbdev-clean: {name}"


def test_one_set_of_pins_everywhere():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    listed = dict(re.findall(r"- ([\w-]+)==(\S+)", (REPOSITORY / "environment.yml").read_text()))
    assert set(listed) >= {"jupyterlab", "papermill", "nbdev", "torch", "transformers", "trl", "peft", "vllm",
                           "openai", "seaborn"}
    assert all(pins[name] == version for name, version in listed.items())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["docs"]
    assert {re.match(r"[\w-]+", line)[0].lower() for line in wanted} <= {name.lower() for name in pins}


@pytest.mark.parametrize("script, sentence", [
    ('case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac', "needs Python 3.11 or newer"),
    ('case "$2" in *ensurepip*) exit 1;; esac', "no venv module")])
def test_make_says_what_is_missing(tmp_path, script, sentence):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"): shutil.copyfile(REPOSITORY / name, tmp_path / name)
    done = subprocess.run(["make", "-C", str(tmp_path), "paper", f"PYTHON={python}"], capture_output=True, text=True)
    assert done.returncode and sentence in done.stderr and not (tmp_path / ".venv").exists()


def test_the_project_names_no_machine():
    words = [str(REPOSITORY), str(Path.home()) + "/"]
    for path in tracked():
        if path.suffix in (".png", ".parquet"): continue
        text = text_in(path)
        assert not [word for word in words if len(word) > 3 and word in text], path


@pytest.mark.released
def test_reference_results_hold_no_released_row():
    folders = REPOSITORY / "data/released", REPOSITORY.parent / "shared/released"
    folder = next((folder for folder in folders if (folder / "sft").is_dir()), None)
    if folder is None: pytest.skip("no released data")
    from creawrite.data import released_splits
    from creawrite.splits import responses
    rows = [row for split in released_splits(folder).values() for row in split]
    known = {text for row in rows for text in responses(row) if len(text) >= 12}
    for path in tracked("outputs", "data/sample", "data/probe", "data/recorded", "tests", "nbs", "docs", "README.md"):
        if path.suffix in (".png",): continue
        assert not [line for line in re.split(r'[\n"|,\\]', text_in(path)) if line.strip() in known], path
