"Checkpoints: killed anywhere, a training ends as if nobody had killed it; two processes train as one does."
import os

import pandas as pd
import pytest
from safetensors.torch import load_file, save_model
from transformers import Trainer

from creawrite import policies, reward_model, sft, trainers
from creawrite.core import read_json, run_dir
from creawrite.splits import load_split

import small_kit
from processes import die, ended, side_by_side, start
from small_kit import FAST, RUN, SHAPE

MAKE = {"base": small_kit.make_base, "sft": small_kit.make_sft, "model": small_kit.make_reward_model}
STEPS = dict(max_steps=7, every=2, batch_size=4)
PLACES = {"before the first": None, "between two": 4, "while saving": 2, "just after saving": 4, "at the end": 6}


MIDDLE = ["before the first", "between two", "while saving"]


def folder_of(name): return policies.policy_dir(RUN, name) if name != "model" else run_dir(RUN) / "reward_model/model"


def work_of(name): return folder_of(name).with_name(f".{name}")


def card_of(name): return folder_of(name) / ("policy.json" if name != "model" else "reward_model.json")


def result(name):
    "Weights and log, the latter without what is measured in seconds."
    log = pd.read_csv(run_dir(RUN) / ("reward_model/log.csv" if name == "model" else f"sft/log_{name}.csv"))
    return small_kit.weights(folder_of(name)), log[~log.metric.str.contains("runtime|per_second")].values.tolist()


def train(name, where, changes=None):
    "The command; `where` it is killed."
    at = lambda step: lambda self, args, state, control, **kwargs: die() if state.global_step == step else None
    if where == "before the first": trainers.Checkpoints.on_step_begin = at(1)
    if where == "between two": trainers.Checkpoints.on_step_begin = at(5)
    if where == "while saving":
        saving = Trainer._save_rng_state  # weights and optimizer are there
        Trainer._save_rng_state = lambda self, folder: die() if folder.endswith("-4") else saving(self, folder)
    if where == "just after saving":
        on_save = trainers.Checkpoints.on_save

        def saved(self, args, state, control, **kwargs):
            on_save(self, args, state, control, **kwargs)
            if state.global_step == 4: die()

        trainers.Checkpoints.on_save = saved
    if where == "at the end": sft.write_csv = reward_model.write_csv = die
    MAKE[name](**STEPS | (changes or {}))


@pytest.fixture(scope="module", autouse=True)
def whole(tmp_path_factory):
    "Trainings that nobody killed: name -> weights and log."
    with small_kit.small_kit(tmp_path_factory.mktemp("kit")):
        for name in MAKE: train(name, "nowhere")
        yield {name: result(name) for name in MAKE}


@pytest.mark.parametrize("name, where", [("sft", where) for where in PLACES] + [("model", where) for where in MIDDLE])
def test_killed_and_started_again_it_ends_the_same(whole, name, where, tmp_path):
    card_of(name).unlink()
    assert ended(start(train, name, where)) == [-9]
    torn = work_of(name) / "checkpoint-4"
    assert where != "while saving" or (torn / "optimizer.pt").is_file() and not (torn / trainers.WHOLE).exists()
    assert ended(start(train, name, "nowhere", told=tmp_path / "told")) == [0]
    begun = [line for line in (tmp_path / "told").read_text().splitlines() if "goes on from" in line]
    assert [line.rpartition("-")[2] for line in begun] == [str(step) for step in [PLACES[where]] if step]
    assert result(name) == whole[name] and not work_of(name).exists()


def test_checkpoints_of_other_settings_are_not_gone_on_from(whole, tmp_path, capfd):
    "And how often a checkpoint is saved is no setting that counts."
    card_of("base").unlink()
    assert ended(start(train, "base", "between two")) == [-9]
    saved = read_json(work_of("base") / "checkpoint-4" / trainers.WHOLE)
    assert saved["files"]["model.safetensors"] > 0
    train("base", "nowhere", {"learning_rate": 1e-3})
    assert "goes on from" not in capfd.readouterr().out and result("base") != whole["base"]
    train("base", "nowhere", {"every": 3})
    assert result("base") == whole["base"]
    capfd.readouterr()
    train("base", "nowhere", {"every": 0})
    assert "trained before" in capfd.readouterr().out


def weights_of(file, name, rows):
    "Train in each of several processes, and keep what the first one has."
    fixed = FAST | dict(seed=1, batch_size=4, max_steps=6)
    if name == "base": model, _, log = sft.train_base(rows, vocabulary=400, shape=SHAPE, learning_rate=3e-3, **fixed)
    else:
        start = policies.source_of(folder_of("base"))
        model, _, log = reward_model.train_reward_model(start, rows, lora_rank=4, learning_rate=1e-2, **fixed)
    if os.environ.get("RANK", "0") == "0": save_model(model, file)


@pytest.mark.parametrize("name", ["base", "model"])
def test_two_processes_train_as_one_does(name, tmp_path):
    "To 1e-4: sums are rounded in another order. Twelve rows: they fill their batches, so no process repeats one."
    rows = load_split(RUN, "pairs_train")
    weights_of(tmp_path / "one", name, rows)
    assert side_by_side(weights_of, tmp_path / "two", name, rows) == [0, 0]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert all((one[key] - two[key]).abs().max() < 1e-4 for key in one | two)


@pytest.mark.parametrize("batch_size, processes", [(16, 3)])
def test_a_batch_must_divide_among_processes(batch_size, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(trainers.KitError, match="multiple"): trainers.per_process(batch_size)
