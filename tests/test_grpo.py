"""GRPO: real TRL on models of a few thousand weights."""
import os, sys
from contextlib import nullcontext
from dataclasses import asdict

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from trl.trainer import grpo_trainer as rl_trainer

from creawrite import canary as canary_module, grpo, policies, rewards, rl, trainers
from creawrite.canary import canary
from creawrite.core import KitError, read_json, read_jsonl, run_dir, write_json
from creawrite.policies import policy_dir
from creawrite.settings import read_stage
from creawrite.splits import load_split
from creawrite.watch import Watch, best_step, heldout_rewards

from conftest import REPOSITORY
from processes import die, ended, side_by_side, start
from small_kit import QUERIES, RUN, Verdicts, again, small_kit, weights

STAGE = {name: each.default for name, each in read_stage(REPOSITORY / "nbs/07_grpo.ipynb").parameters.items()}
PAPER = dict(prompts_per_rollout=32, num_generations=4, prompts_per_update=16, micro_batch=8)


def tiny(**changes):
    settings = dict(run=RUN, engine="offline", precision="fp32", prompts_per_rollout=2, num_generations=2,
                    prompts_per_update=2, micro_batch=4, learning_rate=1e-3, max_steps=2,
                    max_prompt_length=96, max_completion_length=6, n_watch=2, checkpoint_every=1)
    return rl.pick_settings(STAGE | settings | changes)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with small_kit(tmp_path_factory.mktemp("kit")) as folder: yield folder


@pytest.fixture
def judged(monkeypatch):
    "Put a stand-in for the judge into the training loop."
    stand_in = lambda *answers: lambda *_: rewards.JudgeReward(Verdicts(*answers))
    return lambda *answers: monkeypatch.setattr(grpo, "reward_of", stand_in(*answers))


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


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_grpo_with_the_reward_model_is_deterministic(lora_rank):
    "Whatever was drawn before in this process."
    make = lambda: grpo.make_grpo(tiny(lora_rank=lora_rank), "sft-rm")
    torch.manual_seed(5)
    make()
    first = weights(policy_dir(RUN, "sft-rm"))
    torch.manual_seed(6)
    again(make, policy_dir(RUN, "sft-rm") / "policy.json")
    assert weights(policy_dir(RUN, "sft-rm")) == first


def test_killed_stage_resumes_with_the_missing_run(judged, monkeypatch):
    judged(1, 0)
    names, settings = ["base-judge", "sft-judge"], tiny(seed=3)
    run_trainer = rl.run_trainer

    def killed(trainer, name, *arguments):
        if name == "sft-judge": raise KeyboardInterrupt
        return run_trainer(trainer, name, *arguments)

    monkeypatch.setattr(rl, "run_trainer", killed)
    with pytest.raises(KeyboardInterrupt): grpo.train_all(settings, names, 1, 1, "")
    assert grpo.grpo_unchanged(settings, "base-judge") and not grpo.grpo_unchanged(settings, "sft-judge")
    assert not list(run_dir(RUN).glob("grpo/.*"))
    card = policy_dir(RUN, "base-judge") / "policy.json"
    finished = card.stat().st_mtime_ns
    monkeypatch.setattr(rl, "run_trainer", run_trainer)
    grpo.train_all(settings, names, 1, 1, "")
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


def test_batches_follow_the_paper():
    assert rl.trl_batches(tiny(**PAPER), processes=4) == dict(
        per_device_train_batch_size=8, gradient_accumulation_steps=2, generation_batch_size=128, num_generations=4)
    for wrong in (dict(micro_batch=7), dict(prompts_per_update=12)):
        with pytest.raises(KitError): rl.trl_batches(tiny(**PAPER | wrong))


@pytest.mark.parametrize("call, words", [
    (lambda: grpo.make_grpo(tiny(run="nobody"), "base-rm"), "is missing"),
    (lambda: grpo.make_grpo(tiny(prompts_per_rollout=64, prompts_per_update=64), "base-rm"), "fewer than one rollout"),
    (lambda: rl.pick_settings({"run": RUN}), "lack seed"),
])
def test_one_clear_sentence(call, words):
    with pytest.raises(KitError, match=words): call()


