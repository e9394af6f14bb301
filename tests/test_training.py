"""Base, SFT, reward model and GRPO: real TRL on models of a few thousand weights, and what makes each of them stale."""
import asyncio, functools, hashlib, json, shutil, subprocess, sys
from dataclasses import asdict
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from creawrite import grpo, policies, reward_model, rewards, sft, trainers
from creawrite.core import KitError, run_dir, write_json, write_jsonl
from creawrite.policies import policy_dir
from creawrite.rewards import RewardModel
from creawrite.settings import defaults
from creawrite.splits import PreferencePair
from creawrite.task import TASK

from conftest import REPOSITORY

RUN = "training"
SHAPE = dict(hidden=16, layers=1, heads=2, intermediate=32)
FAST = dict(batch_size=8, max_length=96, precision="fp32", gradient_checkpointing=False)
QUERIES = [f"给{who}的{what}祝福"
           for who, what in product(("爷爷", "同桌", "邻居", "教练"), ("生日", "乔迁", "新年", "送别八个字"))]
STAGE = defaults("grpo")
PAPER = dict(prompts_per_rollout=32, num_generations=4, prompts_per_update=16, micro_batch=8)


def good(query): return f"愿{query[1:3]}日日有晴，岁岁有花，所想都如愿。"


def weights(folder): return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def tiny(**changes):
    settings = dict(run=RUN, engine="offline", precision="fp32", prompts_per_rollout=2, num_generations=2,
                    prompts_per_update=2, micro_batch=4, learning_rate=1e-3, max_steps=2,
                    max_prompt_length=96, max_completion_length=6)
    return grpo.pick_settings(STAGE | settings | changes)


def write_data():
    "Sixteen queries: twelve to learn from, four to test."
    data = run_dir(RUN) / "data"
    pairs = [{"id": f"p{i}", "query": q, "chosen": good(q), "rejected": f"祝{q[1:3]}快乐。"}
             for i, q in enumerate(QUERIES)]
    write_jsonl(data / "pairs_train.jsonl", pairs[:12])
    write_jsonl(data / "pairs_test.jsonl", pairs[12:])
    sft_rows = [{"id": f"s{i}", "query": q, "response": good(q)} for i, q in enumerate(QUERIES[:12])]
    write_jsonl(data / "sft.jsonl", sft_rows)
    write_jsonl(data / "prompts_train.jsonl", [{"id": f"g{i}", "query": q} for i, q in enumerate(QUERIES[:12])])
    write_jsonl(data / "prompts_test.jsonl", [{"id": f"t{i}", "query": q} for i, q in enumerate(QUERIES[12:])])
    write_json(run_dir(RUN) / "adversarial" / "judge.json", {"principles": ["跑题，判 Bad"]})


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A kit folder of our own with a trained base, SFT policy and reward model."
    folder = tmp_path_factory.mktemp("kit")
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        torch.set_num_threads(1)
        write_data()
        make_base()
        make_sft()
        make_reward_model()
        yield folder


def make_base(run=RUN, **changes):
    settings = dict(seed=1, model="", revision="", vocabulary=400, shape=SHAPE, learning_rate=3e-3, max_steps=3)
    sft.make_base(run, **settings | FAST | changes)


def make_sft(run=RUN, **changes):
    sft.make_sft(run, **dict(seed=1, lora_rank=0, learning_rate=1e-3, max_steps=2) | FAST | changes)


def make_reward_model(run=RUN, pairs=None, **changes):
    settings = dict(seed=1, model="", debias="none", lora_rank=4, learning_rate=1e-2, max_steps=2)
    pairs = pairs or reward_model.training_pairs(run, "data")
    reward_model.make_reward_model(run, "model", pairs, **settings | FAST | changes)
    return RewardModel.load(run_dir(run) / "reward_model" / "model")


def again(make, card):
    "Train once more, for the card is gone."
    card.unlink()
    return make()


class Verdicts:
    "A judge that answers from a list."
    def __init__(self, *answers): self.answers = answers

    async def grades(self, queries, responses): return list(islice(cycle(self.answers), len(responses)))


@pytest.fixture
def judged(monkeypatch):
    "Put a stand-in for the judge into the training loop."
    stand_in = lambda *answers: lambda *_: rewards.JudgeReward(Verdicts(*answers))
    return lambda *answers: monkeypatch.setattr(grpo, "reward_of", stand_in(*answers))


