"""Every sentence under a table, taken apart and recomputed from the cells of that table: over random tables with ties,
gaps, one row and none; over the reference results; and over a finished run's own report."""
import re
from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from creawrite import compare, paper, paper_tables, sentences
from creawrite.core import run_dir
from creawrite.tables import EVALUATORS, POLICY_ROWS, SLICE_LABELS, table_human
from creawrite.task import TASK

REFERENCE = REPOSITORY / "outputs/reference/cpu"
POLICIES = [policy for policy in POLICY_ROWS.values() if policy]
BASE = "base (0.2 M parameters, trained from scratch)"
KINDS = ("any", "ties", "equal", "one", "gaps", "all missing", "empty")
WORDS = "above|below|not apart from|without an interval beside"


# ---- a second reading of printed tables, that shares no code with the first

def number(cell) -> float | None:
    found = re.match(r"-?\d+(\.\d+)?", str(cell))
    return float(found[0]) if found else None


def bounds(cell) -> tuple[float, ...] | None:
    found = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", str(cell))
    return tuple(map(float, found.groups())) if found else None


def relation(one, other) -> str:
    if not bounds(one) or not bounds(other): return "without an interval beside"
    if bounds(one)[0] > bounds(other)[1]: return "above"
    return "below" if bounds(one)[1] < bounds(other)[0] else "not apart from"


def column(cells, names, numbers) -> dict[str, str]:
    "Cells by row, those that show a number."
    if numbers not in cells: return {}
    return {name: cell for name, cell in zip(cells[names], cells[numbers]) if number(cell) is not None}


def first(rows: dict) -> set[str]:
    return {name for name, cell in rows.items() if number(cell) == max(map(number, rows.values()))}


def names_in(text: str) -> list[str]: return re.split(r", | and ", text)


def shows(text: str, cell) -> bool:
    "Whether a number of a sentence stands in a cell just so."
    return bool(re.match(re.escape(text) + r"(?![\d.])", str(cell)))


def check_order(clause: str, rows: dict, what: str):
    "A clause about who is first, against the cells."
    if found := re.fullmatch(rf"no row shows the {what}", clause): return not rows or pytest.fail(clause)
    if found := re.fullmatch(rf"the only {what} is that of (.+?), (-?\d.*?)(?: %)?", clause):
        assert set(rows) == {found[1]} and shows(found[2], rows[found[1]]), clause
    elif found := re.fullmatch(rf"the {what} is the same for all (\d+), (\S+)(?: %)?", clause):
        assert len(rows) == int(found[1]) > 1 and {number(cell) for cell in rows.values()} == {float(found[2])}, clause
    elif found := re.fullmatch(rf"the highest {what} is shared by (.+), (-?[\d.]+)(?: %)?", clause):
        names = names_in(found[1])
        assert set(names) == first(rows) and 1 < len(names) < len(rows), clause
        assert float(found[2]) == number(rows[names[0]]), clause
    elif found := re.fullmatch(rf"the highest {what} is that of (.+?), (-?\d.*?)(?: %)?", clause):
        assert first(rows) == {found[1]} and len(rows) > 1 and shows(found[2], rows[found[1]]), clause
    else: pytest.fail(f"no such claim is known: {clause!r}")
    return True


def check_relations(clause: str, name: str, rows: dict, others: dict):
    "A clause about one row against others, all of which it must name."
    told = {other: word for part in clause.split("; ")
            for word, names in [re.fullmatch(rf"({WORDS}) (.+)", part).groups()] for other in names.split(", ")}
    assert told == {other: relation(rows[name], cell) for other, cell in others.items()}, clause


def pieces(text: str, *known: str) -> list[str]:
    "Sentences without the full stop; known ones that claim nothing of a row left out."
    for each in known: text = text.replace(each, "")
    return [piece for piece in re.split(r"\.(?: +|$)", text.strip()) if piece]


def unknown(piece: str): pytest.fail(f"no check knows this sentence: {piece!r}")


# ---- one check per table

def check_table1(text, cells, source="sample"):
    seen, rows = [], {}
    assert text.endswith(sentences.label_note(source))
    for piece in pieces(text, sentences.label_note(source)):
        if found := re.match(r"On ([a-z-]+) rows (.*)", piece):
            seen.append(found[1])
            rows = column(cells[cells.Rows == found[1]], "Evaluator", "Accuracy")
            check_order(found[2], rows, "accuracy")
            continue
        baselines = {name: cell for name, cell in rows.items() if "(baseline)" in name}
        others = {name: cell for name, cell in rows.items() if name not in baselines}
        if found := re.match("Of those that are no baseline (.*)", piece):
            assert first(rows) != first(others)
            check_order(found[1], others, "accuracy")
        elif found := re.fullmatch(rf"(.+?) is ((?:{WORDS}) .+)", piece):
            assert found[1] in first(others)
            check_relations(found[2], found[1], rows, baselines)
        else: unknown(piece)
    wanted = [name for name in ("all", "length-matched")
              if len(cells) and column(cells[cells.Rows == name], "Evaluator", "Accuracy")]
    assert seen == wanted