def command(file): sys.exit(grpo.train_command([str(file), "base-rm"]))


@pytest.mark.parametrize("settings, words", [
    (asdict(tiny(run="nobody")), "is missing"), ({"run": "nobody"}, "lack seed")])
def test_a_run_in_its_own_process_says_why_it_failed(home, settings, words, tmp_path):
    write_json(tmp_path / "settings.json", settings)
    here = {"CREAWRITE_ROOT": str(home)}
    assert ended(start(command, tmp_path / "settings.json", environment=here, told=tmp_path / "told")) == [1]
    told = (tmp_path / "told").read_text()
    assert words in told and "Traceback" not in told


def test_a_run_in_a_process_of_its_own_is_the_same_run(home, capfd):
    "Its fingerprint too: whoever started it sees that it is there."
    grpo.make_grpo(tiny(seed=8), "base-rm")
    card = policy_dir(RUN, "base-rm") / "policy.json"
    first = weights(card.parent)
    again(lambda: grpo.train_all(tiny(seed=8), ["base-rm"], workers=2, gpus=1, accelerate_config=""), card)
    assert weights(card.parent) == first and grpo.grpo_unchanged(tiny(seed=8), "base-rm")
    capfd.readouterr()
    grpo.train_all(tiny(seed=8), ["base-rm"], workers=2, gpus=1, accelerate_config="")
    assert capfd.readouterr().out == "base-rm: trained before, unchanged\n"


# ---- the trainer: given rollouts, what does it learn from them?

class Scripted:
    "Rollouts and rewards that a test gives: round by round, a completion and a reward for each row."
    __name__ = "scripted"

    def __init__(self, *rounds): self.rounds, self.asked = rounds, []

    def write(self, prompts, trainer):
        "TRL's rollout_func."
        self.texts, self.values = self.rounds[min(len(self.asked), len(self.rounds) - 1)]
        self.asked.append([prompt[0]["content"] for prompt in prompts])
        tokenizer = trainer.processing_class
        ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
        answers = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in self.texts[:len(prompts)]]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

    def __call__(self, prompts, completions, **columns): return list(self.values[:len(completions)])


def trainer_of(script=None, rewards=None, loss="dapo", rate=0.0, lora=0, gate=None, **changes):
    "The trainer of a run that starts from base, its weights moved a little, so that KL counts."
    settings = tiny(**dict(max_completion_length=24, micro_batch=2, checkpoint_every=0) | changes)
    policy, rewards = policy_dir(RUN, "base"), rewards or [script]
    tokenizer = policies.load_policy(policy)[1]
    config = rl.grpo_config(settings, "toy", {}, [1.0] * len(rewards))
    config.loss_type, config.max_steps = loss, settings.max_steps
    rows, _ = rl.watched(rl.prompt_rows(load_split(RUN, "prompts_train"), settings, tokenizer), settings.n_watch)
    trainer = rl.KitGRPOTrainer(
        str(policy), rewards, config, datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=trainers.lora_config(lora, task_type="CAUSAL_LM"), rollout_func=script and script.write,
        dead_groups=settings.dead_groups, resample_rounds=settings.resample_rounds, gate=gate)
    torch.manual_seed(1)
    for weight in trainer.model.parameters(): weight.data += 0.05 * torch.randn_like(weight)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return trainer


def gradient(trainer, inputs=None):
    "Of one update, as one vector."
    batch = next(iter(trainer.get_train_dataloader()))
    micro = inputs or [trainer._prepare_inputs(batch)] + trainer._buffered_inputs[1:]
    trainer.model.zero_grad()
    for each in micro: trainer.compute_loss(trainer.model, each).backward()
    return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])


TEXTS = ["愿你日日有晴", "岁岁有花，所想都如愿，天天开心，事事顺利。", "好", "祝福你，" * 6]
ROLLOUT = TEXTS, [1.0, 0.0, 0.5, 0.2]


