"What decides a result: an edit of the real package makes stale whatever reaches it, and nothing else."
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY

from creawrite import fingerprint, runner
from creawrite.settings import make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A copy of the kit's source: notebooks, package, data and settings."
    copy = tmp_path_factory.mktemp("kit") / "kit"
    for name in ("nbs", "creawrite", "data"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "released"))
    shutil.copyfile(REPOSITORY / "settings.ini", copy / "settings.ini")
    return copy


@pytest.fixture
def source(folder, monkeypatch, no_endpoint) -> Path:
    "The same, as the kit that is looked at, mended after the test."
    monkeypatch.setenv("CREAWRITE_ROOT", str(folder))
    files = [path for place in ("nbs", "creawrite") for path in (folder / place).rglob("*.*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    yield folder
    for path, content in before.items():
        if path.read_bytes() != content: path.write_bytes(content)


def edit(path: Path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path.name} no longer holds {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def states() -> dict[str, dict]:
    "What decides every stage, code alone."
    stages = make_plan("smoke").stages
    return {stage.name: fingerprint.notebook_digests(stage.code, stage.notebook.name) for stage in stages}


@pytest.fixture(scope="module")
def before(folder) -> dict[str, dict]:
    "The states of the source as it is."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        return states()


def stale(before: dict) -> set[str]:
    "Stages whose code is not what it was."
    return {name for name, code in states().items() if code != before[name]}


EVERY = {"data", "audit", "multi_agent", "adversarial", "sft", "reward_model", "grpo", "evaluate", "examine", "paper"}
EDITS = {  # file, old, new, stages that must be stale
    "reward class": ("rewards.py", "class JudgeReward:", "class JudgeReward:\n    weight = 2\n", {"grpo", "examine"}),
    "judge": ("judge.py", "class Judge:", "class Judge:\n    limit = 1\n",
              {"adversarial", "grpo", "evaluate", "examine", "passport"}),
    "debate prompt": ("task.py", "你在一场关于祝福语的辩论中担任正方", "你在一场辩论中担任正方",
                      {"multi_agent", "evaluate", "examine", "passport"}),
    "game prompt": ("task.py", "你要写一条看上去不错", "请写一条看上去不错", {"adversarial"}),
    "answer schema": ("answers.py", "一句话理由", "一句理由", {"multi_agent", "evaluate", "examine", "passport"}),
    "rule of the rulebook": ("flaws.py", "扫码", "扫描",
                             {"multi_agent", "adversarial", "grpo", "evaluate", "examine", "laboratory"}),
    "reading of rows": ("splits.py", "def load_split(", "def load_split_of(", EVERY - {"paper"}),
    "a digest": ("core.py", '"\\0".join(parts)', '"\\1".join(parts)', {"multi_agent", "sft", "reward_model", "grpo"}),
    "intervals": ("stats.py", 'method="wilson"', 'method="beta"', EVERY - {"data", "sft", "grpo", "paper"}),
    "command line": ("cli.py", "def status_command(", "def status_of_run(", set()),
    "runner": ("runner.py", "def outlook(", "def view(", set()),
    "error sentence": ("core.py", "is missing: run the stage that writes it first", "is not there yet", set()),
    "docstring": ("splits.py", '    "A split of a run.', '    "One split of a run.', set()),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_makes_stale_what_reaches_it(source, before, name):
    file, old, new, wanted = EDITS[name]
    edit(source / "creawrite" / file, old, new)
    found = stale(before)
    if name in ("a digest", "reading of rows", "intervals", "rule of the rulebook"): assert wanted <= found
    else: assert found == wanted


def test_a_figure_redraws_its_own_stage_alone(source, before):
    edit(source / "nbs/02_audit.ipynb", "#bdbdbd", "#bebebe")
    edit(source / "creawrite/audit.py", "#bdbdbd", "#bebebe")
    assert stale(before) == {"audit"}


def test_prose_makes_nothing_stale(source, before):
    edit(source / "nbs/02_audit.ipynb", "# Audit", "# The audit")
    assert stale(before) == set()


def test_a_new_audit_is_an_input_of_the_reward_model_and_its_figures_are_not(source, tmp_path):
    plan = make_plan("smoke", "run-of-test")
    stage = next(stage for stage in plan.stages if stage.name == "reward_model")
    hashes, audit = runner.Hashes(tmp_path / "hashes.json"), source / "outputs/run-of-test/audit"
    audit.mkdir(parents=True)
    (audit / "slices.json").write_text("{}")
    before = runner.stage_state(plan, stage, hashes)
    (audit / "figure_a1.png").write_bytes(b"another colour")
    assert runner.stage_state(plan, stage, hashes) == before
    (audit / "slices.json").write_text('{"pairs_test": {}}')
    changed = runner.changes(before, runner.stage_state(plan, stage, hashes))
    shutil.rmtree(source / "outputs")
    assert changed == ["inputs audit/slices.json"]


def test_no_stage_reads_another_stages_folder_whole(source):
    "Models aside, which are folders: a new figure in a folder must not make its readers stale."
    folders = {"sft/base/", "sft/sft/", "reward_model/model/", "reward_model/comparison/", "grpo/*/"}
    for stage in make_plan("smoke").stages:
        for entry in stage.reads:
            if entry.startswith("./"): continue
            assert entry in folders or "." in Path(entry).name, f"{stage.name} reads {entry}"


# ---- its own rules, on packages of a few lines

@pytest.fixture
def package(tmp_path, monkeypatch):
    "Write a package from sources by name; the digests of what a name in it reaches."
    for name in ("nbs", "creawrite"): (tmp_path / name).mkdir()
    (tmp_path / "settings.ini").touch()
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))

    def reached(name: str, **sources: str) -> dict[str, str]:
        for module, text in sources.items(): (tmp_path / "creawrite" / f"{module}.py").write_text(text)
        package = fingerprint.Package([])
        reach = fingerprint.Reach(package)
        module, _, definition = name.partition(".")
        reach.definition(module, definition, "")
        return {name: sorted(code) for name, code in reach.finish().code.items() if code}

    return reached


def test_names_are_followed_through_imports_aliases_and_local_imports(package):
    code = package("a.f", a="from creawrite.b import g as h\ndef f():\n    from creawrite.c import k\n"
                            "    return h() + k()", b="from . import d\ndef g(): return d.x",
                   c="def k(): return LIMIT\nLIMIT = 3\nOTHER = 4", d="x = 1\ny = 2")
    assert code["c"] == ["LIMIT = 3", "def k():\n    return LIMIT"]
    assert code["d"] == ["x = 1", "y = 2"], "a module that is handed around counts whole"


def test_what_changes_a_name_counts_with_it(package):
    code = package("a.f", a="X = {}\nX['k'] = 1\nX.update(z=2)\nfor i in range(3): X[i] = i\ndef f(): return X\nY = 1")
    assert len(code["a"]) == 5 and "Y = 1" not in code["a"]


def test_a_registration_counts_also_from_another_module(package):
    code = package("a.answer", a="TABLE = {}\ndef register(f):\n    TABLE[f.__name__] = f\n    return f\n"
                                 "def answer(n): return TABLE[n]()",
                   b="from creawrite.a import register\n@register\ndef one(): return two()\ndef two(): return 2")
    assert any("def one" in text for text in code["b"]) and any("def two" in text for text in code["b"])


def test_a_class_counts_whole_and_a_record_by_field(package):
    code = package("a.f", a="from typing import NamedTuple\nclass C:\n    def used(self): pass\n"
                            "    def unused(self): pass\nclass Task(NamedTuple):\n    x: str\n    y: str\n"
                            "X, Y = 'x', 'y'\nTASK = Task(x=X, y=Y)\n"
                            "def f(): return C().used(), TASK.x")
    assert any("def unused" in text for text in code["a"])
    assert "TASK.x = X" in code["a"] and not any(text.startswith("TASK =") for text in code["a"])


def test_a_module_that_is_run_by_name_counts_whole_and_its_main_block_does_not(package):
    code = package("a.f", a="import sys\ndef f(): return [sys.executable, '-m', 'creawrite.b']",
                   b="def main(): return 1\nif __name__ == '__main__': print(main())")
    assert code["b"] == ["def main():\n    return 1"]


def test_messages_are_for_people_but_a_printed_file_is_a_result(package):
    source = "def f(x, file):\n    'Doc {n}.'\n    if x: raise ValueError('no {n}')\n    print('step {n}')"
    one, two = (package("a.f", a=source.format(n=n)) for n in (1, 2))
    assert one == two
    one, two = (package("a.f", a=f"def f(x, file):\n    print('step {n}', file=file)") for n in (1, 2))
    assert one != two
