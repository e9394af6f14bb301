"The whole kit as its user runs it: end to end, killed and resumed, exported, packaged."
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import REPOSITORY, kit_command

OUTPUTS = REPOSITORY / "outputs"
TABLES = ["table1", "table2", "table3", "table4", "table_rewards", "audit_a1"]


def tracked(*patterns):
    "Files that git tracks."
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in listed.split("\0") if name]


def wait_for(process, line, seconds=0.0):
    "Read a process's output up to a line, then let it go on for a while."
    for told in process.stdout:
        if line in told: break
    else: pytest.fail(f"{line!r} never came")
    try: process.wait(seconds)
    except subprocess.TimeoutExpired: pass


def test_smoke_ends_with_every_table_and_says_where_it_lies(smoke_run):
    process = kit_command("run", "--profile", "smoke", "--run", smoke_run)
    told = process.communicate()[0]
    assert process.returncode == 0 and "everything lies in outputs/test-smoke/" in told
    assert all(f"Table {n}." in told for n in range(1, 5)) and "offline rulebook engine (not an LLM)" in told
    assert told.count("unchanged, skipped") == 11, "a second run has nothing to do"


def test_every_table_has_three_formats_and_every_figure_two(smoke_run):
    paper = OUTPUTS / smoke_run / "paper"
    for name in TABLES:
        assert {path.suffix for path in paper.glob(f"{name}.*")} == {".csv", ".md", ".tex"}
        assert r"\toprule" in (paper / f"{name}.tex").read_text() and not pd.read_csv(paper / f"{name}.csv").empty
    for name in ("figure2", "figure_training", "figure_excellence"):
        assert (paper / f"{name}.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (paper / f"{name}.svg").read_text()


def test_every_rate_has_an_interval_that_holds_it(smoke_run):
    for name in ("frameworks", "excellence"):
        table = pd.read_csv(OUTPUTS / smoke_run / "evaluate" / f"{name}.csv").dropna(subset="value")
        assert len(table) and table.eval("0 <= low <= value <= high <= 1").all() and (table.low < table.high).any()
    frameworks = pd.read_csv(OUTPUTS / smoke_run / "evaluate" / "frameworks.csv")
    assert {"length only", "multi_agent", "adversarial"} <= set(frameworks.evaluator) and frameworks.slice.nunique() == 4


def test_the_four_rl_policies_learned_from_where_they_should(smoke_run):
    for policy, reward in ((p, r) for p in ("base", "sft") for r in ("rm", "judge")):
        facts = json.loads((OUTPUTS / smoke_run / "grpo" / f"{policy}-{reward}" / "policy.json").read_text())
        assert facts["parent"] == policy


def test_no_pickle_among_the_artifacts(smoke_run):
    kinds = {path.suffix for path in (OUTPUTS / smoke_run).rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert kinds <= {".ipynb", ".jsonl", ".json", ".csv", ".md", ".tex", ".svg", ".png", ".html", ".safetensors", ".sqlite", ".sqlite-wal", ".sqlite-shm", ".jinja"}


def test_executed_notebooks_are_whole_and_name_no_machine(smoke_run):
    notebooks = sorted((OUTPUTS / smoke_run).glob("*.ipynb"))
    assert len(notebooks) == 11
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
    told = process.communicate()[0]
    assert process.returncode == 0, told
    for name in TABLES:
        for suffix in ("csv", "md", "tex"):
            one, other = ((OUTPUTS / run / "paper" / f"{name}.{suffix}").read_text() for run in (smoke_run, "test-killed"))
            assert one == other, f"{name}.{suffix}"
    assert not [path for path in (OUTPUTS / "test-killed").rglob("*.part*")]
    shutil.rmtree(OUTPUTS / "test-killed")


def test_a_broken_row_of_ones_own_data_is_named(tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"id": "1", "query": "生日", "response": "愿笑声比蜡烛多"}\n{"id": "2", "query": "中秋", "resp', encoding="utf-8")
    process = kit_command("run", "--profile", "smoke", "--run", "test-broken", "--only", "data", "-p", f"data.source={tmp_path}")
    told = process.communicate()[0]
    shutil.rmtree(OUTPUTS / "test-broken", ignore_errors=True)
    assert process.returncode == 1 and "sft.jsonl, row 2" in told and "Traceback" not in told


def test_notebooks_and_package_say_the_same(tmp_path):
    for path in tracked("nbs", "creawrite", "pyproject.toml", "settings.ini", "README.md"):
        copy = tmp_path / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    tools = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export(); nbdev_clean()"
    subprocess.run([sys.executable, "-c", tools], cwd=tmp_path, check=True)
    for path in tracked("nbs", "creawrite"): assert (tmp_path / path.relative_to(REPOSITORY)).read_bytes() == path.read_bytes(), f"run nbdev-export and nbdev-clean: {path.name}"


def test_one_set_of_pins_everywhere():
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#"))
    listed = re.findall(r"- ([\w-]+)==(\S+)", (REPOSITORY / "environment.yml").read_text())
    assert {name for name, _ in listed} >= {"jupyterlab", "papermill", "nbdev", "torch", "transformers", "trl", "peft", "vllm", "openai", "seaborn"}
    assert all(pins[name] == version for name, version in listed)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["docs"]]
    assert {name.lower() for name in wanted} <= {name.lower() for name in pins}


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
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if len(word) > 3 and word in text], path


@pytest.mark.released
def test_reference_results_hold_no_released_row():
    folder = next((f for f in (REPOSITORY / "data/released", REPOSITORY.parent / "shared/released") if (f / "sft").is_dir()), None)
    if folder is None: pytest.skip("no released data")
    from creawrite.data import released_splits, responses
    rows = [row for split in released_splits(folder).values() for row in split]
    known = {text for row in rows for text in responses(row) if len(text) >= 12}
    for path in tracked("outputs", "data/sample", "data/probe", "tests", "nbs", "docs", "README.md"):
        if path.suffix in (".png",): continue
        text = path.read_text(encoding="utf-8")
        found = [line for line in re.split(r'[\n"|,]', text) if line.strip() in known]
        assert not found, path