def test_the_gradient_is_that_of_trl_and_little_is_padding(monkeypatch):
    trainer = trainer_of(Scripted(ROLLOUT), beta=0.1)
    ours = gradient(trainer)
    assert 0 < trainer.tokens <= trainer.computed and 1 - trainer.tokens / trainer.computed < rl.WASTE
    monkeypatch.setattr(rl.KitGRPOTrainer, "_get_per_token_logps_and_entropies",
                        rl.GRPOTrainer._get_per_token_logps_and_entropies)
    theirs = gradient(trainer_of(Scripted(ROLLOUT), beta=0.1))
    monkeypatch.setattr(rl.KitGRPOTrainer, "_prepare_inputs", rl.GRPOTrainer._prepare_inputs)
    plain = gradient(trainer_of(Scripted(ROLLOUT), beta=0.1))
    assert ours.abs().max() > 1e-3 and (ours - theirs).abs().max() < 1e-6 and (ours - plain).abs().max() < 1e-6


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_a_completion_without_reward_has_no_influence(loss):
    "Whatever it says and however long it is; and its group's mean is that of the others."
    values = [1.0, None, 0.0, 0.3]
    others = [[TEXTS[0], text, TEXTS[2], TEXTS[3]] for text in ("一", TEXTS[1] * 2)]
    grads = [gradient(trainer_of(Scripted((texts, values)), loss=loss, beta=0.1, num_generations=4,
                                 prompts_per_rollout=1, prompts_per_update=1, micro_batch=4)) for texts in others]
    assert grads[0].abs().max() > 1e-4 and (grads[0] - grads[1]).abs().max() < 1e-6
    trainer = trainer_of(Scripted((others[0], values)), num_generations=4, prompts_per_rollout=1, prompts_per_update=1)
    rollout = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    expected = torch.tensor([1.0, 0.0, 0.3])
    expected = (expected - expected.mean()) / (expected.std() + 1e-4)
    assert torch.allclose(rollout["advantages"][[0, 2, 3]], expected, atol=1e-5) and rollout["advantages"][1] == 0
    assert rollout["completion_mask"][1].sum() == 0 and rollout["completion_mask"][0].sum() > 0


def test_a_missing_main_reward_is_missing_whatever_its_parts_say():
    part = Scripted(ROLLOUT)
    main = Scripted((TEXTS, [1.0, 0.0, None, 0.2]))
    main.__name__, part.values = "main", [0.0, 0.0, 9.0, 0.0]
    rollout = trainer_of(main, rewards=[main, part])
    rollout = rollout._generate_and_score_completions(next(iter(rollout.get_train_dataloader())))
    assert rollout["missing"].tolist() == [False, False, True, False] and rollout["advantages"][2:].abs().sum() == 0


@pytest.mark.parametrize("dead, moves", [("keep", True), ("mask", False)])
def test_a_dead_group_takes_a_kl_step_unless_it_is_masked(dead, moves):
    equal = TEXTS, [0.1] * 4
    step = gradient(trainer_of(Scripted(equal), dead_groups=dead, beta=0.1)).abs().max()
    assert (step > 1e-5) == moves and (moves or step == 0)


def test_dead_groups_are_drawn_anew():
    "Once or as often as is allowed; what is alive stays as it was, and what stays dead is masked."
    dead, half = (TEXTS, [0.5] * 4), (TEXTS, [1.0, 0.0, 0.5, 0.5])
    again = (["新的", "新的一年"], [0.0, 1.0])
    script = Scripted(half, again)
    trainer = trainer_of(script, dead_groups="resample", resample_rounds=2)
    rows = next(iter(trainer.get_train_dataloader()))
    rollout = trainer._generate_and_score_completions(rows)
    assert script.asked[1] == script.asked[0][2:] and len(script.asked) == 2
    texts = trainer.processing_class.batch_decode(rollout["completion_ids"], skip_special_tokens=True)
    assert texts == [*TEXTS[:2], *again[0]] and rollout["advantages"].sign().tolist() == [1, -1, -1, 1]
    metrics = trainer._metrics["train"]
    assert metrics["live_groups"] == [1.0] and metrics["resampled"] == [1.0] and metrics["reward"] == [0.5]
    script = Scripted(dead)
    trainer = trainer_of(script, dead_groups="resample", resample_rounds=2)
    rollout = trainer._generate_and_score_completions(rows)
    assert len(script.asked) == 3 and rollout["completion_mask"].sum() == 0
    assert trainer._metrics["train"]["live_groups"] == [0.0] and trainer._metrics["train"]["resampled"] == [4.0]