def test_same_seed_same_weights():
    folder = policy_dir(RUN, "base")
    first = weights(folder)
    again(make_base, folder / "policy.json")
    assert weights(folder) == first
    elsewhere = policies.new_model(policies.load_policy(folder)[1], seed=2, **SHAPE).state_dict()
    name = "model.embed_tokens.weight"
    assert not torch.equal(elsewhere[name], load_file(folder / "model.safetensors")[name])


def test_reward_model_same_seed_same_scores():
    card = run_dir(RUN) / "reward_model" / "model" / "reward_model.json"
    one, other = (again(make_reward_model, card).score(QUERIES, [good(q) for q in QUERIES]) for _ in range(2))
    assert (one == other).all()


def test_policy_card_and_log():
    card = json.loads((policy_dir(RUN, "sft") / "policy.json").read_text())
    assert card["parent"] == "base" and card["rows"] == 12 and card["parameters"] > 0
    log = pd.read_csv(run_dir(RUN) / "sft" / "log_sft.csv")
    assert list(log.columns) == ["step", "metric", "value"] and (log.metric == "loss").any()


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


def test_a_missing_verdict_is_no_grade(judged):
    judged(None)
    grpo.make_grpo(tiny(beta=0.0), "base-judge")
    start, end = (load_file(policy_dir(RUN, name) / "model.safetensors") for name in ("base", "base-judge"))
    assert all(torch.equal(start[key], end[key]) for key in start)


def test_some_missing_verdicts_do_not_stop_training(judged):
    judged(1, None, 0)
    grpo.make_grpo(tiny(seed=2), "base-judge")
    log = pd.read_csv(policy_dir(RUN, "base-judge") / "log.csv")
    assert log[log.metric == "reward"].value.between(0, 1).all()
    assert np.isfinite(log[log.metric == "loss"].value).all()
    assert weights(policy_dir(RUN, "base-judge")) != weights(policy_dir(RUN, "base"))


def test_grpo_with_the_reward_model_is_deterministic():
    make = lambda: grpo.make_grpo(tiny(), "sft-rm")
    make()
    first = weights(policy_dir(RUN, "sft-rm"))
    again(make, policy_dir(RUN, "sft-rm") / "policy.json")
    assert weights(policy_dir(RUN, "sft-rm")) == first


def test_killed_stage_resumes_with_the_missing_run(judged, monkeypatch):
    judged(1, 0)
    names, settings = ["base-judge", "sft-judge"], tiny(seed=3)
    run_trainer = grpo.run_trainer

    def killed(trainer, name):
        if name == "sft-judge": raise KeyboardInterrupt
        return run_trainer(trainer, name)

    monkeypatch.setattr(grpo, "run_trainer", killed)
    with pytest.raises(KeyboardInterrupt): grpo.train_all(settings, names, 1, 1)
    assert grpo.grpo_unchanged(settings, "base-judge") and not grpo.grpo_unchanged(settings, "sft-judge")
    assert not list(run_dir(RUN).glob("grpo/.*"))
    card = policy_dir(RUN, "base-judge") / "policy.json"
    finished = card.stat().st_mtime_ns
    monkeypatch.setattr(grpo, "run_trainer", run_trainer)
    grpo.train_all(settings, names, 1, 1)
    assert grpo.grpo_unchanged(settings, "sft-judge") and card.stat().st_mtime_ns == finished
    assert not grpo.grpo_unchanged(tiny(seed=4), "base-judge")


def test_a_new_start_or_reward_makes_a_run_stale():
    settings = tiny(seed=5)
    keys = {grpo.grpo_fingerprint(settings, name) for name in ("base-rm", "sft-rm", "base-judge", "sft-judge")}
    assert len(keys) == 4 and grpo.grpo_fingerprint(tiny(seed=6), "base-rm") not in keys
    before = grpo.grpo_fingerprint(settings, "base-judge")
    write_json(run_dir(RUN) / "adversarial" / "judge.json", {"principles": ["有「重复」，判 Bad"]})
    assert grpo.grpo_fingerprint(settings, "base-judge") != before


def test_the_judges_engine_is_nothing_to_the_reward_model(monkeypatch):
    "Nor is the weight of a reward that is not used; the name of the run is nothing to either."
    keys = lambda **changes: [grpo.grpo_fingerprint(tiny(**changes), name) for name in ("base-rm", "base-judge")]
    rm, judge = keys(engine="offline")
    monkeypatch.setenv("CREAWRITE_MODEL", "some-model")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    other_rm, other_judge = keys(engine="endpoint")
    assert rm == other_rm and judge != other_judge
    assert not {rm, judge} & set(keys(engine="offline", constraint_weight=0.5))


