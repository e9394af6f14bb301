"Edits of the real kit after a real run: what trains again, what is only redrawn, what is left alone."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENDPOINT, REPOSITORY


@pytest.fixture
def edited(smoke_run, tmp_path) -> Path:
    "A copy of the kit with its finished smoke run, to edit."
    for name in ("nbs", "creawrite", "data"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "released"))
    shutil.copyfile(REPOSITORY / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(REPOSITORY / "outputs" / smoke_run, tmp_path / "outputs" / smoke_run)
    return tmp_path


def edit(kit: Path, stem: str, old: str, new: str):
    "The same edit of one line in a notebook and in the module that it exports to."
    name = stem.rpartition("/")[2].partition("_")[2] if stem[0].isdigit() else stem.rpartition("/")[2]
    for path in (kit / f"nbs/{stem}.ipynb", kit / f"creawrite/{name}.py"):
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{path.name} no longer holds {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")


def creawrite(kit: Path, *arguments: str) -> str:
    "What a command says; it must succeed."
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT}
    environment |= {"CREAWRITE_ROOT": str(kit), "PYTHONPATH": str(kit)}
    done = subprocess.run([sys.executable, "-m", "creawrite.cli", *arguments], cwd=kit, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(kit: Path, run: str) -> dict[str, int]:
    "When each model of a run was written."
    found = (kit / "outputs" / run).rglob("model.safetensors")
    return {path.parent.relative_to(kit / "outputs" / run).as_posix(): path.stat().st_mtime_ns for path in found}


def test_a_figure_is_redrawn_and_nothing_trains(edited, smoke_run):
    before, figure = weights(edited, smoke_run), edited / "outputs" / smoke_run / "sft/figure_loss.svg"
    old = figure.read_bytes()
    edit(edited, "05_sft", "loss per token", "loss per token of text")
    told = creawrite(edited, "run", "--run", smoke_run)
    assert told.count("trained before, unchanged") == 2 and told.count("unchanged, skipped") >= 7
    assert weights(edited, smoke_run) == before and figure.read_bytes() != old


def test_a_reward_class_retrains_its_own_policies_and_nothing_before(edited, smoke_run):
    before = weights(edited, smoke_run)
    edit(edited, "lib/rewards", "return await self.judge.grades(", "return await self.judge.grades(*[], ")
    told = creawrite(edited, "run", "--run", smoke_run, "--only", "grpo")
    after = weights(edited, smoke_run)
    assert {name for name in after if after[name] != before[name]} == {"grpo/base-judge", "grpo/sft-judge"}
    assert told.count("trained before, unchanged") == 2
    status = creawrite(edited, "status", smoke_run)
    for stage in ("data", "audit", "multi_agent", "adversarial", "sft", "reward_model", "grpo"):
        assert any(line.split()[:2] == [stage, "done"] for line in status.splitlines()), status


def test_force_trains_again(edited, smoke_run):
    before = weights(edited, smoke_run)
    told = creawrite(edited, "run", "--run", smoke_run, "--only", "reward_model", "--force")
    after = weights(edited, smoke_run)
    assert "trained before" not in told and after["reward_model/model"] != before["reward_model/model"]
    assert {name: when for name, when in after.items() if "reward_model" not in name} == \
        {name: when for name, when in before.items() if "reward_model" not in name}
