"""What makes each training stale: an edit, other rows, other weights; and what does not."""
import functools, shutil

import pytest

from creawrite import grpo, reward_model, rewards, sft
from creawrite.core import run_dir
from creawrite.policies import policy_dir

from conftest import REPOSITORY
from small_kit import RUN, Verdicts, again, make_base, make_reward_model, make_sft, small_kit
from test_grpo import tiny


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with small_kit(tmp_path_factory.mktemp("kit")) as folder: yield folder


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
    monkeypatch.setattr(grpo, "reward_of", lambda *_: rewards.JudgeReward(Verdicts(1, 0)))

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
    ("rewards", "float(kept)", "2 * float(kept)", ""),  # its weight is 0
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
    ("rl", 'lr_scheduler_type="constant"', 'lr_scheduler_type="linear"', "base-rm, base-judge"),
    ("policies", "temperature=temperature, top_k=0", "temperature=temperature, top_k=9", "base-rm, base-judge"),
    ("watch", "PATIENCE = 3", "PATIENCE = 4", "base-rm, base-judge"),
    ("rl", "EQUAL = 1e-6", "EQUAL = 1e-5", "base-rm, base-judge"),
    ("shaping", "broken & (advantages > 0)", "broken & (advantages >= 0)", "base-rm, base-judge"),
    ("canary", "UPDATES = 5", "UPDATES = 6", ""),
    ("sft", "losses.plot(", "losses.rename().plot(", ""),
    ("grpo", "alpha=0.3", "alpha=0.4", ""),
    ("figures", '"savefig.dpi": 160', '"savefig.dpi": 300', ""),
    ("trainers", "is not one of auto, bf16, fp32", "must be auto, bf16 or fp32", ""),
    ("rl", "training prompts are fewer than", "prompts are too few, less than", ""),
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