class Naive:
    "A reward that a policy would fool."
    __name__ = "judge"

    def __init__(self, rule): self.rule = rule

    async def __call__(self, prompts, completions, query, **kwargs): return [self.rule(text) for text in completions]


EVERY = {"empty", "truncated", "padded", "repeated", "praising", "injecting", "injected"}


@pytest.mark.parametrize("rule, caught", [
    (lambda text: float(len(text)), {"padded", "injected"}), (lambda text: 1.0, EVERY), (lambda text: None, EVERY),
    (lambda text: float(text in TASK.sound.values()), set())])
def test_preflight_catches(rule, caught):
    table = asyncio.run(rewards.preflight(Naive(rule)))
    failed = set(table[~table.passed].kind)
    assert caught <= failed and (caught or not failed)
    if caught:
        with pytest.raises(KitError, match="failed its preflight"): rewards.demand_preflight(table, ["judge"])
    rewards.demand_preflight(table, [])


def test_batches_follow_the_paper():
    assert grpo.trl_batches(tiny(**PAPER), processes=4) == dict(
        per_device_train_batch_size=8, gradient_accumulation_steps=2, generation_batch_size=128, num_generations=4)
    for wrong in (dict(micro_batch=7), dict(prompts_per_update=12)):
        with pytest.raises(KitError): grpo.trl_batches(tiny(**PAPER | wrong))


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
    (lambda: grpo.make_grpo(tiny(run="nobody"), "base-rm"), "is missing"),
    (lambda: grpo.make_grpo(tiny(prompts_per_rollout=64, prompts_per_update=64), "base-rm"), "fewer than one rollout"),
    (lambda: grpo.pick_settings({"run": RUN}), "lack seed"),
])
def test_one_clear_sentence(call, words):
    with pytest.raises(KitError, match=words): call()


def grpo_process(run: str, settings: dict):
    "python -m creawrite.grpo for one run."
    path = run_dir(run) / "grpo" / "settings.json"
    write_json(path, settings)
    command = [sys.executable, "-m", "creawrite.grpo", path, "base-rm"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("settings, words", [
    (asdict(tiny(run="nobody")), "is missing"), ({"run": "nobody"}, "lack seed")])
def test_a_run_in_its_own_process_says_why_it_failed(home, settings, words):
    ended = grpo_process("nobody", settings)
    assert ended.returncode == 1 and words in ended.stderr and "Traceback" not in ended.stderr


def test_a_run_in_a_process_of_its_own_is_the_same_run(home, capfd):
    "Its fingerprint too: whoever started it sees that it is there."
    grpo.make_grpo(tiny(seed=8), "base-rm")
    card = policy_dir(RUN, "base-rm") / "policy.json"
    first = weights(card.parent)
    again(lambda: grpo.train_all(tiny(seed=8), ["base-rm"], workers=2, gpus=1), card)
    assert weights(card.parent) == first and grpo.grpo_unchanged(tiny(seed=8), "base-rm")
    capfd.readouterr()
    grpo.train_all(tiny(seed=8), ["base-rm"], workers=2, gpus=1)
    assert capfd.readouterr().out == "base-rm: trained before, unchanged\n"


class Started(Exception): "A training would run now."


TRAININGS = {"base": make_base, "sft": make_sft, "reward model": make_reward_model,
             "base-rm": lambda: grpo.make_grpo(tiny(seed=9), "base-rm"),
             "base-judge": lambda: grpo.make_grpo(tiny(seed=9), "base-judge")}


@pytest.fixture(scope="module")
def trained(home):
    "All five trained, and a copy of the package in the kit, so that its code may be edited."
    shutil.copytree(REPOSITORY / "creawrite", home / "creawrite", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "reward_of", lambda *_: rewards.JudgeReward(Verdicts(1, 0)))
        for make in TRAININGS.values(): make()
    yield home / "creawrite"
    shutil.rmtree(home / "creawrite")


@pytest.fixture
def stale(trained, monkeypatch):
    "A function that says which trainings would run now; none of them does."
    places = [(sft, "train_base"), (sft, "train_sft"), (reward_model, "train_reward_model"), (grpo, "train_grpo")]
    for module, name in places:
        @functools.wraps(getattr(module, name))
        def start(*arguments, **settings): raise Started
        monkeypatch.setattr(module, name, start)
    monkeypatch.setattr(grpo, "reward_of", lambda *_: None)

    def names():
        started = set()
        for name, make in TRAININGS.items():
            try: make()
            except Started: started.add(name)
        return started
    return names


def test_nothing_changed_nothing_trained(stale, capsys):
    assert stale() == set()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: trained before, unchanged"
                     for name in ("base", "sft", "reward_model/model", "base-rm", "base-judge")]


