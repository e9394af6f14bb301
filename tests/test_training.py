"""Base, SFT and reward model: real TRL on models of a few thousand weights."""
import asyncio, json, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from creawrite import policies, reward_model, rewards, sft, trainers
from creawrite.core import KitError, read_json, run_dir, write_jsonl
from creawrite.data import read_sample, sample_splits
from creawrite.policies import policy_dir
from creawrite.rewards import RewardModel
from creawrite.settings import defaults
from creawrite.splits import PreferencePair, load_split

from conftest import REPOSITORY
from small_kit import (
    FAST, QUERIES, RUN, SHAPE, Verdicts, again, good, make_base, make_reward_model, make_sft, small_kit, weights)
from tiny_gguf import tiny_gguf

SAMPLE = sample_splits(read_sample(REPOSITORY / "data/sample/greetings.jsonl"))
SIZES = {stage: defaults(stage) for stage in ("sft", "reward_model")}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with small_kit(tmp_path_factory.mktemp("kit")) as folder: yield folder


def test_same_seed_same_weights():
    folder = policy_dir(RUN, "base")
    first = weights(folder)
    again(make_base, folder / "policy.json")
    assert weights(folder) == first
    elsewhere = policies.new_model(policies.load_policy(folder)[1], seed=2, **SHAPE).state_dict()
    name = "model.embed_tokens.weight"
    assert not torch.equal(elsewhere[name], load_file(folder / "model.safetensors")[name])


def drawn_before(make) -> list:
    "What `make` gives twice, after different numbers were drawn in this process."
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        results.append(make())
    return results


def test_reward_model_same_seed_same_scores():
    card = run_dir(RUN) / "reward_model" / "model" / "reward_model.json"
    one, other = drawn_before(
        lambda: again(make_reward_model, card).score(QUERIES, [good(query) for query in QUERIES]))
    assert (one == other).all()


