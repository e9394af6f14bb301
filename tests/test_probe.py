"What the probe set promises: minimal pairs, balanced in length, one flaw each, unknown to the sample."
import json
from collections import Counter

import pytest

from creawrite.core import root
from creawrite.data import read_sample
from creawrite.flaws import FLAWS
from creawrite.stats import auc
from creawrite.text import constraint, keeps, near_duplicates, normalise, stray

PAIRS = [json.loads(line) for line in (root() / "data/probe/pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_at_least_twenty_pairs_of_every_flaw():
    counts = Counter(pair["flaw"] for pair in PAIRS)
    assert len(PAIRS) >= 300 and set(counts) == set(FLAWS) and min(counts.values()) >= 20


def test_length_says_nothing():
    lengths = [len(pair[kind]) for kind in ("sound", "flawed") for pair in PAIRS]
    area, low, high = auc(lengths, [1] * len(PAIRS) + [0] * len(PAIRS))
    assert 0.47 <= area <= 0.53 and low < 0.5 < high
    assert max(abs(len(pair["sound"]) - len(pair["flawed"])) for pair in PAIRS) <= 3


def test_longer_and_shorter_flawed_texts_balance():
    longer, shorter = (sum(sign * (len(pair["flawed"]) - len(pair["sound"])) > 0 for pair in PAIRS) for sign in (1, -1))
    assert abs(longer - shorter) <= 0.1 * len(PAIRS)


def test_no_text_stands_twice_and_none_in_the_sample():
    texts = [normalise(pair[kind]) for pair in PAIRS for kind in ("sound", "flawed")]
    assert len(set(texts)) == len(texts) and len({pair["query"] for pair in PAIRS}) == len(PAIRS)
    known = {text for row in read_sample() for text in (row.query, row.good, row.weak)}
    assert not known & set(texts) and not known & {pair["query"] for pair in PAIRS}
    assert not near_duplicates([*texts, *(pair["query"] for pair in PAIRS)], sorted(known))


def test_no_text_is_near_one_of_another_pair():
    texts = [(pair["id"], pair[kind]) for pair in PAIRS for kind in ("sound", "flawed")]
    assert all(texts[i][0] == texts[j][0] for i, j in near_duplicates([text for _, text in texts]))


def test_flaws_are_explained_in_a_few_words_and_sound_texts_are_clean():
    assert all(2 < len(pair["why"]) <= 40 for pair in PAIRS)
    assert not [pair["id"] for pair in PAIRS if stray(pair["sound"], pair["query"])]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if constraint(pair["query"])], ids=lambda pair: pair["id"])
def test_a_stated_constraint_is_kept_by_the_sound_text(pair):
    rule = constraint(pair["query"])
    assert keeps(rule, pair["sound"])
    assert keeps(rule, pair["flawed"]) == (pair["flaw"] != "broken_constraint")


def test_every_broken_constraint_is_one_that_can_be_checked():
    assert all(constraint(pair["query"]) for pair in PAIRS if pair["flaw"] == "broken_constraint")