def check_against_base(piece, by, rows, what):
    "What a sentence says of policies beside the base; False for another sentence."
    if piece.startswith(f"{by} the base shows no {what}"): assert "base" not in rows
    elif piece == f"{by} no trained policy has a higher {what} than base":
        assert "base" in first(rows) and first(rows) != set(rows)
    elif piece.startswith(f"{by} the"): check_order(piece[len(by) + 1:], rows, what)
    elif found := re.fullmatch(rf"(\S+) is ({WORDS}) base, (-?\d.*?)(?: %)?", piece):
        assert found[1] in first(rows) and "base" not in first(rows), piece
        assert found[2] == relation(rows[found[1]], rows["base"]) and shows(found[3], rows["base"]), piece
    else: return False
    return True


def ours(cells, numbers) -> dict[str, str]:
    part = cells[cells.Ours != ""]
    return column(part.assign(policy=[name.split(" ")[0] for name in part.Ours]), "policy", numbers)


def is_noise(*tables) -> bool:
    rates = [[number(cell) for cells in tables for cell in ours(cells, signal).values()] for signal in paper.SIGNALS]
    return all(rates) and max(map(max, rates)) == 0


def check_excellence(text, cells):
    by, rows = "", {}
    assert ("write noise" in text) == is_noise(cells)
    for piece in pieces(text, sentences.NOISE):
        if found := re.match(r"By (Signal-\d|people|simulated raters)", piece):
            heads = {told.removeprefix("By "): head for head, told in sentences.RATERS.items()}
            by, rows = found[0], ours(cells, heads.get(found[1], found[1]))
        if piece.startswith("A rate says what this judge passes; "): continue
        if piece == "No policy of ours has a rate in these scenes":
            assert not any(ours(cells, head) for head in [*paper.SIGNALS, *sentences.RATERS] if head in cells)
        elif not check_against_base(piece, by, rows, "rate"): unknown(piece)


def check_table4(text, cells):
    rows = column(cells, "Evaluator", "Accuracy")
    pairs = {part: relation(rows[part], rows[whole]) for part, whole in paper.WHOLES.items()
             if part in rows and whole in rows}
    for piece in pieces(text, "A paired test on the same rows is sharper than two intervals."):
        if found := re.match(r"(\d+) of (\d+) parts .* intervals, (\d+) raise it", piece):
            words = list(pairs.values())
            assert [*map(int, found.groups())] == [words.count("below"), len(pairs), words.count("above")] and pairs
        elif found := re.match("Accuracy (falls|rises): (.*)", piece):
            word = {"falls": "below", "rises": "above"}[found[1]]
            assert found[2].split(", ") == [part for part in pairs if pairs[part] == word]
        elif piece.startswith("No framework without a part"): assert not pairs
        else: unknown(piece)


def check_probe(text, cells, offline):
    rows = column(cells, "evaluator", "all")
    assert ("offline engine" in text) == offline
    flaws = [name for name in cells if name not in ("evaluator", "all", "n", "ties", "missing")]
    told = {}
    for piece in pieces(text, "The pairs are ours and no human has graded them.",
                        "The offline engine knows the same twelve flaws by name, so its score here is no merit."):
        if found := re.match("Over all flaws (.*)", piece): check_order(found[1], rows, "accuracy")
        elif found := re.fullmatch(r"(.+) is weakest on (.+?), (\d[\d.]*(?: \[.*\])?) %", piece):
            line = cells[cells.evaluator == found[1]].iloc[0]
            shown = {flaw: line[flaw] for flaw in flaws if number(line[flaw]) is not None}
            least = {flaw for flaw in shown if number(shown[flaw]) == min(map(number, shown.values()))}
            assert set(names_in(found[2])) == least != set(shown) and found[1] in first(rows)
            text = found[3] if len(least) == 1 else found[3].split(" [")[0]
            assert all(shows(text, shown[flaw]) for flaw in least)
        elif found := re.fullmatch("(Not told from chance|Below chance): (.*)", piece):
            told[found[1]] = found[2].split(", ")
        else: unknown(piece)
    limits = {name: bounds(cell) for name, cell in rows.items() if bounds(cell)}
    chance = [name for name, (low, high) in limits.items() if low <= 50 <= high]
    below = [name for name, (low, high) in limits.items() if high < 50]
    assert (told.get("Not told from chance", []), told.get("Below chance", [])) == (chance, below)