def test_adapters_start_from_the_seed():
    settings = dict(seed=1, lora_rank=4, learning_rate=1e-2, max_steps=2) | FAST
    base, rows = policy_dir(RUN, "base"), load_split(RUN, "sft")
    one, other = drawn_before(lambda: sft.train_sft(base, rows, **settings)[0].state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_policy_card_and_log():
    card = json.loads((policy_dir(RUN, "sft") / "policy.json").read_text())
    assert card["parent"] == "base" and card["rows"] == 12 and card["parameters"] > 0
    log = pd.read_csv(run_dir(RUN) / "sft" / "log_sft.csv")
    assert list(log.columns) == ["step", "metric", "value"] and (log.metric == "loss").any()


@pytest.mark.parametrize("name", ["base", "sft", "reward_model"])
def test_padding_is_under_a_tenth(name):
    "Of our own sample, in the batches of profile smoke; the log says the same as the batches."
    splits, sizes = SAMPLE, SIZES["reward_model" if name == "reward_model" else "sft"]
    fixed = dict(seed=42, lora_rank=0, learning_rate=1e-3, num_train_epochs=1, precision="fp32", logging_steps=1,
                 batch_size=sizes["batch_size"], max_length=sizes["max_length"])
    if name == "reward_model":
        start = policies.source_of(policy_dir(RUN, "base"))
        log = reward_model.train_reward_model(start, splits["pairs_train"], **fixed)[-1]
    else:
        rows = sft.base_rows(splits["pairs_train"]) if name == "base" else sft.sft_rows(splits["sft"])
        tokenizer = sft.base_tokenizer(splits["pairs_train"], sizes["vocabulary"])
        fresh = policies.new_model(tokenizer, seed=1, **SHAPE)
        log = sft.fit_sft(fresh, tokenizer, rows, name, **fixed)[-1]
    padding = log[log.metric == "padding"].value
    assert len(padding) == log.step.max() and 0 < padding.mean() < 0.1


def test_generate_is_reproducible_and_keeps_the_callers_random_state():
    policy = policies.load_policy(policy_dir(RUN, "base"))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    texts = policies.generate(policy, QUERIES, n=2, max_new_tokens=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert policies.generate(policy, QUERIES, n=2, max_new_tokens=5) == texts
    assert policies.generate(policy, QUERIES, n=2, max_new_tokens=5, seed=1) != texts
    assert len(texts) == len(QUERIES) and all(len(some) == 2 for some in texts)


def test_generate_does_not_depend_on_batching_when_greedy():
    policy = policies.load_policy(policy_dir(RUN, "base"))
    whole = policies.generate(policy, QUERIES[:5], temperature=0, max_new_tokens=5)
    assert whole == policies.generate(policy, QUERIES[:5], temperature=0, max_new_tokens=5, batch_size=2)


def test_tokenizer_template_is_prefix_preserving():
    tokenizer = policies.load_policy(policy_dir(RUN, "base"))[1]
    turns = policies.policy_messages("生日🎂")
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns + policies.policy_answer("好"), return_dict=False)
    assert whole[:len(prompt)] == prompt and tokenizer.eos_token_id in whole[len(prompt):]


def test_base_from_a_folder_is_a_pointer(home):
    source = policy_dir(RUN, "base")
    row = {"id": "s", "query": "生日", "response": "生日快乐"}
    write_jsonl(run_dir("pointer") / "data" / "sft.jsonl", [row])
    make_base("pointer", model=str(source))
    assert [path.name for path in policy_dir("pointer", "base").iterdir()] == ["policy.json"]
    make_sft("pointer", lora_rank=2, learning_rate=1e-2, max_steps=3)
    assert weights(policy_dir("pointer", "sft")) != weights(source)
    assert "adapter_config.json" not in {path.name for path in policy_dir("pointer", "sft").iterdir()}


def test_what_a_pointer_points_at_counts(home, tmp_path):
    shutil.copytree(policy_dir(RUN, "base"), tmp_path / "model")
    policies.save_model(tmp_path / "base", None, None, hub=str(tmp_path / "model"), revision="")
    inputs = policies.model_inputs(tmp_path / "base")
    assert inputs["folder"] == tmp_path / "model" and inputs["card"][0] == ["hub", str(tmp_path / "model")]


def test_reward_model_reloads_to_the_same_scores():
    folder = run_dir(RUN) / "reward_model" / "model"
    settings = dict(seed=1, lora_rank=4, learning_rate=1e-2, max_steps=2) | FAST
    pairs, start = reward_model.training_pairs(RUN, "data"), policies.source_of(policy_dir(RUN, "base"))
    trained = RewardModel(*reward_model.train_reward_model(start, pairs, **settings)[:2])
    reloaded = RewardModel.load(folder)
    texts = [good(query) * (1 + i % 3) for i, query in enumerate(QUERIES)]
    assert np.abs(trained.score(QUERIES, texts) - reloaded.score(QUERIES, texts)).max() < 1e-5
    assert np.abs(reloaded.score(QUERIES, texts) - reloaded.score(QUERIES, texts, batch_size=3)).max() < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and len(config["id2label"]) == 1


def test_reward_model_learns_a_plain_difference():
    pairs = [PreferencePair(id=str(i), query=q, chosen=good(q), rejected="祝祝祝祝祝祝祝祝祝祝")
             for i, q in enumerate(QUERIES)]
    base = str(policy_dir(RUN, "base"))
    trained = make_reward_model("learns", pairs, model=base, num_train_epochs=6, max_steps=-1)
    assert (rewards.margins(trained.score, pairs) > 0).all()


def test_accuracy_counts_ties_as_wrong_and_survives_an_empty_slice():
    pairs = [PreferencePair(id=i, query="祝福", chosen="好", rejected="坏") for i in "abc"]
    slices = {"all": list("abc"), "none": []}
    table = reward_model.table_accuracy({"any": np.array([1.0, 0.0, -1.0])}, pairs, slices)
    assert table.value[0] == pytest.approx(1 / 3) and table.n.tolist() == [3, 0] and np.isnan(table.value[1])


@pytest.mark.parametrize("completion, text", [("  好 ", "好"), ([{"role": "assistant", "content": "好\n"}], "好")])
def test_text_of(completion, text): assert rewards.text_of(completion) == text


def test_rewards_say_none_for_what_they_cannot_know():
    score = lambda reward, texts, queries: asyncio.run(reward(None, texts, query=queries))
    assert score(rewards.JudgeReward(Verdicts(1, 0, None)), list("abc"), ["q"] * 3) == [1.0, 0.0, None]
    stated = ["送别祝福八个字", "送别祝福"]
    assert score(rewards.ConstraintReward(), ["一路平安，万事顺心。", "一路平安"], stated) == [1.0, None]
    model = RewardModel.load(run_dir(RUN) / "reward_model" / "model")
    values = score(rewards.RewardModelReward(model), ["", "愿你平安" * 400], ["q", "q"])
    assert all(isinstance(value, float) and np.isfinite(value) for value in values)


@pytest.mark.parametrize("call, words", [
    (lambda: policy_dir(RUN, "sft-length"), "unknown"),
    (lambda: policies.load_policy(policy_dir("nobody", "base")), "is missing"),
    (lambda: make_sft("nobody"), "is missing"),
    (lambda: make_base("nobody"), "01_data"),
    (lambda: trainers.bf16("half"), "not one of"),
    (lambda: RewardModel.load("nowhere"), "06_reward_model"),
    (lambda: reward_model.training_pairs(RUN, "multi_agent"), "pairs.jsonl"),
    (lambda: reward_model.training_pairs(RUN, "elsewhere"), "not one of"),
    (lambda: rewards.reward_of("nobody", "rm"), "06_reward_model"),
    (lambda: rewards.reward_of(RUN, "length"), "unknown"),
])
def test_one_clear_sentence(call, words):
    with pytest.raises(KitError, match=words): call()


def test_base_from_a_file_is_unpacked_once_and_trains_like_any_other(tmp_path, capsys):
    write_jsonl(run_dir("file") / "data" / "sft.jsonl", [{"id": "s", "query": "生日", "response": "生日快乐"}])
    make_base("file", model=str(tiny_gguf(tmp_path / "tiny.gguf")))
    folder, first = policy_dir("file", "base"), weights(policy_dir("file", "base"))
    model, tokenizer = policies.load_policy(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    card = read_json(folder / "policy.json")
    assert card["file"].startswith("Tiny Test") and str(tmp_path) not in str(card)
    make_base("file", model=f"local:{tmp_path / 'tiny.gguf'}")
    assert "unpacked before" in capsys.readouterr().out and weights(folder) == first
    make_sft("file", lora_rank=2, learning_rate=1e-2)
    assert weights(policy_dir("file", "sft")) != first
    make_base("file", model=str(tiny_gguf(tmp_path / "tiny.gguf", seed=1)))
    assert weights(folder) != first


@pytest.mark.parametrize("options, words", [
    (dict(tokenizer=False), "has no tokenizer in it"), (dict(template=""), "has no chat template in it"),
    (dict(end=False), "names no end token"), (dict(kind="clip"), "of architecture clip")])
def test_a_file_that_cannot_become_a_policy_is_told(tmp_path, options, words):
    path = tiny_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(KitError, match=words): policies.check_model("sft.model", str(path))


def test_half_a_file_is_told(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(KitError, match="cut off"): policies.check_model("sft.model", str(path))
