"The law of the house: who may see whom, one name for one thing, one place for a default, readable lines."
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from creawrite.settings import stages

STAGES = {path.stem[3:]: path for path in sorted((REPOSITORY / "nbs").glob("[0-9][0-9]_*.ipynb"))}
LIBRARIES = {path.stem: path for path in sorted((REPOSITORY / "nbs/lib").glob("*.ipynb"))}
MODULES = {path.stem: path for path in sorted((REPOSITORY / "creawrite").glob("[!_]*.py"))}
NOTEBOOKS = STAGES | LIBRARIES | {"index": REPOSITORY / "nbs/index.ipynb"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def imported(source: str) -> set[str]:
    "Modules of the package that a source imports, inside functions too."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            place = ".".join(filter(None, ["creawrite" if node.level else "", node.module]))
            names |= {place} | {f"{place}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("creawrite.")}


def tree(module: str) -> ast.Module: return ast.parse(MODULES[module].read_text(encoding="utf-8"))


# ---- who sees whom

def test_every_module_is_a_room():
    assert set(MODULES) == set(STAGES) | set(LIBRARIES)


def test_nobody_imports_a_stage():
    "Not in a module, and not in a cell of a notebook, tests among them; the command line alone may."
    for name, notebook in NOTEBOOKS.items():
        for source in code_cells(notebook):
            seen = imported(source) & set(STAGES)
            assert not seen or name == "cli", f"{notebook.name} imports {seen}"


def test_no_circle_of_imports():
    graph = {name: imported(path.read_text(encoding="utf-8")) & set(MODULES) for name, path in MODULES.items()}
    done = set()
    while layer := {name for name, seen in graph.items() if name not in done and seen <= done}: done |= layer
    assert done == set(graph), f"these import each other in a circle: {sorted(set(graph) - done)}"


def test_core_stands_on_nothing():
    assert imported(MODULES["core"].read_text(encoding="utf-8")) == set()


# ---- names

def public_names(module: str) -> set[str]:
    names = set()
    for node in tree(module).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)): names.add(node.name)
        if isinstance(node, ast.Assign): names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_one_name_one_meaning():
    homes = {}
    for module in MODULES:
        for name in public_names(module): homes.setdefault(name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_a_default_stands_once():
    "In the parameters cell: no function of a stage repeats it."
    for stage in stages():
        if stage.name not in MODULES: continue
        for node in ast.walk(tree(stage.name)):
            if not isinstance(node, FUNCTIONS): continue
            last = node.args.args[len(node.args.args) - len(node.args.defaults):]
            keyword = [each for each, value in zip(node.args.kwonlyargs, node.args.kw_defaults) if value]
            repeated = {each.arg for each in last + keyword} & set(stage.parameters)
            assert not repeated, f"{stage.name}.{node.name} gives {repeated} a default of its own"


def test_figures_and_tables_are_called_so():
    for module in MODULES:
        for node in tree(module).body:
            name = getattr(node, "name", "")
            if isinstance(node, FUNCTIONS) and name.endswith(("_figure", "_table")):
                assert name.startswith(("save_", "write_")), f"{module}.{name}"


# ---- lines, functions, modules

def test_ruff_finds_nothing():
    "Lines of at most 120 columns, no unused name, in package, notebooks, tests, docs and bench."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, FUNCTIONS): assert node.end_lineno - node.lineno < 40, f"{module}.{node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_not_long(module):
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 650
    begun = next(number for number, line in enumerate(lines) if line.startswith("__all__"))
    generated = range(begun, next(number for number in range(begun, len(lines)) if lines[number].endswith("]")) + 1)
    assert not [line for number, line in enumerate(lines) if len(line) > 120 and number not in generated]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_hold_one_idea(name):
    for source in code_cells(NOTEBOOKS[name]):
        assert len(source.splitlines()) <= 100, source[:200]


# ---- notebooks

@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_takes_and_reads(name):
    cells = json.loads(STAGES[name].read_text(encoding="utf-8"))["cells"]
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert tags == ["parameters", "reads"], "nbdev-clean --clear-all drops tags"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(name):
    for cell in json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
