"Several seeds, and rates without the judge's errors: do the intervals hold what they promise, and is the rest refused?"
import itertools

import numpy as np
import pandas as pd
import pytest

from creawrite import rates, stats

RATES, SENSITIVITIES, SPECIFICITIES = (0.1, 0.3, 0.5, 0.7), (0.7, 0.8, 0.9), (0.7, 0.8, 0.9)
SIZES = [(48, 30, 90), (120, 60, 60), (400, 200, 200)]  # texts, rows labelled good, rows labelled bad


def coverage(n, good, bad, rate, sensitivity, specificity, draws=4000, seed=0):
    "Share of simulated studies, of those not refused, whose corrected interval holds the truth; and the share refused."
    rng, passed = np.random.default_rng(seed), rate * sensitivity + (1 - rate) * (1 - specificity)
    judged, tp, tn = rng.binomial(n, passed, draws), rng.binomial(good, sensitivity, draws), rng.binomial(
        bad, specificity, draws)
    lows = [np.array([stats.wilson(k, size)[0] for k in range(size + 1)]) for size in (good, bad)]
    below = np.hypot(tp / good - lows[0][tp], tn / bad - lows[1][tn])
    kept = tp / good + tn / bad - 1 - below >= stats.LEAST_YOUDEN
    known = {"sensitivity": tp / good, "specificity": tn / bad}
    low, high = stats.corrected_interval(judged / n, n, known, good, bad)
    for i in rng.integers(0, draws, 2):  # the same as one by one
        one = stats.corrected_rate(judged[i] / n, n, tp[i], good - tp[i], tn[i], bad - tn[i])
        assert bool(one["reason"]) == (not kept[i] or high[i] < 0 or low[i] > 1)
        assert one["reason"] or (one["low"] <= rate <= one["high"]) == (low[i] <= rate <= high[i])
    return ((low <= rate) & (rate <= high))[kept].mean(), 1 - kept.mean()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_corrected_intervals_cover(sizes):
    "Over a grid of rates and errors: 93 to 97 % on the whole, and in each setting as near as 4,000 draws can tell."
    settings = itertools.product(RATES, SENSITIVITIES, SPECIFICITIES)
    covers, refused = map(np.array, zip(*[coverage(*sizes, *setting) for setting in settings]))
    assert 0.93 <= covers.mean() <= 0.97
    assert covers.min() >= 0.93 and covers.max() <= 0.97 + 0.005
    assert refused.max() < 0.2


def test_an_interval_that_ignores_the_judges_errors_does_not_cover():
    "What the correction is for: the rate as judged misses the truth."
    rng, n = np.random.default_rng(0), 200
    judged = rng.binomial(n, 0.2 * 0.9 + 0.8 * 0.2, 300)
    bounds = np.array([stats.wilson(k, n) for k in judged])
    assert ((bounds[:, 0] <= 0.2) & (0.2 <= bounds[:, 1])).mean() < 0.1


@pytest.mark.parametrize("counts, reason", [
    ((60, 40, 50, 50), "the judge hardly tells good from bad: sensitivity + specificity - 1 is 0.10 [-0.04, 0.23]"),
    ((7, 3, 7, 3), "hardly tells"),  # 0.4, yet twenty rows cannot say so
    ((9, 0, 40, 2), "they are worth 9 independent good and 42 bad ones"), ((0, 0, 40, 2), "too few"),
    ((20, 80, 20, 80), "hardly tells")])  # worse than guessing
def test_what_cannot_be_corrected_is_refused_with_a_reason(counts, reason):
    found = stats.corrected_rate(0.5, 100, *counts)
    assert reason in found["reason"] and np.isnan([found["value"], found["low"], found["high"]]).all()


def test_a_rate_that_the_errors_cannot_make_is_refused():
    "A judge that passes 40 % of bad rows and 0 % of a policy's texts meets other texts there."
    below, above = (stats.corrected_rate(rate, 400, 180, 20, 120, 80) for rate in (0.0, 1.0))
    assert "fewer of them good than of rows labelled bad" in below["reason"] and np.isnan(below["value"])
    assert "more of them good than of rows labelled good" in above["reason"]
    assert stats.corrected_rate(np.nan, 0, 180, 20, 120, 80)["reason"] == "no text is judged"


