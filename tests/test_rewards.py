"Rewards and the parts beside them: what each gives, what is refused, and what the gate lets through."
import asyncio
import random

import numpy as np
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward
from trl.trainer.utils import is_async_callable

from creawrite import rewards, shaping
from creawrite.core import KitError, UsageError, run_dir, write_json
from creawrite.splits import PreferencePair, SFTRow, write_splits
from creawrite.task import TASK

RUN = "rewards"
SOUND = list(TASK.sound.items())


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A kit of our own with a judge and two training splits."
    folder = tmp_path_factory.mktemp("kit")
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        write_splits(RUN, {"sft": [SFTRow(id="1", query="生日", response="愿你岁岁有花")],
                           "pairs_train": [PreferencePair(id="2", query="生日", chosen="好好", rejected="坏坏")]})
        yield folder


def values(reward, texts, queries=None, **columns):
    return asyncio.run(reward([None] * len(texts), texts, query=queries or ["祝福"] * len(texts), **columns))


# ---- the judge's verdict in each mode

@pytest.fixture
def card():
    "A judge whose card says binary verdicts, or what a test wants."
    def write(**settings):
        card = {"principles": TASK.first_principles, "settings": settings}
        write_json(run_dir(RUN) / "adversarial" / "judge.json", card)
    return write


GREETINGS = [SOUND[0], (SOUND[0][0], SOUND[0][1] + TASK.injection), (SOUND[0][0], "今天开会，，今天开会，，今天开会。")]


@pytest.mark.parametrize("judge_mode, between", [("binary", False), ("graded", False), ("rubric", True)])
def test_the_judge_gives_grades_in_the_mode_that_is_asked_for(card, judge_mode, between):
    "The rulebook tells no probabilities, so its graded verdict is a share of equal draws."
    card(verdict_mode="rubric" if judge_mode == "binary" else "binary")
    queries, texts = zip(*GREETINGS)
    reward = rewards.reward_of(RUN, "judge", "offline", "auto", judge_mode)
    grades = values(reward, list(texts), list(queries))
    assert reward.judge.verdict_mode == judge_mode and grades[0] == 1 > max(grades[1:]) >= min(grades[1:]) >= 0
    assert (len(set(grades)) > 2) == between and (between or set(grades) <= {0, 1})


def test_without_a_mode_the_card_decides(card):
    for mode in ("rubric", "binary"):
        card(verdict_mode=mode)
        assert rewards.reward_of(RUN, "judge", "offline").judge.verdict_mode == mode
    with pytest.raises(UsageError, match="judge_mode = 'stars' is not one of"):
        rewards.reward_of(RUN, "judge", "offline", "auto", "stars")
    with pytest.raises(KitError, match="unknown"): rewards.reward_of(RUN, "length")


# ---- what a reward gives is checked

def test_a_missing_verdict_stays_missing():
    class Silent:
        async def grades(self, queries, texts): return [None, 1, None]

    checked = shaping.checked_reward(rewards.JudgeReward(Silent()))
    assert values(checked, ["a", "b", "c"]) == [None, 1.0, None] and checked.__name__ == "judge"


@pytest.mark.parametrize("given", [[1, 0.5], (1, np.float32(0.5)), np.array([1, 0.5]), torch.tensor([1, 0.5]),
                                   [torch.tensor(1.0), np.int64(0)]])
def test_numbers_of_every_kind_are_rewards(given):
    def plain(prompts, completions, query): return given

    async def waits(prompts, completions, query): return given

    for reward in (plain, waits):
        checked = shaping.checked_reward(reward)
        assert values(checked, ["a", "b"]) == [1.0, float(given[1])] and is_async_callable(checked)
        assert shaping.checked_reward(checked) is checked and checked.__name__ == reward.__name__


@pytest.mark.parametrize("given, words", [
    ([1.0], "gave 1 values for 2 completions"), ([1.0] * 3, "gave 3 values"), ([0, float("nan")], "gave nan.*2 of 2"),
    ([float("-inf"), 0], "gave -inf.*1 of 2"), (np.array([0, np.inf]), "gave inf|not finite"), (["0.5", 1], "'0.5'"),
    (["True", 1], "'True'"), ([True, False], "gave True"), (np.array([True, False]), "no number"),
    ([[1.0], [0.0]], "no number"), (torch.tensor([[1.0], [0.0]]), "no number"), (0.5, "float instead of a list"),
    (None, "NoneType instead"), ("10", "str instead"), ({0: 1.0, 1: 0.0}, "dict instead")])
def test_all_else_is_refused_by_name_and_place(given, words):
    def bad_reward(prompts, completions, query): return given
    with pytest.raises(KitError, match=f"reward bad_reward.*(?:{words}).*return one finite number"):
        values(shaping.checked_reward(bad_reward), ["a", "b"])


# ---- the parts

def test_repetition_is_trls_penalty_on_characters():
    texts = ["愿你岁岁平安", "愿你平安，" * 8, "", "安", "🎉" * 20]
    own = get_repetition_penalty_reward(4, -1.0)(completion_ids=[list(map(ord, text)) for text in texts])
    assert values(shaping.RepetitionReward(), texts) == own
    assert own[0] == own[2] == own[3] == 0 and own[1] < -0.8 and own[4] < -0.9
    assert values(shaping.RepetitionReward(), ["愿你 平安\n"]) == [0]