def check_evaluators(text, cells):
    limits = {name: bounds(cell) for name, cell in column(cells, "evaluator", "length preference").items()
              if name != "length only"}
    rated = {name: each for name, each in limits.items() if each}
    every, matched = (column(cells, "evaluator", name) for name in ("all", "length-matched"))
    fallen = [name for name in every if name in matched and relation(every[name], matched[name]) == "above"]
    wanted = {"longer": [name for name, (low, _) in rated.items() if low > 0.5],
              "shorter": [name for name, (_, high) in rated.items() if high < 0.5], "falls": fallen}
    told = {name: [] for name in wanted}
    for piece in pieces(text):
        if found := re.match("On length-matched rows these call the (longer|shorter) texts good: (.*)", piece):
            told[found[1]] = found[2].split(", ")
        elif found := re.match("From all rows .* agreement falls beyond both intervals: (.*)", piece):
            told["falls"] = found[1].split(", ")
        elif piece.startswith("On length-matched rows none of them"): assert not wanted["longer"] + wanted["shorter"]
        elif piece.startswith("Nobody's agreement falls"): assert not fallen
        else: unknown(piece)
    assert told == wanted


def small(cell) -> bool: return cell == "< 0.001" or number(cell) is not None and number(cell) < 0.05


def check_comparisons(text, cells):
    tested = cells[[small(cell) or number(cell) is not None for cell in cells.p_holm]] if len(cells) else cells
    if text.startswith("No difference could be tested."): return len(tested) == 0 or pytest.fail(text)
    found = re.match(r"(\d+) of (\d+) differences are more than chance at 5 % .*? \((.*?)\)\. A difference", text)
    assert [int(found[1]), int(found[2])] == [sum(map(small, tested.p_holm)), len(tested)]
    for part, (measure, lines) in zip(found[3].split("; "), tested.groupby("measure", sort=False), strict=True):
        counts = re.fullmatch(rf"{re.escape(measure)}: (\d+) of (\d+)(, all 0\.000)?", part)
        assert [int(counts[1]), int(counts[2])] == [sum(map(small, lines.p_holm)), len(lines)]
        assert bool(counts[3]) == all(not number(cell) for cell in lines.difference)


def check_text(text, cells):
    whats = {what: row for row, what in sentences.TEXT_CLAIMS.items()}
    rows = {}
    for piece in pieces(text, "Variety is not quality: noise is varied, too.", sentences.NOISE_ELSEWHERE):
        if found := re.match(rf"The (?:highest |only )?({'|'.join(whats)}) is", piece):
            line = cells[cells.measure == whats[found[1]]].iloc[0].drop("measure")
            rows = {name: cell for name, cell in line.items() if number(cell) is not None}
            check_order(f"t{piece[1:]}", rows, found[1])
        elif found := re.fullmatch(rf"(\S+) is ((?:{WORDS}) .+)", piece):
            assert found[1] in first(rows)
            check_relations(found[2], found[1], rows, {name: rows[name] for name in rows if name not in first(rows)})
        else: unknown(piece)


def check_rewards(text, cells):
    rows, by, what = {}, "", ""
    scores, lengths = (column(cells, "policy", name) for name in ("reward model", "length"))
    constant = []
    for piece in pieces(text, sentences.NOISE_ELSEWHERE):
        if found := re.match("By the (reward model|judge)", piece):
            by, rows = found[0], column(cells, "policy", found[1])
            what = "mean score" if found[1] == "reward model" else "share of Good"
        if found := re.match("The (.*)'s reward is constant", piece): constant.append(found[1])
        elif found := re.match("In characters (.*)", piece): check_order(found[1], lengths, "mean length")
        elif piece.startswith("The reward model's highest mean score comes with the longest texts"):
            assert first(scores) == first(lengths) and len(first(scores)) == 1
        elif not check_against_base(piece, by, rows, what): unknown(piece)
    for name in ("reward model", "judge"):
        values = [number(cell) for cell in column(cells, "policy", name).values()]
        assert (name in constant) == (len(values) > 1 and len(set(values)) == 1)


def check_people(text, cells):
    rated = any(number(cell) is not None for name in [*TASK.dimensions, "Weighted"] for cell in cells[name])
    weighted = ours(cells, "Weighted")
    if text == "It shows nothing yet: no ratings exist.": assert not rated
    elif text.startswith("No policy is rated on all"): assert rated and not weighted
    else:
        claim, _, simulated = text.partition(f" {sentences.NOBODY_RATED}"[:-1])
        assert bool(simulated) == ("Raters" in cells and cells.Raters.str.contains("simulated").any())
        check_order(f"t{claim[1:-1]}", weighted, "weighted score")


def check_preflight(text, cells):
    "The meanings of kinds are checked by the stub that the tests hand in: each is the kind's own name."
    told = {}
    for piece in pieces(text):
        if found := re.fullmatch(r"(Warning: )?(\S+) passes (\d+) of (\d+) kinds(, and a policy may learn .*)?", piece):
            assert bool(found[1]) == bool(found[5])
            told[found[2]] = [int(found[3]), int(found[4]), []]
        elif found := re.match("On (.+?) it ", piece): list(told.values())[-1][-1].append(found[1])
        else: unknown(piece)
    wanted = {}
    for reward in cells.columns.drop(["kind", "needed"]):
        tried = [(kind, cell) for kind, cell in zip(cells.kind, cells[reward]) if cell]
        holes = [kind for kind, cell in tried if cell.endswith("fails")]
        wanted[reward] = [len(tried) - len(holes), len(tried), holes]
    assert told == wanted


