"""Stage 02 and what it rests on, stats, slices and near-duplicates: intervals, overlap, length; the figures that the
released data must give."""
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from creawrite import audit, data, slices, stats, text
from creawrite.core import KitError, stage_dir, write_json
from creawrite.figures import figure_style, save_figure
from creawrite.settings import defaults
from creawrite.splits import EvaluationRow, PreferencePair, Prompt, SFTRow, load_split, write_splits

REPOSITORY = Path(__file__).parents[1]
SETTINGS = defaults("audit")  # seed, width, close


@pytest.fixture
def kit(tmp_path, monkeypatch):
    "A kit folder of its own, so that no test writes into the repository's outputs."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    (tmp_path / "data").symlink_to(REPOSITORY / "data")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    return tmp_path


def audited(splits):
    "Table A1 of these splits, indexed by what was checked."
    write_splits("t", splits)
    write_json(stage_dir("t", "audit") / "slices.json", slices.make_slices("t", **SETTINGS))
    table = audit.table_a1("t")
    return table.set_index(["check", "split", "slice"]).sort_index()


# Newcombe 1998 (Statistics in Medicine 17, 857-872), Table I, method 3
@pytest.mark.parametrize("successes, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson(successes, n, low, high): assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers():
    rng, hits = np.random.default_rng(0), []
    for rate in (0.05, 0.3, 0.9):
        for successes in rng.binomial(80, rate, 700):
            low, high = stats.wilson(successes, 80)
            hits.append(low <= rate <= high)
    assert 0.90 <= np.mean(hits) <= 0.98


def test_auc():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rng.integers(0, 2, 60), rng.integers(0, 12, 60)
        area, low, high = stats.auc(scores, labels)
        assert area == pytest.approx(roc_auc_score(labels, scores)) and 0 <= low <= area <= high <= 1


@pytest.mark.parametrize("good, bad, shift, spread", [
    (40, 50, 0.8, 1), (8, 12, 1.2, 1), (60, 90, 0.8, 2), (14, 300, 0, 1)])
def test_auc_covers(good, bad, shift, spread):
    from scipy.stats import norm
    rng, truth, hits = np.random.default_rng(0), norm.cdf(shift / (1 + spread**2)**0.5), []
    for _ in range(600):
        scores = np.r_[rng.normal(shift, spread, good), rng.normal(0, 1, bad)]
        _, low, high = stats.auc(scores, [1] * good + [0] * bad)
        hits.append(low <= truth <= high)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_perfect_separation_of_few_rows_is_not_certain():
    area, low, high = stats.auc([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    assert area == high == 1 and low < 0.7


def test_length_threshold_is_the_best_one():
    rng = np.random.default_rng(0)
    for _ in range(30):
        good, bad = rng.integers(5, 60, 25).tolist(), rng.integers(0, 50, 30).tolist()
        right = lambda cut: sum(length > cut for length in good) + sum(length <= cut for length in bad)
        assert right(slices.length_threshold(good, bad)) == max(map(right, range(-1, 70)))


def rows(label, lengths):
    return [EvaluationRow(id=f"{label}-{i}", query=f"祝福{i}", response="好" * length, label=label)
            for i, length in enumerate(lengths)]


def test_length_matched_is_balanced_and_fixed():
    rng = np.random.default_rng(0)
    both = rows(1, rng.integers(20, 90, 200)) + rows(0, rng.integers(5, 60, 200))
    kept = slices.length_matched(both)
    area = stats.auc([len(row.response) for row in kept], [row.label for row in kept])[0]
    assert sum(row.label for row in kept) * 2 == len(kept) > 50 and abs(area - 0.5) < 0.06
    assert kept == slices.length_matched(both) and kept != slices.length_matched(both, seed=7)


def test_overlap_counts_rows():
    table = audit.table_overlap({"a": ["春", "夏", "夏"], "b": ["夏", "冬"], "c": []})
    shared = table.set_index(["part", "other"]).shared
    assert shared["a", "b"] == 2 and shared["b", "a"] == 1 and shared["a", "a"] == 2 and shared["b", "b"] == 0
    assert shared["a", "c"] == shared["c", "a"] == 0


def test_leak_free(kit):
    pair = lambda id, query, chosen: PreferencePair(id=id, query=query, chosen=chosen, rejected="坏")
    write_splits("t", {"sft": [SFTRow(id="s", query="生日", response="好")],
                       "prompts_train": [Prompt(id="p", query="新年")], "pairs_test": [pair("t", "乔迁", "妙")]})
    kept = lambda *asked: [row.id for row in slices.leak_free("t", list(asked))]
    row = lambda id, query, response: EvaluationRow(id=id, query=query, response=response, label=1)
    asked = row("a", "生日", "新"), row("b", "新年", "新"), row("c", "升职", "好"), row("d", "乔迁", "妙")
    assert kept(*asked) == ["d"]
    assert kept(pair("e", "升职", "好"), pair("f", "升职", "新")) == ["f"]


def test_sample_is_held_out_and_balanced(kit):
    table = audited(data.splits_of("sample"))
    leaks = [key for key in table.index if "stands in " in key[0] and key[1] != "sft"]
    assert len(leaks) == 28 and table.loc[leaks].value.max() == 0
    assert 0.40 <= table.value["length AUC", "evaluation", "all"] <= 0.60
    assert table.value["length-only accuracy", "evaluation", "all"] < 0.65
    ids = slices.read_slices("t")["evaluation"]
    assert ids["leak_free"] == ids["all"] and len(ids["length_matched"]) > 80


def test_figures(kit):
    audited(data.splits_of("sample"))
    figure_style()
    save_figure(audit.figure_a1(*map(audit.table_overlap, slices.texts_by_part("t"))), kit / "a1")
    save_figure(audit.figure_a2(load_split("t", "evaluation"), slices.length_rule("t")), kit / "a2")
    audit.plt.close("all")
    assert all((kit / f"a{n}{suffix}").stat().st_size > 5_000 for n in (1, 2) for suffix in (".svg", ".png"))


def test_one_label_and_equal_lengths_get_a_clear_answer(kit):
    area = ("length AUC", "evaluation", "all")
    one_label = audited({"evaluation": rows(1, [5, 9, 9])})
    assert np.isnan(one_label.value[area]) and "one label only" in one_label.note[area]
    matched = one_label.loc[("labelled good", "evaluation", "length_matched"), ["n", "note"]]
    assert matched.tolist() == [0, "no rows, no number"]
    equal = audited({"evaluation": rows(1, [9] * 3) + rows(0, [9] * 2)})
    assert equal.value[area] == 0.5 and "all of one length" in equal.note[area]
    assert ("length-only accuracy", "evaluation", "all") not in equal.index


def test_few_and_leaked_pairs_get_a_clear_answer(kit):
    few = [PreferencePair(id=str(i), query="祝福", chosen="愿你安好", rejected="好" * i) for i in range(1, 6)]
    assert audited({"pairs_train": few}).value["chosen is longer", "pairs_train", "all"] == 0.6
    pairs = [PreferencePair(id=str(i), query=f"祝福{i}", chosen="好" * 9, rejected="坏") for i in range(3)]
    labelled = rows(1, [9, 8]) + rows(0, [2, 3])
    nothing_left = audited({"pairs_train": pairs, "pairs_test": pairs, "evaluation": labelled})
    leak_free = ("TF-IDF Bradley-Terry accuracy", "pairs_test", "leak_free")
    assert nothing_left.n[leak_free] == 0 and np.isnan(nothing_left.value[leak_free])
    with pytest.raises(KitError, match="at least 2 pairs"): slices.TfidfScorer(pairs[:1])


@pytest.mark.released
def test_released_data_gives_the_known_figures(kit):
    folders = REPOSITORY / "data/released", REPOSITORY.parent / "shared/released"
    folder = next((folder for folder in folders if (folder / "sft").is_dir()), None)
    if not folder: pytest.skip("the released data is not here: creawrite data fetch")
    started = time.perf_counter()
    table = audited(data.released_splits(folder))
    assert time.perf_counter() - started < 60
    value = lambda check, split="evaluation", slice="all": table.value[check, split, slice]
    counted = lambda check, split="evaluation": round(value(check, split) * table.n[check, split, "all"])
    assert counted("response stands among pairs_train chosen", "sft") == 4000
    assert value("length AUC") == pytest.approx(0.929, abs=5e-4)
    assert value("length-only accuracy, in-sample") == 0.9025
    assert "over 38," in table.note["length-only accuracy, in-sample", "evaluation", "all"]
    assert value("length-only accuracy") == 0.892 and slices.length_rule("t") == 42
    assert value("mean length, good responses") == pytest.approx(62, abs=0.5)
    assert value("mean length, bad responses") == pytest.approx(24, abs=0.5)
    assert value("chosen is longer", "pairs_test") == pytest.approx(0.953, abs=5e-4)
    assert value("chosen is longer, ties left out", "pairs_test") == pytest.approx(0.980, abs=5e-4)
    tfidf, names = table.loc[("TF-IDF Bradley-Terry accuracy", "pairs_test")], ["all", "length_matched", "equal_length"]
    assert tfidf.n.to_dict() == dict(
        all=1586, leak_free=1195, length_matched=109, leak_free_length_matched=69, equal_length=44)
    assert tfidf.value[names].round(4).tolist() == [0.9905, 0.8991, 0.8182]
    counts = {slice: len(ids) for slice, ids in slices.read_slices("t")["evaluation"].items()}
    assert counts == dict(all=2000, leak_free=863, length_matched=394, leak_free_length_matched=28)
    shared = audit.table_overlap(slices.texts_by_part("t")[1]).set_index(["part", "other"]).shared
    assert shared["evaluation good", "pairs_train chosen"] == 989
    queries = lambda name: {row.query for row in load_split("t", name)}
    asked = queries("evaluation")
    assert [len(asked), len(asked & queries("pairs_train")), len(asked & queries("pairs_test"))] == [1942, 1000, 814]
    assert value("punctuation AUC") > value("length AUC")
    assert value("punctuation-only accuracy", slice="length_matched") > 0.6
    assert value("good response keeps the constraint of its query") < 0.25
    assert value("bad response keeps the constraint of its query") > 0.7
    assert value("response with stray script or mojibake", "sft") > 0
    assert 0 < value("label noise candidate: a model of characters doubts the label") < 0.05


def test_near_duplicates_are_those_of_every_comparison():
    rng = np.random.default_rng(0)
    base = ["".join(rng.choice(list("春夏秋冬风花雪月山水"), rng.integers(1, 30))) for _ in range(120)]
    near = [text[:cut] + "愿" + text[cut:] for text in base for cut in [rng.integers(0, len(text) + 1)]]
    texts = [base[0], *base, *near, "", "！", "AB", "ab。"]
    overlap = lambda a, b: len(text.grams(a) & text.grams(b)) / len(text.grams(a) | text.grams(b))
    for threshold in (0.5, 0.8, 1.0):
        close = lambda a, b: overlap(a, b) >= threshold - 1e-9
        wanted = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if close(texts[i], texts[j])]
        assert text.near_duplicates(texts, threshold=threshold) == wanted and len(wanted) > 1
        across = [(i, j) for i, a in enumerate(near) for j, b in enumerate(base) if close(a, b)]
        assert text.near_duplicates(near, base, threshold) == across


def test_groups_follow_chains():
    assert text.connected_groups(6, [(0, 1), (1, 2), (3, 4)]) == [0, 0, 0, 1, 1, 2]
    assert text.connected_groups(2, []) == [0, 1] and text.connected_groups(0, []) == []