def test_overlong_completions_lose_by_their_tokens():
    lost = values(shaping.OverlongReward(50), ["x"] * 5, completion_ids=[[1] * n for n in (1, 40, 45, 50, 60)])
    assert lost == [0, 0, -0.5, -1, -1]
    assert values(shaping.OverlongReward(2), ["x"] * 2, completion_ids=[[1], [1, 1]]) == [0, -1]


def common_substring(one, other):
    "The longest piece that two texts share, by trying all of them."
    ends = [(i, j) for i in range(len(one)) for j in range(i, len(one) + 1)]
    return max((j - i for i, j in ends if one[i:j] in other), default=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_copied_piece_is_found_as_by_trying_all(seed):
    rng = random.Random(seed)
    word = lambda n: "".join(rng.choices("花好月圆年", k=rng.randrange(n)))
    known = [word(30) for _ in range(12)]
    copies = shaping.CopyReward(known)
    for text in [word(25) for _ in range(40)] + known:
        assert copies.longest(text) == max(common_substring(text, other) for other in known)


def test_a_copy_costs_by_its_share_and_no_dressing_hides_it():
    known = [text for _, text in SOUND]
    copies = shaping.CopyReward(known)
    whole, dressed = known[0], f"{known[0].replace('，', ' ')}\n"
    mixed = "小满这天给您写信，" + whole[:20]
    lost = values(copies, [whole, dressed, mixed, "恭喜升职，往后都好", "", "祝"])
    assert lost[:2] == [-1, -1] and -1 < lost[2] < -0.2 and lost[3:] == [0, 0, 0]
    long = "岁" * 3 + "".join(map(chr, range(0x4e00, 0x4e00 + 500)))
    assert values(shaping.CopyReward([long]), [long]) == [-1]


def test_training_texts_are_all_that_a_policy_may_have_seen():
    assert shaping.training_texts(RUN) == ["愿你岁岁有花", "好好", "坏坏"] and shaping.training_texts("nobody") == []


def test_diversity_is_counted_within_a_query():
    texts = ["愿你平安喜乐", "愿你平安喜乐", "愿你平安喜乐", "岁岁有花可看", "月圆人也团圆", "灯火可亲饭香"]
    queries = ["春节"] * 3 + ["中秋"] * 3
    given = values(shaping.DiversityReward(), texts, queries)
    assert given == [0, 0, 0, 1, 1, 1]
    order = [5, 0, 3, 1, 4, 2]
    shuffled = values(shaping.DiversityReward(), [texts[i] for i in order], [queries[i] for i in order])
    assert shuffled == [given[i] for i in order]
    assert values(shaping.DiversityReward(), ["愿你平安", "", ""], ["春节", "中秋", "中秋"]) == [None, 0, 0]


# ---- the gate

@pytest.mark.parametrize("seed", range(3))
def test_the_gate_takes_positive_advantages_from_broken_constraints_alone(seed):
    rng = torch.Generator().manual_seed(seed)
    advantages, kept = torch.randn(64, generator=rng), random.Random(seed).choices([True, False, None], k=64)
    through = shaping.gated(advantages, kept)
    for before, after, state in zip(advantages.tolist(), through.tolist(), kept):
        assert after == (min(before, 0) if state is False else before)
    whole = shaping.gated(advantages[:, None].expand(-1, 5), kept)
    assert torch.equal(whole, through[:, None].expand(-1, 5))


def test_the_gate_is_told_by_the_query():
    queries = ["送别祝福八个字", "送别祝福八个字", "送别祝福"]
    texts = ["山高水长，一路平安", "一路平安", [{"role": "assistant", "content": "一路平安"}]]
    kept = rewards.constraints_kept(queries, texts)
    assert kept == [True, False, None]
    assert values(rewards.ConstraintReward(), texts, queries) == [1, 0, None]
    assert shaping.gated(torch.ones(3), kept).tolist() == [1, 0, 1]
    with pytest.raises(ValueError): rewards.constraints_kept(queries, texts[:2])


# ---- all of a run

class Weights:
    max_completion_length = 40

    def __init__(self, **weights): vars(self).update({f"{name}_weight": weights.get(name, 0) for name in shaping.PARTS})


def test_every_part_has_its_own_name_and_weight_and_the_main_reward_comes_first():
    def main(prompts, completions, query, **columns): return [None] * len(completions)

    functions, weights = shaping.reward_parts(Weights(), main)
    assert [each.__name__ for each in functions] == ["main"] and weights == [1.0]
    wanted = dict(constraint=0.5, repetition=0.1, overlong=0.2, copy=0.3, diversity=0.4)
    functions, weights = shaping.reward_parts(Weights(**wanted), main, ["愿你岁岁有花，年年有灯"])
    assert [each.__name__ for each in functions] == ["main", *wanted] and weights == [1.0, *wanted.values()]
    given = [values(each, ["愿你岁岁有花，年年有灯"] * 2, completion_ids=[[1] * 40] * 2) for each in functions]
    assert given == [[None] * 2, [None] * 2, [0] * 2, [-1] * 2, [-1] * 2, [0] * 2]


def test_copies_of_nothing_are_refused():
    main = rewards.JudgeReward(None)
    with pytest.raises(KitError, match="grpo.copy_weight"): shaping.reward_parts(Weights(copy=1), main)