def test_what_breaks_a_constraint_has_no_positive_advantage():
    kept = [False, True, False, None]
    trainer = trainer_of(Scripted(ROLLOUT), gate=lambda queries, completions: kept)
    rollout = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert rollout["advantages"][0] == 0 and rollout["advantages"][1] < 0
    assert rollout["advantages"][2] == 0 and rollout["advantages"][3] < 0


# ---- the canary

@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    "A policy whose tokens lie far enough apart for an adapter to choose among them."
    model, tokenizer = policies.load_policy(policy_dir(RUN, "base"))
    model.model.embed_tokens.weight.data *= 20
    policies.save_model(folder := tmp_path_factory.mktemp("lively") / "policy", model, tokenizer, name="base")
    return folder


def fly(policy, **changes):
    "The canary, with completions as long as its own."
    return canary(tiny(max_completion_length=16, **changes), policy, load_split(RUN, "prompts_train"))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_canary_lives(lively, lora_rank):
    verdict = fly(lively, lora_rank=lora_rank)
    assert verdict["after"] > verdict["before"] and verdict["gap"] < 1e-4


@pytest.mark.parametrize("lora_rank, heard, words", [
    (0, True, "sampler and trainer disagree"), (4, True, "sampler and trainer disagree"), (0, False, "another model")])
def test_the_canary_dies_where_training_does_not_reach_the_rollouts(lively, lora_rank, heard, words, monkeypatch):
    "They are written by a copy of the policy; `heard`: it answers to the hook of the policy's own model."
    stranger = policies.load_policy(lively)[0]

    def unwrap(model, *_, **__):
        if heard: stranger._forward_hooks = (model.get_base_model() if lora_rank else model)._forward_hooks
        return nullcontext(stranger)
    monkeypatch.setattr(rl_trainer, "unwrap_model_for_generation", unwrap)
    with pytest.raises(KitError, match=f"the canary died: .*{words}"): fly(lively, lora_rank=lora_rank)


def test_the_canary_dies_where_nothing_is_trained(lively, monkeypatch):
    monkeypatch.setattr(canary_module, "toy_rate", lambda *_: 0.0)
    with pytest.raises(KitError, match="which chance does too"): fly(lively)


# ---- killed, watched, ended early, in two processes

SLOW = dict(prompts_per_rollout=4, prompts_per_update=2, max_steps=6, checkpoint_every=2, keep="best", beta=0.01)


def result():
    "Weights, log (without what is measured in seconds), samples and facts of base-rm."
    folder = policy_dir(RUN, "base-rm")
    log = pd.read_csv(folder / "log.csv")
    log = log[~log.metric.str.contains("runtime|per_second|step_time")].fillna("").values.tolist()
    return weights(folder), log, read_jsonl(folder / "samples.jsonl"), read_json(folder / "policy.json")


def make_until(where):
    "The command; `where` it is killed."
    generating, saving = rl.KitGRPOTrainer._generate_single_turn, rl.KitGRPOTrainer._save_rng_state
    if where == "in a rollout":
        rl.KitGRPOTrainer._generate_single_turn = lambda self, *arguments, **settings: (
            die() if self.state.global_step == 4 else generating(self, *arguments, **settings))
    if where == "in an update":
        Watch.on_step_begin = lambda self, args, state, control, **settings: die() if state.global_step == 3 else None
    if where == "while saving":
        rl.KitGRPOTrainer._save_rng_state = lambda self, folder: (
            die() if folder.endswith("-4") else saving(self, folder))
    if where == "before its result is there": pd.DataFrame.to_csv = die  # the weights are there
    grpo.make_grpo(tiny(**SLOW), "base-rm")


@pytest.fixture(scope="module")
def whole(home):
    "The run that nobody killed."
    make_until("nowhere")
    return result()


@pytest.mark.parametrize("where, last", [
    ("in a rollout", 4), ("in an update", 2), ("while saving", 2), ("before its result is there", 4)])