def test_a_corrected_rate_stays_within_0_and_1():
    for rate, n in itertools.product((0.02, 0.2, 0.55, 0.9, 1.0), (10, 60)):
        found = stats.corrected_rate(rate, n, 45, 5, 80, 20)
        if not found["reason"]: assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_fewer_labels_and_fewer_texts_widen():
    width = lambda n, rows: np.subtract(*[stats.corrected_rate(0.4, n, 0.9 * rows, 0.1 * rows, 0.8 * rows, 0.2 * rows)[
        end] for end in ("high", "low")])
    assert width(50, 40) > width(50, 400) > width(5000, 400)
    assert width(1e9, 40) > 0.1  # with any number of texts the labels' error stays


def test_an_interval_knows_how_many_texts_it_is_worth():
    for rate, n in itertools.product((0.0, 0.2, 0.9), (12, 300)):
        low, high = stats.wilson(rate * n, n)
        assert stats.effective_n({"value": rate, "low": low, "high": high}, 1e6) == pytest.approx(n, rel=1e-6)
    assert stats.effective_n({"value": 0.5, "low": 0.0, "high": 1.0}, 300) == pytest.approx(0, abs=1e-6)


# ---- several seeds

def trained(rng, seeds, prompts, between, missing=0.05):
    "Numbers of true mean 0: seeds differ by `between`, prompts by 1, the rest is 1."
    values = between * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, prompts)) + rng.normal(size=(seeds, prompts))
    return np.where(rng.random(values.shape) < missing, np.nan, values)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("between", [0.0, 0.2, 1.0])
def test_two_level_intervals_cover(seeds, between):
    rng, hits = np.random.default_rng(0), []
    for i in range(250):
        found = stats.two_level(trained(rng, seeds, 40, between), n_bootstrap=150, seed=i)
        hits.append(found["low"] <= 0 <= found["high"])
    assert 0.91 <= np.mean(hits) <= 0.99  # 93 to 98 %, and what 250 draws can be off


def test_resampling_three_seeds_alone_does_not_cover():
    "Why the seeds' part is a t: the plain bootstrap over seeds and prompts is far too narrow."
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        values = trained(rng, 3, 40, 1.0, missing=0)
        seeds, prompts = rng.integers(0, 3, (200, 3)), rng.integers(0, 40, (200, 40))
        draws = values[seeds[:, :, None], prompts[:, None, :]].mean(axis=(1, 2))
        low, high = np.quantile(draws, [0.025, 0.975])
        hits.append(low <= 0 <= high)
    assert np.mean(hits) < 0.9


def test_one_seed_is_the_bootstrap_over_prompts_and_says_so():
    values = np.random.default_rng(0).random(60)
    found = stats.two_level(values, n_bootstrap=200, seed=5)
    assert found == stats.ratio(values, np.ones(60), np.arange(60), 200, 5, share=False) | {"seeds": 1}
    half_missing = np.where(np.arange(60) < 30, np.nan, values)
    assert stats.two_level([half_missing, np.full(60, np.nan)])["seeds"] == 1
    assert stats.two_level([half_missing])["n"] == 30
    assert np.isnan(stats.two_level(np.full((3, 4), np.nan))["value"])


def test_missing_numbers_are_no_zeros():
    found = stats.two_level([[1, np.nan, 1, 1], [1, 1, np.nan, 1], [1, 1, 1, np.nan]], share=True)
    assert (found["value"], found["n"], found["seeds"]) == (1, 4, 3) and found["low"] < 1 == found["high"]


def test_seeds_that_differ_widen_a_difference():
    prompts = np.random.default_rng(0).normal(size=(1, 80))
    gap = lambda *shifts: stats.seeds_difference(prompts + np.array(shifts)[:, None], prompts, range(80))
    steady, shaky = gap(0.29, 0.30, 0.31), gap(0.0, 0.3, 0.6)
    assert steady["value"] == pytest.approx(0.3) and steady["low"] > 0.2 and steady["p"] < 0.01
    assert shaky["value"] == pytest.approx(0.3) and shaky["low"] < 0 and shaky["p"] > 0.05


# ---- tables

def scores(**shares):
    "Verdicts by policy: sft_rm_43=0.5 is half of eighty texts judged good."
    rows = [dict(policy=name.replace("_", "-"), prompt_id=f"p{i:02}", query=f"q{i}", sample=0, scene="general",
                 length=40 + i % 7, signal1=int(i % 20 < 20 * share), signal2=int(i % 20 < 20 * share))
            for name, share in shares.items() for i in range(80)]
    return pd.DataFrame(rows).astype({"signal1": "Int64", "signal2": "Int64"})