@pytest.mark.parametrize("module, old, new, changed", [
    ("rewards", "return self.model.score(query,", "return 2 * self.model.score(query,", "base-rm"),
    ("rewards", "return scores - self.per_character", "return scores - 2 * self.per_character", "base-rm"),
    ("rewards", "await self.judge.grades(query,", "await self.judge.grades(list(query),", "base-judge"),
    ("rewards", "float(keeps(rule,", "2 * float(keeps(rule,", ""),  # its weight is 0
    ("judge", "1.0 if sample else 0.0", "1.5 if sample else 0.0", "base-judge"),
    ("task", "你评判一条祝福语", "你评一条祝福语", "base-judge"),
    ("task", "请只生成一条祝福语", "请生成一条祝福语", "base, sft, reward model, base-rm, base-judge"),
    ("trainers", "lora_alpha=2 * rank", "lora_alpha=3 * rank", "base, sft, reward model, base-rm, base-judge"),
    ("trainers", "random = np.random.default_rng(seed)", "random = np.random.default_rng(seed + 1)",
     "base, sft, reward model"),
    ("sft", "warmup_steps=0.05", "warmup_steps=0.1", "base, sft"),
    ("sft", "for text in (pair.chosen, pair.rejected)", "for text in (pair.rejected, pair.chosen)", "base"),
    ("reward_model", "warmup_steps=0.05", "warmup_steps=0.1", "reward model"),
    ("reward_model", "gaps @ differences", "2 * gaps @ differences", ""),  # the trend is not part of this model
    ("grpo", 'lr_scheduler_type="constant"', 'lr_scheduler_type="linear"', "base-rm, base-judge"),
    ("policies", "temperature=temperature, top_k=0", "temperature=temperature, top_k=9", ""),  # TRL samples by itself
    ("sft", "losses.plot(", "losses.rename().plot(", ""),
    ("grpo", "alpha=0.3", "alpha=0.4", ""),
    ("figures", '"savefig.dpi": 160', '"savefig.dpi": 300', ""),
    ("trainers", "is not one of auto, bf16, fp32", "must be auto, bf16 or fp32", ""),
    ("grpo", "training prompts are fewer than", "prompts are too few, less than", ""),
    ("rewards", "holds no reward model: run", "holds none: run", ""),
    ("policies", "check its name, or the network", "look at its name", ""),
    ("trainers", "{self.name}: step", "{self.name}: update", ""),
])
def test_an_edit_repeats_the_trainings_that_it_reaches_and_no_other(stale, trained, module, old, new, changed):
    path = trained / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text, "the edit finds its place"
    try:
        path.write_text(text.replace(old, new), encoding="utf-8")
        assert stale() == set(filter(None, changed.split(", ")))
    finally: path.write_text(text, encoding="utf-8")
    assert stale() == set()


@pytest.mark.parametrize("name, changed", [
    ("pairs_train", "base, reward model"), ("sft", "sft"), ("prompts_train", "base-rm, base-judge"),
    ("prompts_test", "")])
def test_other_rows_repeat_the_trainings_that_read_them(stale, name, changed):
    path = run_dir(RUN) / "data" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        path.write_text("".join(lines[1:]), encoding="utf-8")
        assert stale() == set(filter(None, changed.split(", ")))
    finally: path.write_text("".join(lines), encoding="utf-8")


def test_a_base_trained_again_to_the_same_weights_makes_nothing_stale(trained):
    "And one with other weights makes everything stale that starts from it."
    again(make_base, policy_dir(RUN, "base") / "policy.json")
    before = grpo.grpo_fingerprint(tiny(seed=9), "base-rm")
    assert grpo.grpo_unchanged(tiny(seed=9), "base-rm")
    make_base(seed=2)
    assert grpo.grpo_fingerprint(tiny(seed=9), "base-rm") != before