def test_killed_and_started_again_it_is_the_same_run(whole, where, last, home, tmp_path):
    "Its curve, its samples and its weights, bit for bit; step 4 is the end of an epoch."
    (policy_dir(RUN, "base-rm") / "policy.json").unlink()
    here = {"CREAWRITE_ROOT": str(home)}
    assert ended(start(make_until, where, environment=here)) == [-9]
    assert not (policy_dir(RUN, "base-rm") / "policy.json").exists()
    assert ended(start(make_until, "nowhere", environment=here, told=tmp_path / "told")) == [0]
    assert f"base-rm: goes on from checkpoint-{last}\n" in (tmp_path / "told").read_text()
    assert result() == whole and not list(run_dir(RUN).glob("grpo/.*"))


def test_the_samples_say_how_the_watched_prompts_fare(whole):
    weight, log, samples, card = whole
    assert [row["step"] for row in samples] == [0, 0, 2, 2, 4, 4, 6, 6]
    trained_on = {row.query for row in load_split(RUN, "prompts_train")[:-2]}
    assert len({row["query"] for row in samples}) == 2 and not {row["query"] for row in samples} & trained_on
    curve = {step: value for step, metric, value in log if metric == "heldout/reward"}
    assert curve == pytest.approx(heldout_rewards(samples)) and list(curve) == [0, 2, 4, 6]
    assert card["steps"] == 6 and card["kept_step"] == best_step(samples) and card["stopped"] == ""
    padding = [value for _, metric, value in log if metric == "padding"]
    assert len(padding) == 6 and max(padding) < 0.1
    assert {value for _, metric, value in log if metric == "live_groups"} <= {0, 0.25, 0.5, 0.75, 1}


def test_the_weights_that_stay_are_those_of_the_best_step(home, monkeypatch):
    "Trained up to that step, with nothing to choose, they are the same."
    rewarded = iter([[0, 0], [5, 5], [1, 1], [2, 2]])
    monkeypatch.setattr(rl.KitGRPOTrainer, "ask", lambda *_: next(rewarded))
    grpo.make_grpo(tiny(**SLOW, seed=11), "base-rm")
    card, best = read_json(policy_dir(RUN, "base-rm") / "policy.json"), weights(policy_dir(RUN, "base-rm"))
    assert card["kept_step"] == 2 and card["steps"] == 6
    monkeypatch.undo()
    grpo.make_grpo(tiny(**SLOW | dict(max_steps=2, keep="last"), seed=11), "base-rm")
    assert weights(policy_dir(RUN, "base-rm")) == best


def test_a_collapsed_run_ends_early(judged, capsys):
    judged(1, None, None, None)
    grpo.make_grpo(tiny(max_steps=9, n_watch=0), "base-judge")
    card = read_json(policy_dir(RUN, "base-judge") / "policy.json")
    assert card["steps"] == 4 and "the reward is missing for" in card["stopped"]
    assert f"base-judge: ended early at update 4, for {card['stopped']}" in capsys.readouterr().out
    grpo.make_grpo(tiny(max_steps=9, n_watch=0, stop_on_collapse=False), "base-judge")
    assert read_json(policy_dir(RUN, "base-judge") / "policy.json")["steps"] == 9


def by_length(prompts, completions, **columns): return [float(len(rewards.text_of(text)) % 7) for text in completions]


def written(prompts, trainer):
    "Rollouts that depend on the row of the whole batch, however many processes share it."
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
    texts = ["祝福" * (1 + row % 5) + QUERIES[row % 16] for row in range(first, first + len(prompts))]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    return {"prompt_ids": ids, "completion_ids": [tokenizer(text).input_ids for text in texts], "logprobs": None}


def train_given(file):
    "Four updates on given rollouts; the first process keeps the weights."
    script = Scripted(ROLLOUT)
    script.write = written
    trainer = trainer_of(script, rewards=[by_length], beta=0.1, prompts_per_rollout=4, prompts_per_update=4,
                         num_generations=4, max_steps=4, dead_groups="mask")
    trainer.train()
    trained = {name.removeprefix("module."): weight.detach() for name, weight in trainer.model.named_parameters()}
    if os.environ.get("RANK", "0") == "0": save_file(trained, file)