def test_seeds_of_a_policy_are_one_line():
    table = scores(sft=0.5, sft_rm=0.2, sft_rm_43=0.4, sft_rm_44=0.6)
    found = rates.table_means(table, {"signal1": "Signal-1"}, "signal", n_bootstrap=100, seed=1)
    found = found[found.scene == "all"].set_index("policy")
    assert found.seeds.to_dict() == {"sft": 1, "sft-rm": 3} and found.n.to_dict() == {"sft": 80, "sft-rm": 80}
    assert found.value["sft-rm"] == pytest.approx(0.4)
    assert found.high["sft-rm"] - found.low["sft-rm"] > 2 * (found.high["sft"] - found.low["sft"])
    alone = rates.table_means(table[table.policy == "sft"], {"signal1": "Signal-1"}, "signal", n_bootstrap=100, seed=1)
    assert alone.value[0] == found.value["sft"] and alone.low[0] == found.low["sft"]
    equal = rates.table_controlled(table, {"signal1": "Signal-1"}, n_refits=10, seed=1)
    assert set(equal.policy) == {"sft", "sft-rm"} and equal.eval("low <= value <= high").all()


def test_policies_are_compared_over_their_seeds():
    found = rates.policy_differences(scores(sft=0.2, sft_rm=0.2, sft_rm_43=0.9), "signal1", "Signal-1", n_bootstrap=200)
    line = found.iloc[0]
    assert (line["first"], line["second"], line.n) == ("sft", "sft-rm", 80) and line.value == pytest.approx(-0.35)
    assert line.low < 0 < line.high and line.p_holm >= line.p > 0.05  # two seeds that far apart prove nothing


def labelled(n, wrong, evaluator="multi_agent"):
    "A judge that is wrong on this share of rows of either label."
    ids = [f"e{i}" for i in range(n)]
    rows = pd.DataFrame({"evaluator": evaluator, "id": ids, "query": ids, "label": np.arange(n) % 2})
    flip = np.arange(n) // 2 % 20 < 20 * wrong
    return rows.assign(verdict=pd.array(np.where(flip, 1 - rows.label, rows.label), dtype="Int64"))


def test_corrected_rates_stand_beside_the_judged_ones():
    verdicts = pd.concat([labelled(400, 0.1), labelled(400, 0.5, "adversarial")])
    table = rates.table_means(scores(sft=0.5, sft_rm=0.3, sft_rm_43=0.7),
                              {"signal1": "Signal-1", "signal2": "Signal-2"}, "signal", n_bootstrap=200, seed=1)
    found = rates.table_corrected(table, verdicts, verdicts.id.tolist(), n_bootstrap=200, seed=1)
    one = found[(found.scene == "all") & (found.signal == "Signal-1")].set_index("policy")
    assert one.corrected["sft"] == pytest.approx(0.5) and one.sensitivity["sft"] == pytest.approx(0.9)
    assert one.high["sft"] - one.low["sft"] > one.value_high["sft"] - one.value_low["sft"]
    assert one.high["sft-rm"] - one.low["sft-rm"] > 0.8  # two seeds that far apart: hardly anything is known
    guess = found[found.signal == "Signal-2"]
    assert guess.corrected.isna().all() and guess[guess.scene == "all"].reason.str.contains("hardly tells").all()
    assert found.caveat.str.contains("may be others").all() and (found.n_labelled == 400).all()


def test_errors_are_taken_from_leak_free_rows_where_there_are_enough():
    verdicts = labelled(200, 0.1)
    assert rates.error_rows(verdicts, verdicts.id[:60].tolist())[1] == "leak-free"
    rows, which = rates.error_rows(verdicts, verdicts.id[verdicts.label == 0].tolist())
    assert (which, len(rows)) == ("all", 200)  # bad rows alone say nothing of sensitivity
    unanswered = verdicts.assign(verdict=verdicts.verdict.where(verdicts.index >= 20))
    assert len(rates.error_rows(unanswered, [])[0]) == 180


def test_rows_on_one_query_are_worth_less():
    rows = labelled(400, 0.25)
    alone, together = (sum(rates.judge_errors(rows.assign(query=names), n_bootstrap=300, seed=1).values())
                       for names in (rows.id, rows.index // 10))
    assert together < alone <= 400
