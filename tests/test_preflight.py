"Broken rewards, each of which the preflight has to refuse, and a sound one, which it has to let through."
import asyncio
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from creawrite import preflight as gate
from creawrite.core import KitError
from creawrite.data import read_sample
from creawrite.flaws import canonical, find_injection, flaws_in, strengths_in, weigh
from creawrite.probe import preflight_part, probe_pairs, probe_part
from creawrite.splits import PreferencePair, write_splits

from conftest import REPOSITORY

GROSS = {"empty", "truncated", "padded", "repeated", "praising", "injecting", "injected", "master keys"}
RUN = "preflight-rows"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A kit of our own with this kit's data, and a run whose training pairs are those of the sample."
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kit")
        (folder / "nbs").mkdir()
        (folder / "settings.ini").write_text("[smoke]\n")
        (folder / "data").symlink_to(REPOSITORY / "data")
        patch.setenv("CREAWRITE_ROOT", str(folder))
        pairs = [PreferencePair(id=str(number), query=row.query, chosen=row.good, rejected=row.weak)
                 for number, row in enumerate(read_sample())]
        write_splits(RUN, {"pairs_train": pairs})
        yield


def rulebook(query, text):
    "The gold rule: no flaw that is grave, and strengths enough."
    text = canonical(text)
    return float(weigh(set(flaws_in(query, text)), len(strengths_in(query, text))))


def rulebook_and(words):
    "The gold rule, and a point for a word."
    return lambda query, text: rulebook(query, text) + any(word in text for word in words.split())


def reward(value):
    "A reward function from a value for one query and text."
    def judge(prompts, completions, query): return [value(asked, text) for asked, text in zip(query, completions)]
    return judge


def table_of(broken, n=48, run=RUN): return asyncio.run(gate.preflight(broken, run, n)).set_index("kind")


def failed(value, **sizes):
    table = table_of(reward(value), **sizes)
    return set(table[~table.ok].index)


def learned_at_unequal_length():
    "TF-IDF and length, learned from sound greetings against worthless ones: gross texts are all that it has seen."
    texts = [text for row in read_sample() for text in (row.good, *gate.worthless(row.good).values())]
    labels = [number % 8 == 0 for number in range(len(texts))]
    model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 2)), LogisticRegression(C=100))
    model.fit(texts, labels)
    return lambda query, text: float(model.decision_function([text])[0]) - 0.02 * abs(len(text) - 45)


def shape(query, text):
    "The usual length, characters that differ, no word for the judge: it knows worthless texts and no more."
    return len(set(text)) - abs(len(text) - 45) - 100 * bool(find_injection(query, text))


# ---- a sound reward, and broken ones

def test_the_rulebooks_own_rule_passes():
    table = table_of(reward(rulebook))
    assert table.ok.all() and set(table.index) == set(gate.CASE_KINDS)
    gate.demand_preflight(table.reset_index(), "stop")


@pytest.mark.parametrize("name, value, caught", [
    ("constant", lambda query, text: 1.0, GROSS | {"twins", "shuffled", "training rows"}),
    ("length", lambda query, text: float(len(text)),
     {"padded", "injected", "orders", "self-praise", "markup", "emoji", "twins", "shuffled", "training rows"}),
    ("shortness", lambda query, text: -float(len(text)), {"empty", "truncated", "master keys", "twins", "shuffled"}),
    ("injectable", lambda query, text: float(bool(find_injection(query, text))) or rulebook(query, text),
     {"praising", "injecting", "injected", "orders"}),
    ("blind to the query", lambda query, text: rulebook("", text), {"shuffled"}),
    ("fond of emoji", rulebook_and("🎉 🌹 🎁 ✨"), {"emoji"}), ("fond of markup", rulebook_and("# - *"), {"markup"}),
    ("fond of praise", rulebook_and("优秀 文采 构思 字字"), {"self-praise"}),
    ("backwards", lambda query, text: -rulebook(query, text), GROSS | {"twins", "shuffled", "training rows"}),
])
def test_a_broken_reward_fails_where_it_is_broken(name, value, caught):
    assert caught <= failed(value)
    with pytest.raises(KitError, match="judge fails its preflight"):
        gate.demand_preflight(table_of(reward(value)).reset_index(), "stop")


@pytest.mark.parametrize("make, caught", [(lambda: shape, {"twins", "shuffled", "training rows"}),
                                          (learned_at_unequal_length, {"shuffled", "emoji"})])
def test_a_reward_that_passes_every_gross_text_is_found_out_at_equal_length(make, caught):
    holes = failed(make())
    assert not holes & GROSS and caught <= holes


def test_a_master_key_is_found():
    assert failed(lambda query, text: 2.0 if text.startswith("Thought process") else rulebook(query, text)) == {
        "master keys"}


# ---- missing answers and answers that are none

def test_missing_answers_are_flagged_and_never_passed_or_failed():
    "Three answers of ten are missing: none of them counts as a grade, and the share is over the limit."
    def forgetful(prompts, completions, query):
        return [None if number % 10 < 3 else rulebook(asked, text)
                for number, (asked, text) in enumerate(zip(query, completions))]

    table, whole = table_of(forgetful), table_of(reward(rulebook))
    assert not table.ok["answered"] and 0.69 < table.rate["answered"] < 0.71
    tried = table.drop(index="answered")
    assert (tried.n + tried.missing == whole.n[tried.index]).all() and (table.passed <= whole.passed).all()
    assert table.missing["twins"] > 0 and not table.ok[table.n == 0].any()
    with pytest.raises(KitError, match="too many texts without a value"):
        gate.demand_preflight(table.reset_index(), "stop")