def test_two_processes_learn_from_given_rollouts_as_one_does(home, tmp_path):
    """To 1e-5: sums are rounded in another order. What they would sample differs, for each has random numbers of its
    own; so does which rows of a rollout go into which of its updates."""
    train_given(tmp_path / "one")
    assert side_by_side(train_given, tmp_path / "two") == [0, 0]
    start, one, two = (load_file(path) for path in (policy_dir(RUN, "base") / "model.safetensors", tmp_path / "one",
                                                    tmp_path / "two"))
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one | two)
    assert max((one[key] - start[key]).abs().max() for key in start) > 1e-3


@pytest.mark.parametrize("name, kind", [("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_accelerate_takes_our_files(name, kind):
    "Every key, by accelerate's own loader and launcher."
    file = str(REPOSITORY / f"docs/accelerate/{name}.yaml")
    config = load_config_from_file(file)
    assert config.distributed_type == kind and config.mixed_precision == "bf16"
    given = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "4", "train.py"])
    told, *_ = _validate_launch_command(given)
    told.deepspeed_fields_from_accelerate_config = ""  # the launcher's next line
    environment = prepare_multi_gpu_env(told) if kind == "FSDP" else prepare_deepspeed_cmd_env(told)[1]
    assert environment[f"ACCELERATE_USE_{kind}"] == "true" and told.num_processes == 4
    stage = {"FSDP": ("FSDP_VERSION", "2"), "DEEPSPEED": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")}[kind]
    assert environment[stage[0]] == stage[1]


def test_a_further_seed_is_a_run_of_its_own(home):
    "The one that the run would be with that seed, beside it."
    for name in ("sft-rm", "sft-rm-43"): grpo.make_grpo(tiny(max_steps=1), name)
    first, further = (policy_dir(RUN, name) for name in ("sft-rm", "sft-rm-43"))
    assert read_json(further / "policy.json")["settings"]["seed"] == 43 and weights(first) != weights(further)
    known = policies.trained_policies(RUN)
    assert known.index("sft-rm-43") == known.index("sft-rm") + 1
    grpo.make_grpo(tiny(max_steps=1, seed=43), "sft-rm")
    assert weights(first) == weights(further) and grpo.grpo_unchanged(tiny(max_steps=1), "sft-rm-43")


def test_base_weights_may_be_bfloat16_under_an_adapter(home):
    grpo.make_grpo(tiny(lora_rank=2, base_dtype="bf16", learning_rate=0.1), "base-rm")
    start, end = (load_file(policy_dir(RUN, name) / "model.safetensors") for name in ("base", "base-rm"))
    assert {weight.dtype for weight in end.values()} == {torch.bfloat16}
    changed = {name for name in start if not torch.equal(start[name].bfloat16(), end[name])}
    assert changed and all("proj" in name for name in changed)


def values_of(**changes): return STAGE | asdict(tiny(max_completion_length=12)) | changes


@pytest.mark.parametrize("changes, words", [
    (dict(dead_groups="drop"), "grpo.dead_groups = 'drop' is not one of keep, mask, resample"),
    (dict(preflight="yes"), "grpo.preflight = 'yes' is not one of warn, stop"),
    (dict(judge_mode="grade"), "the nearest is 'graded'"),
    (dict(seeds=[42]), "repeats a seed, or names the run's own"), (dict(seeds=[1.5]), "take whole numbers"),
    (dict(seeded=["sft"]), "grpo.seeded names 'sft', which is unknown"),
    (dict(base_dtype="bf16"), "frozen under LoRA: set grpo.lora_rank"),
    (dict(report_to="trackio"), "pip install trackio"), (dict(use_vllm=True), "vLLM is not installed"),
    (dict(accelerate_config="nowhere.yaml"), "nowhere.yaml is no file"),
    (dict(keep="best", n_watch=0), "needs prompts to watch"), (dict(n_watch=12), "lower grpo.n_watch"),
    (dict(n_watch=-1), "grpo.n_watch = -1"), (dict(gpus=99), "grpo.gpus = 99")])
def test_what_cannot_be_is_told_before_any_work(changes, words):
    values = values_of(**changes)
    with pytest.raises(KitError, match=words): grpo.check_grpo(rl.pick_settings(values), values)


def test_what_can_be_is_not_refused():
    grpo.check_grpo(rl.pick_settings(values_of()), values_of())
