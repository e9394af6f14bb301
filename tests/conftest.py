"""A throwaway kit of three stages, run by the real papermill, for every test of the runner."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).resolve().parents[1]
ENDPOINT = ["OPENAI_BASE_URL", "OPENAI_API_KEY", "CREAWRITE_MODEL", "URL", "MODEL", "AUTHORIZATION"]
SETTINGS = """
[smoke]
description = three stages  # that take a second each
offline = true
seed = 7

[smoke.double]
factor = 3

[other]
"""
STAGES = {
    "01_data": ["""
run: str = "lab"
source: str = "sample"  # folder under data/
seed: int = 1
kinds: list[str] = ["a"]  # 种类
strict: bool = False
""", 'reads = ["./data/{source}/"]', """
from creawrite.core import root, stage_dir, write_json
""", """
numbers = [int(line) for line in (root() / "data" / source / "numbers.txt").read_text().split()]
write_json(stage_dir(run, "data") / "sum.json", sum(numbers) + seed)
print("sum:", sum(numbers) + seed)
"""],
    "02_double": ['run: str = "lab"\nfactor: float = 2', 'reads = ["data/sum.json"]', """
from creawrite.helper import scale
from creawrite.core import read_json, stage_dir, write_json
""", """
write_json(stage_dir(run, "double") / "out.json", scale(read_json(stage_dir(run, "data") / "sum.json"), factor))
"""],
    "03_report": ['run: str = "lab"\nengine: str = "auto"\nwait: float = 0', 'reads = ["double/out.json"]', """
import os, sys, time
from creawrite.core import KitError, atomic, read_json, root, stage_dir
""", """
folder = stage_dir(run, "report")
with (folder / "log.txt").open("a") as log: print("begin", os.getpid(), file=log)
time.sleep(wait)
if (root() / "broken").exists(): raise KitError(f"{root() / 'broken'} is in the way: remove it")
if (root() / "bug").exists(): 1 / 0
if (root() / "deadly").exists(): os.kill(os.getpid(), 9)
with atomic(folder / "report.txt") as part: part.write_text(str(read_json(stage_dir(run, "double") / "out.json")))
with (folder / "log.txt").open("a") as log: print("end", os.getpid(), file=log)
print(os.environ.get("DEMO_TOKEN"), os.environ.get("AUTHORIZATION"), "sk-abcdefgh12345678", root(), file=sys.stderr)
bearer = os.environ.get("AUTHORIZATION", "").removeprefix("Bearer ")
print(os.environ.get("DEMO_TOKEN"), bearer, root() / "outputs", os.environ.get("HF_HUB_OFFLINE"))
[sys.executable, os.environ["PATH"].split(os.pathsep)[0], os.environ["IN_TEST"]]
"""],
}


def write_notebook(path: Path, parameters: str, reads: str, *sources: str):
    "A notebook with a parameters cell, a reads cell, and a heading above the last cell."
    code = dict(cell_type="code", execution_count=None, outputs=[])
    cells = [code | dict(id=f"cell-{i}", metadata={}, source=source.strip())
             for i, source in enumerate((parameters, reads, *sources))]
    cells[0]["metadata"]["tags"], cells[1]["metadata"]["tags"] = ["parameters"], ["reads"]
    cells.insert(-1, dict(cell_type="markdown", id="heading", metadata={}, source="## Run"))
    metadata = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    notebook = dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def make_kit(folder: Path) -> Path:
    "A kit with its own copy of the package."
    for name in ("nbs", "data/sample", "outputs"): (folder / name).mkdir(parents=True)
    (folder / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    (folder / "data/sample/numbers.txt").write_text("1\n2\n")
    for name, cells in STAGES.items(): write_notebook(folder / "nbs" / f"{name}.ipynb", *cells)
    shutil.copytree(REPOSITORY / "creawrite", folder / "creawrite", ignore=shutil.ignore_patterns("__pycache__"))
    helper = "from creawrite.times import times\n\n\ndef scale(value, factor): return times(value, factor)\n"
    (folder / "creawrite/helper.py").write_text(helper + "\n\ndef figure(): return 'red'\n")
    (folder / "creawrite/times.py").write_text("# a comment\ndef times(a, b): return a * b\n")
    return folder


@pytest.fixture
def no_endpoint(monkeypatch):
    "No LLM endpoint in the environment."
    for name in ENDPOINT: monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kit(tmp_path, monkeypatch, no_endpoint) -> Path:
    "A fresh kit that no command has touched."
    monkeypatch.setenv("CREAWRITE_ROOT", str(make_kit(tmp_path / "kit")))
    return tmp_path / "kit"


@pytest.fixture
def creawrite(capfd):
    "Call the command line in this process: exit code, standard output, standard error."
    from creawrite.cli import main

    def call(*arguments: str):
        capfd.readouterr()
        try: main(list(arguments))
        except SystemExit as ended: return ended.code or 0, *capfd.readouterr()

    return call


def kit_command(*arguments: str, endpoint: dict = {}, **options) -> subprocess.Popen:
    "The kit's own command line in a process of its own; no endpoint is in its environment but the one given."
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT + ["CREAWRITE_ROOT"]}
    environment |= endpoint
    command = [sys.executable, "-m", "creawrite.cli", *arguments]
    streams = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **streams, **options)


@pytest.fixture(scope="session")
def smoke_run() -> str:
    "The name of a finished smoke run of the real kit, under outputs/; an unchanged one is used again."
    with FileLock(REPOSITORY / "outputs/.test-smoke.lock"):  # tests run in several processes
        process = kit_command("run", "--profile", "smoke", "--run", "test-smoke")
        told = process.communicate()[0]
    assert process.returncode == 0, told
    return "test-smoke"


LONGEST = ("test_site", "test_local", "test_kit", "test_passport", "test_training", "test_grpo", "test_resume",
           "test_edits")  # begun first, so that no worker ends alone with one


def pytest_collection_modifyitems(items):
    "Files that take minutes go first; the others keep their order."
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