def ran_otherwise(cells) -> dict[str, list[str]]:
    "What the other columns of Table H say: finding -> runs."
    columns = {name: cells[name] if name in cells else [""] * len(cells)
               for name in ("live groups", "constant", "kept", "seeds")}
    pairs = lambda cell: [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", str(cell))]
    holds = {
        "In every update all completions of a prompt had the same reward, so nothing was learned":
            ("constant", lambda cell: pairs(cell) and all(a == b > 0 for a, b in pairs(cell))),
        "In more than half of its groups nothing could be learned, all completions having one reward":
            ("live groups", lambda cell: number(cell) is not None and number(cell) < 0.5),
        "The weights kept are those of an earlier step than the last":
            ("kept", lambda cell: any(a < b for a, b in pairs(cell))),
        "Trained with one seed, so another seed may do otherwise by more than the interval says":
            ("seeds", lambda cell: str(cell) == "1")}
    return {finding: [run for run, cell in zip(cells.run, columns[name]) if true(cell)]
            for finding, (name, true) in holds.items()}


def check_trainings(text, cells):
    limits = {row.run: bounds(row.gain) for row in cells.itertuples() if bounds(row.gain)}
    words = {"rises, its interval above 0": lambda low, high: low > 0,
             "falls, its interval below 0": lambda low, high: high < 0,
             "is not told from unchanged, its interval holding 0": lambda low, high: low <= 0 <= high}
    wanted = {f"Own reward {word}": [name for name in limits if holds(*limits[name])] for word, holds in words.items()}
    ended = {f"The training of {run} ended early": why for run, why in zip(cells.run, cells.get("stopped", [])) if why}
    told = dict(piece.split(": ", 1) for piece in pieces(
        text, "A gain in its own reward says that GRPO worked, not that greetings got better."))
    wanted = {finding: ", ".join(names) for finding, names in {**wanted, **ran_otherwise(cells)}.items() if names}
    assert told == wanted | ended


CARRY_OVER = ("The errors are those on labelled evaluation rows; on policies' texts a judge may err more or less, so a "
              "corrected rate is what holds if they carry over.")


def check_corrected(text, cells):
    assert text.endswith(CARRY_OVER)
    refused, moved = {}, {}
    for piece in pieces(text, CARRY_OVER):
        signal, claim = re.fullmatch(r"By (Signal-\d) (.*)", piece).groups()
        part = cells[cells.signal == signal]
        rates, judged = column(part, "policy", "corrected"), column(part, "policy", "as judged")
        if found := re.fullmatch(r"(\d+) of (\d+) rates can be corrected", claim):
            assert [int(n) for n in found.groups()] == [len(rates), len(part)]
        elif found := re.fullmatch(r"the corrected rate is (above|below) the one as judged: (.*)", claim):
            moved[signal, found[1]] = found[2]
        elif found := re.fullmatch(r"there is no corrected rate of (.+?): (.*)", claim):
            refused |= {(signal, policy): found[2] for policy in names_in(found[1])}
        else: check_order(claim, rates, "corrected rate")
    assert refused == {(row.signal, row.policy): why for row, why in zip(cells.itertuples(), cells["why not corrected"])
                       if why}
    for signal, part in cells.groupby("signal"):
        rates, judged = column(part, "policy", "corrected"), column(part, "policy", "as judged")
        for word in ("above", "below"):
            names = [name for name in rates if name in judged and relation(rates[name], judged[name]) == word]
            assert moved.get((signal, word), "") == ", ".join(names)


def check_transfer(text, cells):
    cells = cells[~cells.examiner.str.endswith("(reference)")]
    limits = {f"{row['run']} by {row['examiner']}": bounds(row["gain by examiner"]) for row in cells.to_dict("records")}
    limits = {name: ends for name, ends in limits.items() if ends}
    lost = {name.partition(" by ")[0] for name, (_, high) in limits.items() if high < 0}
    gained = {row["run"] for row in cells.to_dict("records") if (number(row["gain by training reward"]) or 0) > 0}
    wanted = {"An examiner sees a gain, its interval above 0": [n for n, (low, _) in limits.items() if low > 0],
              "An examiner sees a loss, its interval below 0": [n for n, (_, high) in limits.items() if high < 0],
              "An examiner cannot tell the policy from its start, the interval holding 0":
                  [n for n, (low, high) in limits.items() if low <= 0 <= high],
              "The reward that trained it rises while an examiner sees a loss":
                  [run for run in dict.fromkeys(cells.run) if run in lost & gained]}
    told = dict(piece.split(": ") for piece in pieces(
        text, "Examiners that agree may share a blind spot; one that disagrees may be the one in error.",
        "No examiner has seen a policy."))
    assert told == {finding: ", ".join(names) for finding, names in wanted.items() if names}
    assert ("No examiner has seen" in text) == (not column(cells, "examiner", "gain by examiner"))


def check_findings(text, cells):
    told, clean = {}, []
    for piece in pieces(text, "A finding is a statistical sign, so read the texts; none found is no proof of none."):
        if found := re.fullmatch(r"In (\S+) the reward likes what the examiners do not: (.*)", piece):
            told[found[1]] = found[2]
        elif found := re.fullmatch(r"No such change is found: (.*)", piece): clean = found[1].split(", ")
        else: unknown(piece)
    assert clean == list(cells.run[cells.feature == "none found"])
    assert set(told) == set(cells.run[cells.feature != "none found"])
    for row in cells[cells.feature != "none found"].itertuples():
        assert (f"{row.feature} (from step {row.onset})" if row.onset else row.feature) in told[row.run]


def audit_cell(cells, check, split, rows) -> str | None:
    lines = cells[(cells.Check == check) & (cells.Split == split) & (cells.Rows == rows)]
    if not len(lines) or number(lines.Value.iloc[0]) is None: return None
    shown = re.sub(r" \[[^]]*nan[^]]*\]", "", lines.Value.iloc[0])  # half an interval is none
    return f"{shown} of {lines.n.iloc[0]}"


def check_audit(text, cells):
    for piece in pieces(text, "There is hardly more than one label: agreement tells nothing here."):
        if found := re.fullmatch(r"Of (\d+) labelled rows (.+ %) are good", piece):
            shown = audit_cell(cells, "labelled good", "evaluation", "all")
        elif found := re.fullmatch(r"Of (\d+) rows of (\S+) (.+ %) are leak-free", piece):
            shown = audit_cell(cells, "leak-free", found[2], "all")
        elif found := re.fullmatch(r"In (\S+) the chosen response is the longer one in (.+ %) of (\d+) pairs", piece):
            assert audit_cell(cells, "chosen is longer", found[1], "all") == f"{found[2]} of {found[3]}"
            continue
        else:
            check_separation(piece, cells)
            continue
        assert shown == f"{found[found.lastindex]} of {found[1]}", piece
    good = audit_cell(cells, "labelled good", "evaluation", "all") if len(cells) else None
    assert ("hardly more than one label" in text) == (good is not None and number(good) in (0, 100))


def check_separation(piece, cells):
    found = re.fullmatch(r"[Oo]n ([a-z-]+) rows (length|punctuation) alone (does not separate|separates) good from bad"
                         r"(, good texts having less of it)? \(AUC (.*)\)", piece)
    shown = audit_cell(cells, f"{found[2]} AUC", "evaluation", found[1])
    low, high = bounds(shown)
    assert shows(found[5], shown) and (found[3] == "separates") == (low > 0.5 or high < 0.5) == (not low <= 0.5 <= high)
    assert bool(found[4]) == (high < 0.5)


# ---- random tables

def numbers_of(rng, kind, n) -> pd.DataFrame:
    "value, low, high as shares; the kind says how hard they are."
    value = rng.integers(0, 5, n) / 4 if kind in ("ties", "gaps") else rng.random(n).round(3)
    if kind == "equal": value[:] = value[:1] if rng.random() < 0.5 else 0
    reach = rng.choice([0, 0.0004, 0.03, 0.3], n)
    low, high = np.clip(value - reach, 0, 1), np.clip(value + reach, 0, 1)
    if kind == "gaps":
        low = np.where(rng.random(n) < 0.1, np.nan, low)
        value = np.where(rng.random(n) < 0.3, np.nan, value)
    if kind == "all missing": value = np.full(n, np.nan)
    return pd.DataFrame({"value": value, "low": low, "high": high, "n": 40, "good": 20, "missing": 0})


def drawn(rng, kind, **words) -> pd.DataFrame:
    "A long table: every combination of words with random numbers, some left out."
    lines = pd.MultiIndex.from_product(words.values(), names=words).to_frame(index=False)
    some = next(iter(words))
    if kind == "one": lines = lines[lines[some] == rng.choice(words[some])]
    elif kind == "empty": lines = lines[:0]
    elif rng.random() < 0.5: lines = lines[lines[some].isin(rng.permutation(words[some])[:rng.integers(1, 6)])]
    lines = lines.reset_index(drop=True)
    return pd.concat([lines, numbers_of(rng, kind, len(lines))], axis=1)


def cases(start, n=42):
    for seed in range(n): yield np.random.default_rng([start, seed]), KINDS[seed % len(KINDS)]


def test_tables_1_and_4_over_random_numbers():
    for rng, kind in cases(1, 70):
        names = list(dict.fromkeys([*paper.TABLE1, *paper.BASELINES, *paper.TABLE4]))
        table = drawn(rng, kind, evaluator=names, slice=["all", "length_matched"], metric=["accuracy", "f1"])
        more = [table[table.metric == "f1"].assign(metric=name) for name in ("precision", "recall")]
        whole = pd.concat([table, *more])
        source = rng.choice(["sample", "released", "own data"])
        cells = paper.table_frameworks(whole, paper.TABLE1 | paper.BASELINES, SLICE_LABELS)
        check_table1(sentences.says_table1(cells, source), cells, source)
        cells = paper.table_frameworks(whole, paper.TABLE4, {"all": "all"})
        check_table4(sentences.says_table4(cells, paper.WHOLES), cells)


def test_tables_2_and_3_over_random_numbers(monkeypatch):
    monkeypatch.setattr(paper, "published", cache(paper.published))
    for rng, kind in cases(2, 70):
        signals = [*paper.SIGNALS, "Length only", *[rng.choice(list(sentences.RATERS))] * rng.integers(2)]
        rates = drawn(rng, kind, policy=POLICIES, scene=["general"], signal=signals)
        if rng.random() < 0.2: rates.loc[rates.signal != "Length only", "value"] = 0.0
        cells = paper.table_excellence(rates, rates[:0], "general", "Table 2", BASE)
        check_excellence(sentences.says_excellence(cells), cells)
        caption = paper.caption_excellence(2, "general", cells, BASE)
        human = next(name for name in sentences.RATERS if name in cells)
        assert ("Human cells of ours are empty" in caption) == (set(cells[human]) == {""})
        assert ("SIMULATED" in caption) == (human == "Human (simulated)")
        assert "our base is another model" in caption and "Equal length" not in caption


def test_table_5_over_random_numbers():
    for rng, kind in cases(3):
        ratings = drawn(rng, kind, policy=POLICIES, dimension=list(TASK.dimensions))
        if rng.random() < 0.5: ratings = ratings.assign(raters=rng.choice(["3", "3 simulated"]))
        cells = table_human(None if kind == "empty" else ratings, BASE)
        check_people(sentences.says_people(cells), cells)


def test_the_probe_and_evaluators_over_random_numbers():
    for rng, kind in cases(4, 84):
        probe = drawn(rng, kind, evaluator=EVALUATORS, flaw=["all", *list(TASK.flaw_kinds)[:3]]).assign(ties=0)
        cells, offline = paper.table_probe(probe), bool(rng.integers(2))
        check_probe(sentences.says_probe(cells, offline), cells, offline)
        measures = ["agreement, all", "agreement, length_matched", "length preference"]
        cells = paper.table_side_by_side(drawn(rng, kind, evaluator=EVALUATORS, measure=measures))
        check_evaluators(sentences.says_evaluators(cells), cells)


def test_differences_texts_and_rewards_over_random_numbers():
    for rng, kind in cases(5, 84):
        lines = drawn(rng, kind, measure=["accuracy, all", "Signal-1"], first=["a", "b"], second=["c", "d"])
        near = rng.choice([0, 1e-9, 0.0009, 0.0496, 0.05, 0.0504, 0.3, np.nan], len(lines))
        cells, noise = paper.table_differences(lines.assign(p_holm=near)), bool(rng.integers(2))
        check_comparisons(sentences.says_comparisons(cells, noise), cells)
        measures = [*sentences.TEXT_CLAIMS, "self-BLEU"]
        cells = paper.table_greetings(drawn(rng, kind, measure=measures, policy=POLICIES))
        check_text(sentences.says_text(cells, noise), cells)
        rewards = drawn(rng, kind, policy=POLICIES, scene=["all"], reward=["reward model", "judge", "length"])
        cells = paper.table_rewards(rewards)
        check_rewards(sentences.says_rewards(cells, noise), cells)
        assert ("write noise" in sentences.says_rewards(cells, noise)) == noise


def test_trainings_and_preflight_over_random_numbers():
    for rng, kind in cases(6):
        n = 4
        gains = numbers_of(rng, kind, n) - dict(value=0.5, low=0.5, high=0.5, n=0, good=0, missing=0)
        gains = gains.rename(columns={"value": "gain"}).assign(run=list("abcd"), reward="judge", before=0, after=0)
        gains["seeds"] = rng.integers(1, 3, n)
        names, cards = [*"abc", "a-43"], {}
        logs = {name: pd.DataFrame([("frac_reward_zero_std", rng.choice([0.5, 1])), ("live_groups", rng.random())][
            :rng.integers(0, 3)], columns=["metric", "value"]) for name in names}
        for name in names[rng.integers(0, 4):]:
            stopped = rng.choice(["", "Entropy fell."])
            cards[name] = {"kept_step": int(rng.integers(5, 7)), "steps": 6, "stopped": stopped}
        cells = paper.table_trainings(gains, logs, cards)
        check_trainings(sentences.says_trainings(cells), cells)
        tried = [(reward, each) for reward in ("rm", "judge") for each in ("empty", "twins", "markup")]
        preflight = pd.DataFrame(tried, columns=["reward", "kind"]).assign(
            rate=rng.random(6), low=0.1, high=0.9, n=8, missing=rng.integers(0, 2, 6), needed="all")
        preflight["ok"] = rng.random(6) < 0.7
        cells = paper.table_preflight(preflight[:rng.integers(1, 7)])
        check_preflight(sentences.says_preflight(cells, {}), cells)


def test_corrected_rates_over_random_numbers():
    for rng, kind in cases(9, 70):
        judged = drawn(rng, kind, policy=POLICIES, scene=["all"], signal=list(paper.SIGNALS))
        judged = judged.rename(columns={"low": "value_low", "high": "value_high"})
        better = numbers_of(rng, kind, len(judged))[["value", "low", "high"]].rename(columns={"value": "corrected"})
        table = pd.concat([judged, better], axis=1).assign(
            seeds=1, sensitivity=0.9, specificity=0.8, n_labelled=60, labelled="all")
        table["reason"] = np.where(table.corrected.isna(), rng.choice(["it guesses", "too few"], len(table)), None)
        cells = paper.table_as_corrected(table)
        if len(cells): check_corrected(sentences.says_corrected(cells), cells)


def test_examiners_over_random_numbers():
    for rng, kind in cases(10, 70):
        table = drawn(rng, kind, run=["base-rm", "sft-rm"], examiner=["offline", "endpoint", "length"])
        table["kind"] = table.examiner
        table[["value", "low", "high"]] -= 0.5
        table = table.rename(columns={"value": "gain"}).assign(reward="rm", gain_training=rng.normal(size=len(table)))
        cells = paper.table_transfer(table)
        if len(cells): check_transfer(sentences.says_transfer(cells), cells)
        found = [dict(run=run, feature=feature, kind="", onset=rng.choice([None, 3]), sentence="It grows.")
                 for run in ("base-rm", "sft-rm") for feature in ("length", "opens with 「愿」") if rng.random() < 0.4]
        cells = paper.table_findings(found, ["base-rm", "sft-rm", "sft-judge"])
        check_findings(sentences.says_findings(cells), cells)
        assert sentences.NONE_FOUND in set(cells.feature)


def test_the_audit_over_random_numbers():
    for rng, kind in cases(7, 70):
        lines = drawn(rng, kind, check=paper_tables.AUDIT_CHECKS, split=["evaluation", "pairs_train", "pairs_test"],
                      slice=["all", "length_matched"])
        lines = lines.assign(unit=np.where(lines.check.str.endswith("AUC"), "AUC", "share"), note="")
        lines = lines[lines.n.notna()]
        cells = paper.table_audit(lines)
        check_audit(sentences.says_audit(cells), cells)
        bar = sentences.says_bar(cells).removeprefix("Baseline rows are the bar").removeprefix("; Table A1: ")
        for fact in filter(None, bar.rstrip(".").split(", and ")):
            if found := re.fullmatch(r"(.+ %) of (\d+) evaluation rows are leak-free", fact):
                assert audit_cell(cells, "leak-free", "evaluation", "all") == f"{found[1]} of {found[2]}"
            else: check_separation(fact, cells)


def test_two_runs_over_random_numbers():
    for rng, kind in cases(8):
        lines = drawn(rng, kind, what=["a", "b", "c"], table=["rewards", "text"])
        p = rng.choice([0, 0.0496, 0.3, np.nan], len(lines))
        why = rng.choice(["", "different data (sample, released)"], len(lines)).astype(object)
        table = lines.assign(first=lines.value, second=0.5, difference=lines.value.fillna(0) - 0.5, why=why,
                             p_holm=np.where(why == "", p, np.nan))
        told, fair = compare.counted(table), table[table.why == ""]
        found = [int(n) for n in re.findall(r"\b\d+\b(?! %)", told)]
        unfair = [len(table) - len(fair)] if len(fair) < len(table) else []
        shown = compare.surest(table)
        assert found == [len(table), *unfair, (fair.difference == 0).sum(), sum(map(small, shown.p))]
        listed = compare.incomparable(table)
        assert listed.numbers.sum() == len(table) - len(fair)


# ---- results as they lie there

def test_a_baseline_that_leads_is_named():
    "Once the best evaluator under Table 1 was the best of those that were no baseline."
    rows = pd.DataFrame([("multi_agent", 0.717), ("TF-IDF", 0.817), ("length only", 0.467)],
                        columns=["evaluator", "value"]).assign(slice="all", n=60, good=35, missing=0)
    rows = pd.concat([rows.assign(metric=name, low=rows.value - 0.1, high=rows.value + 0.1)
                      for name in paper.METRIC_LABELS])
    cells = paper.table_frameworks(rows, paper.TABLE1 | paper.BASELINES, {"all": "all"})
    told = sentences.says_table1(cells, "own data")
    assert "On all rows the highest accuracy is that of TF-IDF (baseline), 81.7" in told
    assert "above Length only (baseline); not apart from TF-IDF (baseline)" in told
    assert "click" not in told and "released" not in told and "your own data" in told


@pytest.mark.parametrize("falsehood", [
    "On all rows the highest accuracy is that of Multi-agent framework, 64.7 [62.5, 66.8] %.",
    "On all rows the highest accuracy is shared by TF-IDF (baseline) and Reward model, 95.5 %.",
    "On all rows the highest accuracy is that of TF-IDF (baseline), 95.6 [94.5, 96.5] %.",
    "On all rows the accuracy is the same for all 6, 95.5 %."])
def test_the_checks_find_a_falsehood(falsehood):
    frameworks = pd.read_csv(REFERENCE / "evaluate/frameworks.csv")
    cells = paper.table_frameworks(frameworks, paper.TABLE1 | paper.BASELINES, SLICE_LABELS)
    truth = sentences.says_table1(cells, "released")
    check_table1(truth, cells, "released")
    with pytest.raises(AssertionError): check_table1(f"{falsehood} {truth.partition('. ')[2]}", cells, "released")


def reference(name: str) -> pd.DataFrame: return pd.read_csv(REFERENCE / f"{name}.csv")


def test_the_reference_results_are_told_truly():
    frameworks, excellence = reference("evaluate/frameworks"), reference("evaluate/excellence")
    cells = paper.table_frameworks(frameworks, paper.TABLE1 | paper.BASELINES, SLICE_LABELS)
    told = sentences.says_table1(cells, "released")
    check_table1(told, cells, "released")
    assert "the highest accuracy is that of TF-IDF (baseline), 95.5 [94.5, 96.5] %" in told and "are clicks" in told
    cells = paper.table_frameworks(frameworks, paper.TABLE4, {"all": "all"})
    check_table4(sentences.says_table4(cells, paper.WHOLES), cells)
    for number_, scene in zip((2, 3), TASK.scenes):
        controlled = reference("evaluate/excellence_controlled")
        cells = paper.table_excellence(excellence, controlled, scene, f"Table {number_}", BASE)
        check_excellence(sentences.says_excellence(cells), cells)
    checks = {"text": (paper.table_greetings, sentences.says_text, check_text),
              "rewards": (paper.table_rewards, sentences.says_rewards, check_rewards),
              "comparisons": (paper.table_differences, sentences.says_comparisons, check_comparisons)}
    for name, (table, says, check) in checks.items():
        cells = table(reference(f"evaluate/{name}"))
        check(says(cells, False), cells)
    cells = paper.table_probe(reference("evaluate/probe"))
    check_probe(sentences.says_probe(cells, True), cells, True)
    cells = paper.table_side_by_side(reference("evaluate/evaluators"))
    check_evaluators(sentences.says_evaluators(cells), cells)
    cells = paper.table_audit(pd.read_csv(REFERENCE / "audit/table_a1.csv", keep_default_na=True))
    check_audit(sentences.says_audit(cells), cells)
    cells = paper.table_preflight(reference("grpo/preflight"))
    check_preflight(sentences.says_preflight(cells, {}), cells)
    logs = {path.parent.name: pd.read_csv(path) for path in REFERENCE.glob("grpo/*/log.csv")}
    cells = paper.table_trainings(reference("grpo/gains"), logs, {})
    check_trainings(sentences.says_trainings(cells), cells)


def printed(lines: str) -> pd.DataFrame:
    "A markdown table, every cell as text."
    head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines.splitlines()]
    return pd.DataFrame(rows, columns=head)


