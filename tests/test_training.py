"""Base, SFT, reward model and GRPO: real TRL on models of a few thousand weights."""
import asyncio, hashlib, json, subprocess, sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from creawrite import grpo, reward_model, sft
from creawrite.data import PreferencePair
from creawrite.runs import KitError, run_dir, write_json, write_jsonl

RUN = "training"
SHAPE = dict(hidden=16, layers=1, heads=2, intermediate=32)
FAST = dict(batch_size=8, max_length=96, precision="fp32", gradient_checkpointing=False)
QUERIES = [f"给{who}的{what}祝福" for who, what in product(("爷爷", "同桌", "邻居", "教练"), ("生日", "乔迁", "新年", "送别八个字"))]


def good(query): return f"愿{query[1:3]}日日有晴，岁岁有花，所想都如愿。"


def weights(folder): return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def tiny(**changes):
    settings = dict(precision="fp32", prompts_per_rollout=2, num_generations=2, prompts_per_update=2, micro_batch=4, learning_rate=1e-3, max_steps=2,
                    max_prompt_length=96, max_completion_length=6, gradient_checkpointing=False)
    return grpo.Settings(RUN, **settings | changes)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A kit folder of our own with a trained base, SFT policy and reward model."
    folder = tmp_path_factory.mktemp("kit")
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        torch.set_num_threads(1)
        data = run_dir(RUN) / "data"
        pairs = [{"id": f"p{i}", "query": q, "chosen": good(q), "rejected": f"祝{q[1:3]}快乐。"} for i, q in enumerate(QUERIES)]
        write_jsonl(data / "pairs_train.jsonl", pairs[:12])
        write_jsonl(data / "pairs_test.jsonl", pairs[12:])
        write_jsonl(data / "sft.jsonl", [{"id": f"s{i}", "query": q, "response": good(q)} for i, q in enumerate(QUERIES[:12])])
        write_jsonl(data / "prompts_train.jsonl", [{"id": f"g{i}", "query": q} for i, q in enumerate(QUERIES[:12])])
        write_jsonl(data / "prompts_test.jsonl", [{"id": f"t{i}", "query": q} for i, q in enumerate(QUERIES[12:])])
        write_json(run_dir(RUN) / "adversarial" / "judge.json", {"principles": ["跑题，判 Bad"]})
        train_base()
        sft.train_sft(RUN, 1, learning_rate=1e-3, max_steps=2, **FAST)
        train_reward_model()
        yield folder


def train_base(seed=1): sft.train_base(RUN, seed, vocabulary=400, shape=SHAPE, learning_rate=3e-3, max_steps=3, **FAST)


def train_reward_model(pairs=None):
    return reward_model.train(RUN, pairs or reward_model.training_pairs(RUN), 1, lora_rank=4, learning_rate=1e-2, max_steps=2, **FAST)


class Verdicts:
    "A judge that answers from a list."
    def __init__(self, *said): self.said = said

    async def grades(self, queries, responses): return [self.said[i % len(self.said)] for i in range(len(responses))]


@pytest.fixture
def judged(monkeypatch):
    "Put a stand-in for the judge into the training loop."
    def use(*said): monkeypatch.setattr(grpo, "reward_of", lambda *_: grpo.JudgeReward(Verdicts(*said)))
    return use


def test_same_seed_same_weights():
    first = weights(sft.policy_dir(RUN, "base"))
    train_base()
    assert weights(sft.policy_dir(RUN, "base")) == first
    elsewhere = sft.new_model(sft.load_policy(sft.policy_dir(RUN, "base"))[1], seed=2, **SHAPE).state_dict()
    assert not torch.equal(elsewhere["model.embed_tokens.weight"], load_file(sft.policy_dir(RUN, "base") / "model.safetensors")["model.embed_tokens.weight"])


def test_reward_model_same_seed_same_scores():
    one, other = (train_reward_model().score(QUERIES, [good(q) for q in QUERIES]) for _ in range(2))
    assert (one == other).all()


def test_policy_card_and_log():
    card = json.loads((sft.policy_dir(RUN, "sft") / "policy.json").read_text())
    assert card["parent"] == "base" and card["rows"] == 12 and card["parameters"] > 0
    log = pd.read_csv(run_dir(RUN) / "sft" / "log_sft.csv")
    assert list(log.columns) == ["step", "metric", "value"] and (log.metric == "loss").any()


