"README keeps its word: its commands are commands, its Python runs, its files are there."
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ENDPOINT, REPOSITORY

from creawrite.cli import main
from creawrite.core import read_jsonl

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^ *```(\w*)\n(.*?)^ *```", TEXT, re.M | re.S)
LINES = [line.partition(" #")[0].strip() for kind, body in FENCES if not kind for line in body.splitlines()]
COMMANDS = [line.removeprefix(".venv/bin/creawrite ") for line in LINES if line.startswith(".venv/bin/creawrite ")]
PYTHON = [body for kind, body in FENCES if kind == "python"]
# what takes a network, an engine or hours: here it is checked how they are called, other tests run them
HEAVY = {"data fetch", "run", "import", "passport", "serve", "compare", "study new", "study serve", "study report"}


@pytest.fixture
def say(monkeypatch, capsys, no_endpoint):
    "Runs a command in this process: what it says, and its exit code."
    monkeypatch.setenv("CREAWRITE_ROOT", str(REPOSITORY))
    monkeypatch.setenv("CREAWRITE_BUDGET", "")  # so that what --budget sets is gone afterwards
    monkeypatch.delenv("CREAWRITE_BUDGET")

    def run(*words):
        code = 0
        try: main(list(map(str, words)))
        except SystemExit as end: code = end.code or 0
        told = capsys.readouterr()
        return told.out + told.err, code

    return run


def my_csv(path):
    "A reader's table."
    rows = read_jsonl(REPOSITORY / "data/sample/greetings.jsonl")[:60]
    lines = [f'"{row["query"]}","{row[side]}",{label}' for row in rows for side, label in (("good", 1), ("weak", 0))]
    path.write_text("\n".join(["query,response,label", *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command, tmp_path, smoke_run, say):
    words = shlex.split(command)
    name = " ".join(words[:2]) if words[0] in ("data", "ledger", "study", "export") else words[0]
    if name in HEAVY:
        known = say(*name.split(), "--help")[0]
        assert all(word in known for word in words if word.startswith("--")), command
        if name == "run": assert say(*words, "--dry-run")[1] in (0, 1, 2)
        return
    try:
        words = [word.replace("mine", smoke_run) for word in words]
        words = [str(my_csv(tmp_path / "my.csv")) if word == "my.csv" else word for word in words]
        if name == "data import": words += ["--name", "test-readme"]
        words = [str(tmp_path / "out") if word == "DIR" else word for word in words]
        if name in ("audit", "judge"): words += ["--run", "test-readme"]
        told, code = say(*words)
        assert code == 0, told
    finally:
        for name in ("data/own", "outputs"): shutil.rmtree(REPOSITORY / name / "test-readme", ignore_errors=True)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_every_python_example_runs(code, tmp_path, smoke_run):
    my_csv(tmp_path / "my.csv")
    own = {'"smoke"': f'"{smoke_run}"', "]) ": "], run='test-readme') ", '"my.csv"))': '"my.csv"), "test-readme")'}
    if "judge_texts" not in code: own.pop("]) ")
    for old, new in own.items(): code = code.replace(old, new)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT}
    command = [sys.executable, "example.py"]
    try: subprocess.run(command, cwd=tmp_path, env=environment | {"CREAWRITE_ROOT": str(REPOSITORY)}, check=True)
    finally: shutil.rmtree(REPOSITORY / "outputs/test-readme", ignore_errors=True)


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", TEXT): assert (REPOSITORY / target).exists(), target