def test_a_finished_report_does_not_contradict_its_own_tables(smoke_run):
    report = (run_dir(smoke_run) / "paper" / "report.md").read_text(encoding="utf-8")
    parts = re.findall(r"^Table (\w+)\. ([^\n]*)\n\n((?:\|[^\n]*\n)+)(?:\n\*([^\n]*)\*\n)?", report, re.M)
    tables = {number_: (caption, printed(lines), told) for number_, caption, lines, told in parts}
    checks = {"1": check_table1, "2": check_excellence, "3": check_excellence, "4": check_table4, "5": check_people,
              "E": check_evaluators, "D": check_comparisons, "T": check_text, "R": check_rewards, "A1": check_audit,
              "H": check_trainings, "P": lambda told, cells: check_probe(told, cells, True), "L": check_preflight,
              "J": check_corrected}
    later = {"X": check_transfer, "W": check_findings}  # of a stage that a run may go without
    for number_, (_, cells, told) in tables.items():
        if number_ in checks | later: (checks | later)[number_](told, cells)
        else: assert not told or number_ == "K", f"nobody checks the sentence under Table {number_}"
    assert set(checks) <= set(tables)
    assert not re.search("click|released evaluation", report), "said of our sample"
    assert tables["2"][1].Ours.tolist()[3] == "base (0.2 M parameters, trained from scratch)"
    assert "here: base" not in report and "Warning: reward_model" in tables["L"][2]
    noise = is_noise(tables["2"][1], tables["3"][1])
    for number_ in ("D", "R", "T"): assert ("write noise" in tables[number_][2]) == noise
    values = [cell for _, cells, _ in tables.values() for name in {"p", "p_holm"} & set(cells) for cell in cells[name]]
    assert len(values) > 50 and all(re.fullmatch(r"< 0\.001|\d\.\d{3}|–", cell) for cell in values)