def test_generate_is_reproducible_and_keeps_the_callers_random_state():
    policy = sft.load_policy(sft.policy_dir(RUN, "base"))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    texts = sft.generate(policy, QUERIES, n=2, max_new_tokens=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sft.generate(policy, QUERIES, n=2, max_new_tokens=5) == texts
    assert sft.generate(policy, QUERIES, n=2, max_new_tokens=5, seed=1) != texts
    assert len(texts) == len(QUERIES) and all(len(some) == 2 for some in texts)


def test_generate_does_not_depend_on_batching_when_greedy():
    policy = sft.load_policy(sft.policy_dir(RUN, "base"))
    whole = sft.generate(policy, QUERIES[:5], temperature=0, max_new_tokens=5)
    assert whole == sft.generate(policy, QUERIES[:5], temperature=0, max_new_tokens=5, batch_size=2)


def test_tokenizer_template_is_prefix_preserving():
    tokenizer = sft.load_policy(sft.policy_dir(RUN, "base"))[1]
    prompt = tokenizer.apply_chat_template(sft.messages("生日🎂"), add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(sft.messages("生日🎂") + sft.answer("好"), return_dict=False)
    assert whole[:len(prompt)] == prompt and tokenizer.eos_token_id in whole[len(prompt):]


def test_base_from_a_folder_is_a_pointer(home, monkeypatch):
    source = sft.policy_dir(RUN, "base")
    write_jsonl(run_dir("pointer") / "data" / "sft.jsonl", [{"id": "s", "query": "生日", "response": "生日快乐"}])
    sft.train_base("pointer", 1, model=str(source))
    assert [path.name for path in sft.policy_dir("pointer", "base").iterdir()] == ["policy.json"]
    sft.train_sft("pointer", 1, lora_rank=2, learning_rate=1e-2, max_steps=3, **FAST)
    assert weights(sft.policy_dir("pointer", "sft")) != weights(source)
    assert "adapter_config.json" not in {path.name for path in sft.policy_dir("pointer", "sft").iterdir()}


def test_reward_model_reloads_to_the_same_scores():
    trained = train_reward_model()
    again = reward_model.RewardModel.load(run_dir(RUN) / "reward_model" / "model")
    texts = [good(query) * (1 + i % 3) for i, query in enumerate(QUERIES)]
    assert np.abs(trained.score(QUERIES, texts) - again.score(QUERIES, texts)).max() < 1e-5
    assert np.abs(again.score(QUERIES, texts) - again.score(QUERIES, texts, batch_size=3)).max() < 1e-5
    config = json.loads((run_dir(RUN) / "reward_model" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and len(config["id2label"]) == 1


def test_reward_model_learns_a_plain_difference():
    pairs = [PreferencePair(id=str(i), query=q, chosen=good(q), rejected="祝祝祝祝祝祝祝祝祝祝") for i, q in enumerate(QUERIES)]
    trained = reward_model.train("learns", pairs, 1, model=str(sft.policy_dir(RUN, "base")), lora_rank=4, learning_rate=1e-2, num_train_epochs=6, **FAST)
    assert (reward_model.margins(trained.score, pairs) > 0).all()


def test_accuracy_counts_ties_as_wrong_and_survives_an_empty_slice():
    pairs = [PreferencePair(id=i, query="祝福", chosen="好", rejected="坏") for i in "abc"]
    table = reward_model.accuracy({"any": np.array([1.0, 0.0, -1.0])}, pairs, {"all": list("abc"), "none": []})
    assert table.value[0] == pytest.approx(1 / 3) and table.n.tolist() == [3, 0] and np.isnan(table.value[1])


@pytest.mark.parametrize("completion, text", [("  好 ", "好"), ([{"role": "assistant", "content": "好\n"}], "好")])
def test_text_of(completion, text): assert grpo.text_of(completion) == text


def test_rewards_say_none_for_what_they_cannot_know():
    score = lambda reward, texts, queries: asyncio.run(reward(None, texts, query=queries))
    assert score(grpo.JudgeReward(Verdicts(1, 0, None)), list("abc"), ["q"] * 3) == [1.0, 0.0, None]
    assert score(grpo.ConstraintReward(), ["一路平安，万事顺心。", "一路平安"], ["送别祝福八个字", "送别祝福"]) == [1.0, None]
    values = score(grpo.RewardModelReward(reward_model.RewardModel.load(run_dir(RUN) / "reward_model" / "model")), ["", "愿你平安" * 400], ["q", "q"])
    assert all(isinstance(value, float) and np.isfinite(value) for value in values)


def test_a_missing_verdict_is_no_grade(judged):
    judged(None)
    grpo.train(tiny(beta=0.0), "base-judge")
    start, end = (load_file(sft.policy_dir(RUN, name) / "model.safetensors") for name in ("base", "base-judge"))
    assert all(torch.equal(start[key], end[key]) for key in start)


def test_some_missing_verdicts_do_not_stop_training(judged):
    judged(1, None, 0)
    grpo.train(tiny(seed=2), "base-judge")
    log = pd.read_csv(sft.policy_dir(RUN, "base-judge") / "log.csv")
    assert log[log.metric == "reward"].value.between(0, 1).all() and np.isfinite(log[log.metric == "loss"].value).all()
    assert weights(sft.policy_dir(RUN, "base-judge")) != weights(sft.policy_dir(RUN, "base"))


def test_grpo_with_the_reward_model_is_deterministic():
    grpo.train(tiny(), "sft-rm")
    first = weights(sft.policy_dir(RUN, "sft-rm"))
    (sft.policy_dir(RUN, "sft-rm") / "policy.json").unlink()
    grpo.train(tiny(), "sft-rm")
    assert weights(sft.policy_dir(RUN, "sft-rm")) == first


def test_killed_stage_resumes_with_the_missing_run(judged, monkeypatch):
    judged(1, 0)
    names, settings = ["base-judge", "sft-judge"], tiny(seed=3)
    trained = grpo.trained
    monkeypatch.setattr(grpo, "trained", lambda trainer, name: (_ for _ in ()).throw(KeyboardInterrupt) if name == "sft-judge" else trained(trainer, name))
    with pytest.raises(KeyboardInterrupt): grpo.train_all(settings, names)
    assert grpo.done(settings, "base-judge") and not grpo.done(settings, "sft-judge")
    assert not list(run_dir(RUN).glob("grpo/.*"))
    finished = (sft.policy_dir(RUN, "base-judge") / "policy.json").stat().st_mtime_ns
    monkeypatch.setattr(grpo, "trained", trained)
    grpo.train_all(settings, names)
    assert grpo.done(settings, "sft-judge") and (sft.policy_dir(RUN, "base-judge") / "policy.json").stat().st_mtime_ns == finished
    assert not grpo.done(tiny(seed=4), "base-judge")


def test_a_new_start_or_reward_makes_a_run_stale():
    settings = tiny(seed=5)
    keys = {grpo.fingerprint(settings, name) for name in ("base-rm", "sft-rm", "base-judge", "sft-judge")}
    assert len(keys) == 4 and grpo.fingerprint(tiny(seed=6), "base-rm") not in keys
    before = grpo.fingerprint(settings, "base-judge")
    write_json(run_dir(RUN) / "adversarial" / "judge.json", {"principles": ["有「重复」，判 Bad"]})
    assert grpo.fingerprint(settings, "base-judge") != before


class Naive:
    "A reward that a policy would fool."
    __name__ = "judge"

    def __init__(self, rule): self.rule = rule

    async def __call__(self, prompts, completions, query, **kwargs): return [self.rule(text) for text in completions]


@pytest.mark.parametrize("rule, caught", [
    (lambda text: float(len(text)), {"padded", "injected"}), (lambda text: 1.0, {"empty", "truncated", "padded", "repeated", "praising", "injecting", "injected"}),
    (lambda text: None, {"empty", "truncated", "padded", "repeated", "praising", "injecting", "injected"}),
    (lambda text: float(text in grpo.SOUND.values()), set())])
def test_preflight_catches(rule, caught):
    table = asyncio.run(grpo.preflight(Naive(rule)))
    failed = set(table[~table.passed].kind)
    assert caught <= failed and (caught or not failed)
    if caught:
        with pytest.raises(KitError, match="failed its preflight"): grpo.demand(table, ["judge"])
    grpo.demand(table, [])


def test_batches_follow_the_paper():
    assert grpo.batches(grpo.Settings(RUN), processes=4) == dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, generation_batch_size=128, num_generations=4)
    for wrong in (dict(micro_batch=7), dict(prompts_per_update=12)):
        with pytest.raises(KitError): grpo.batches(grpo.Settings(RUN, **wrong))


@pytest.mark.parametrize("call, words", [
    (lambda: sft.policy_dir(RUN, "sft-length"), "unknown"),
    (lambda: sft.load_policy(sft.policy_dir("nobody", "base")), "is missing"),
    (lambda: sft.train_sft("nobody", 1, **FAST), "is missing"),
    (lambda: sft.train_base("nobody", 1, vocabulary=400, shape=SHAPE, **FAST), "01_data"),
    (lambda: sft.bf16("half"), "not one of"),
    (lambda: reward_model.RewardModel.load("nowhere"), "08_reward_model"),
    (lambda: reward_model.training_pairs(RUN, "multi_agent"), "pairs.jsonl"),
    (lambda: reward_model.training_pairs(RUN, "elsewhere"), "not one of"),
    (lambda: grpo.reward_of("nobody", "rm"), "08_reward_model"),
    (lambda: grpo.reward_of(RUN, "length"), "unknown"),
    (lambda: grpo.train(grpo.Settings("nobody"), "base-rm"), "is missing"),
    (lambda: grpo.train(tiny(prompts_per_rollout=64, prompts_per_update=64), "base-rm"), "fewer than one rollout"),
])
def test_one_clear_sentence(call, words):
    with pytest.raises(KitError, match=words): call()


def test_a_run_in_its_own_process_says_why_it_failed(home):
    write_json(run_dir("nobody") / "grpo" / "settings.json", {"run": "nobody"})
    ended = subprocess.run([sys.executable, "-m", "creawrite.grpo", run_dir("nobody") / "grpo" / "settings.json", "base-rm"], capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 1 and "is missing" in ended.stderr and "Traceback" not in ended.stderr
