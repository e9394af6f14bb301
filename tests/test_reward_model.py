"The reward model: one output wherever it is computed, and what is length in it."
import json, subprocess, sys

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from creawrite import policies, reward_model
from creawrite.core import KitError, run_dir
from creawrite.rewards import RewardModel, length_gaps, margins
from creawrite.splits import PreferencePair
from creawrite.trainers import lora_config

from conftest import REPOSITORY

QUERIES = [f"给{who}的生日祝福" for who in ("爷爷", "同桌", "邻居", "教练", "妈妈", "老师")]
TEXTS = [f"愿{query[1:3]}日日有晴，岁岁有花{'，所想都如愿' * (i % 3)}。" for i, query in enumerate(QUERIES)]
PAIRS = [PreferencePair(id=str(i), query=query, chosen=text, rejected=f"祝{query[1:3]}快乐。")
         for i, (query, text) in enumerate(zip(QUERIES, TEXTS))]
FAST = dict(seed=1, lora_rank=4, learning_rate=1e-2, max_steps=2, batch_size=2, max_length=96, precision="fp32",
            gradient_checkpointing=False)
SCORE = """
import json, sys
from creawrite.rewards import RewardModel
queries, texts = json.loads(sys.argv[1])
print(json.dumps([RewardModel.load(folder).score(queries, texts).tolist() for folder in sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base of a few thousand random weights in a kit of its own."
    folder = tmp_path_factory.mktemp("kit")
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        torch.set_num_threads(1)
        dialogues = [policies.policy_messages(query) + policies.policy_answer(text)
                     for query, text in zip(QUERIES, TEXTS)]
        tokenizer = policies.train_tokenizer(dialogues, 300)
        small = policies.new_model(tokenizer, 16, 1, 2, 32, seed=1)
        policies.save_model(policies.policy_dir("r", "base"), small, tokenizer, name="base")
        yield policies.policy_dir("r", "base"), tokenizer


def make(pairs=PAIRS, name="model", debias="none"):
    "Train one and say where it is."
    reward_model.make_reward_model("r", name, pairs, model="", debias=debias, **FAST)
    return run_dir("r") / "reward_model" / name


def in_memory(folder, debias):
    "The same training, its model never on a disk."
    fitted, tokenizer, _ = reward_model.train_reward_model(policies.source_of(folder), PAIRS, **FAST)
    scorer = RewardModel(fitted, tokenizer)
    if debias == "residual": scorer.per_character = reward_model.measured_trend(scorer, PAIRS)
    return scorer.score(QUERIES, TEXTS)


def in_a_new_process(*folders):
    command = [sys.executable, "-c", SCORE, json.dumps([QUERIES, TEXTS]), *map(str, folders)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return np.array(json.loads(ended.stdout))


def adapted(base):
    "A model with an adapter that does something, and the model without it."
    folder, tokenizer = base
    plain = lambda: AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    adapter = lora_config(4, task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
    return get_peft_model(plain(), adapter), plain


def test_merged_saved_and_reloaded_in_a_new_process_the_scores_are_the_same(base, tmp_path):
    (model, plain), tokenizer = adapted(base), base[1]
    score = lambda model: RewardModel(model, tokenizer).score(QUERIES, TEXTS)
    before = score(model)
    assert np.abs(before - score(plain())).max() > 1e-3, "the adapter does something"
    model.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(plain(), tmp_path / "adapter").merge_and_unload()
    policies.save_model(tmp_path / "merged", merged, tokenizer, card="reward_model.json")
    trained = [in_memory(base[0], debias) for debias in ("none", "residual")]
    folders = [tmp_path / "merged", *(make(name=debias, debias=debias) for debias in ("none", "residual"))]
    assert np.abs(score(merged) - before).max() < 1e-5
    assert np.abs(in_a_new_process(*folders) - np.array([before, *trained])).max() < 1e-5


def test_bfloat16_ends_with_the_training(base, tmp_path):
    "What it leaves computes in fp32, as it does when it is loaded again."
    settings = FAST | dict(lora_rank=0, precision="bf16")
    fitted, tokenizer, log = reward_model.train_reward_model(policies.source_of(base[0]), PAIRS, **settings)
    assert log[log.metric == "loss"].value.between(0, 2).all()
    policies.save_model(tmp_path / "model", fitted, tokenizer, card="reward_model.json")
    reloaded = RewardModel.load(tmp_path / "model").score(QUERIES, TEXTS)
    assert np.abs(RewardModel(fitted, tokenizer).score(QUERIES, TEXTS) - reloaded).max() < 1e-5


def test_two_halves_score_as_the_whole(base):
    "Whatever the lengths; and the padding is that of both halves."
    (model, _), tokenizer = adapted(base), base[1]
    texts = tokenizer(["愿" * n for n in (9, 1, 30, 2, 30)], return_tensors="pt", padding=True)
    lengths = texts.attention_mask.sum(1).sort().values
    with torch.inference_mode():
        whole = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask).logits
        scores, padding = reward_model.in_halves(model, texts.input_ids, texts.attention_mask)
    assert torch.allclose(scores, whole, atol=1e-5)
    assert padding == pytest.approx(1 - lengths.sum().item() / (3 * lengths[2] + 2 * lengths[4]).item())


@pytest.mark.parametrize("debias", ["none", "residual"])
def test_what_is_saved_is_plain_with_one_output(base, debias):
    folder = make(debias=debias)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1 and not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert bool(json.loads((folder / "reward_model.json").read_text())["per_character"]) == (debias == "residual")


def test_a_comparison_lies_beside_the_model(base):
    weights = lambda folder: (folder / "model.safetensors").read_bytes()
    folder = make()
    before = weights(folder)
    comparison = make(PAIRS[:2], "comparison")
    assert weights(folder) == before != weights(comparison)
    assert {"log.csv", "log_comparison.csv"} <= {path.name for path in folder.parent.iterdir()}


def test_a_reward_model_is_trained_once(base, capsys):
    "And again for other pairs, another way of debiasing, or another base."
    unchanged = lambda **changes: "trained before" in [make(name="once", **changes), capsys.readouterr().out][1]
    assert [unchanged() for _ in range(2)] == [False, True]
    assert not unchanged(pairs=PAIRS[1:]) and not unchanged() and not unchanged(debias="residual")
    config = base[0] / "generation_config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace("{", "{ ", 1))
        assert not unchanged(debias="residual") and unchanged(debias="residual")
    finally: config.write_text(text)


def pairs(*gaps):
    return [PreferencePair(id=str(i), query="祝福", chosen="好" * (20 + gap), rejected="坏" * 20)
            for i, gap in enumerate(gaps)]


def test_matched_pairs_are_close_and_balanced():
    gaps = length_gaps(reward_model.matched_pairs(pairs(0, 1, 2, 3, -2, 9, -9, 0), close=5))
    assert sorted(gaps) == [-2, 0, 0, 1]
    with pytest.raises(KitError, match="raise it"): reward_model.matched_pairs(pairs(9, 8), close=5)


@pytest.mark.parametrize("debias, compare, lengths", [
    ("none", 0, {"model": 3}), ("residual", 2, {"model": 3, "comparison": 1}), ("matched", 0, {"model": 1}),
    ("matched", 2, {"model": 1, "comparison": 3})])
def test_each_model_learns_from_its_own_pairs(debias, compare, lengths):
    sets = reward_model.pair_sets(pairs(0, 1, 9), debias, 5, compare)
    assert {name: len(some) for name, some in sets.items()} == lengths


def test_a_score_that_is_length_has_nothing_left_without_its_trend():
    some = pairs(1, 5, -3, 12)
    by_length = margins(lambda queries, texts: np.array([3.0 * len(text) for text in texts]), some)
    trend = reward_model.length_trend(by_length, some)
    assert trend == pytest.approx(3) and np.abs(by_length - trend * length_gaps(some)).max() < 1e-9


def test_calibration_by_hand():
    some, values = pairs(*range(1, 9)), np.array([0.1, -0.1, 0.2, 0.2, 3, 3, 3, -3])
    slices = {"all": [pair.id for pair in some], "none": []}
    table = reward_model.table_calibration({"x": values}, some, slices, bins=2)
    assert table.slice.tolist() == ["all", "all"] and table.value.tolist() == [0.75, 0.75]
    timid = np.mean(1 / (1 + np.exp([-0.1, -0.1, -0.2, -0.2])))
    assert table.confidence.tolist() == pytest.approx([timid, 1 / (1 + np.exp(-3))])
    assert table.eval("low < value < high").all()


def test_length_alone_is_fitted_and_may_turn_round():
    shorter = reward_model.length_margins(pairs(-3, -4, -5, 2), pairs(-1, 1))
    assert (shorter > 0).tolist() == [True, False]


def test_the_figures_draw_what_is_there(tmp_path):
    some = pairs(*range(1, 9))
    evaluators = {"a": np.linspace(-1, 3, 8), "b": np.ones(8)}
    slices = {name: [pair.id for pair in some] for name in ("all", "length_matched")}
    figure = reward_model.figure_calibration(reward_model.table_calibration(evaluators, some, slices))
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"] and len(figure.axes) == 2
    log = pd.DataFrame([(1, "accuracy", 0.5), (2, "accuracy", 0.7)], columns=["step", "metric", "value"])
    assert len(reward_model.figure_margins(log, np.linspace(-1, 3, 8), np.array([])).axes) == 2