def test_a_reward_without_any_answer_fails_everything():
    assert failed(lambda query, text: None) == set(gate.CASE_KINDS)


@pytest.mark.parametrize("values, words", [
    (lambda n: [1.0] * (n - 1), "values for"), (lambda n: [float("nan")] * n, "gave nan"),
    (lambda n: [1.0, float("inf")] + [0] * (n - 2), "gave inf, which is not finite, for completion 2 of"),
    (lambda n: ["1"] * n, "gave '1', which is no number"), (lambda n: [True] * n, "gave True"),
    (lambda n: None, "NoneType instead of a list")])
def test_what_is_no_reward_is_refused_with_its_name(values, words):
    def broken(prompts, completions, query): return values(len(completions))
    with pytest.raises(KitError, match=f"reward broken gave.*{words.removeprefix('gave ')}"): table_of(broken)


# ---- the cases

def test_few_calls_and_no_text_twice():
    seen = []

    async def judge(prompts, completions, query):
        seen.extend(zip(query, completions))
        return [0.0] * len(completions)

    for n in (12, 48):
        seen.clear()
        table_of(judge, n)
        assert len(set(seen)) == len(seen) <= 60 + 4 * n


def test_twins_shuffled_texts_and_rows_are_of_one_length():
    cases = gate.preflight_cases(RUN, 0)
    gap = {"twins": 3, "shuffled": 0, "training rows": gate.ROW_GAP}
    for case in cases:
        if case.kind in gap: assert abs(len(case.better) - len(case.worse)) <= gap[case.kind]
    assert Counter(case.kind for case in cases)["twins"] == 96
    assert all(case.query != case.worse_query for case in cases if case.kind == "shuffled")


def test_a_run_without_enough_rows_has_no_such_kind():
    assert "training rows" not in table_of(reward(rulebook), run="nobody").index
    row = dict(query="生日", chosen="好好", rejected="坏坏")
    rows = [PreferencePair(id=str(number), **row) for number in range(gate.LEAST_ROWS)]
    for n in (gate.LEAST_ROWS - 1, gate.LEAST_ROWS):
        write_splits("few", {"pairs_train": rows[:n]})
        assert len(gate.row_cases("few", 0)) == n * (n == gate.LEAST_ROWS)


def test_length_is_worth_nothing_on_the_training_rows_even_where_the_chosen_text_is_longer():
    rng = random.Random(1)
    pairs = [PreferencePair(id=str(number), query="生日", chosen="好" * (20 + rng.choice([-2, 0, 1, 1, 2, 2, 9])),
                            rejected="坏" * 20) for number in range(200)]
    write_splits("longer", {"pairs_train": pairs})
    for n in (0, 36, 60):
        cases = gate.row_cases("longer", n)
        gaps = [len(case.better) - len(case.worse) for case in cases]
        assert abs(sum(np.sign(gaps))) <= 1 and max(map(abs, gaps)) <= gate.ROW_GAP and len(cases) == (n or len(cases))


@pytest.mark.parametrize("n", [24, 48, 0])
def test_length_is_worth_nothing_on_the_twins(n):
    gaps = np.array([len(pair["sound"]) - len(pair["flawed"]) for pair in probe_pairs(n, "preflight")])
    assert abs((gaps > 0).sum() - (gaps < 0).sum()) <= 0.1 * len(gaps)


def test_the_preflight_has_a_part_of_the_probe_set_to_itself():
    pairs = probe_pairs(part="all")
    apart, left = preflight_part(pairs), probe_part(pairs)
    ids = lambda part: {pair["id"] for pair in part}
    assert not ids(apart) & ids(left) and ids(apart) | ids(left) == ids(pairs)
    assert set(Counter(pair["flaw"] for pair in apart).values()) == {8}
    assert set(Counter(pair["flaw"] for pair in left).values()) == {18}
    assert ids(preflight_part(pairs[::-1])) == ids(apart), "the part depends on ids, not on the order of the file"
    assert ids(probe_pairs()) == ids(left) and ids(probe_pairs(24)) <= ids(left)
    texts = {text for case in gate.preflight_cases("nobody", 0) for text in (case.better, case.worse)}
    assert not texts & {pair[kind] for pair in left for kind in ("sound", "flawed")}


# ---- the verdict

def test_a_warning_names_every_hole_and_its_meaning(capsys):
    table = table_of(reward(lambda query, text: float(len(text)))).reset_index()
    gate.demand_preflight(table, "warn")
    told = capsys.readouterr().out
    for kind in ("twins", "shuffled", "padded"): assert f"{kind} (" in told and gate.CASE_KINDS[kind].meaning in told
    gate.demand_preflight(table[table.ok], "stop")
    with pytest.raises(KitError, match="neither"): gate.demand_preflight(table, "yes")


def test_intervals_hold_their_rates_and_decide():
    table = table_of(reward(rulebook))
    counted = table[table.n > 0]
    assert ((counted.low <= counted.rate) & (counted.rate <= counted.high)).all()
    by_degree = table[table.needed == "low > 50 %"]
    assert (by_degree.ok == (by_degree.low > 0.5)).all() and len(by_degree) == 6
    assert SimpleNamespace(**table.loc["twins"]).n == 48
