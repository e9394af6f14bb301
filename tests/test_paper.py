"Stage 10 and its libraries: tables, the sentences under them, the one-page report, and two runs side by side."
import gc
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import REPOSITORY

from creawrite import compare, paper, run_figures, sentences, tables
from creawrite.core import printable, run_dir, write_csv, write_json
from creawrite.report import table_html, report_page
from creawrite.tables import Table, write_table
from creawrite.task import TASK


def accuracy(names=paper.TABLE1, **rates):
    "Table 1 or 4 as printed, with these accuracies on all and on length-matched rows."
    lines = [(name.replace("_only", " only"), slice, rate) for name, pair in rates.items()
             for slice, rate in zip(("all", "length_matched"), pair)]
    table = pd.DataFrame(lines, columns=["evaluator", "slice", "value"])
    table = table.assign(low=table.value - 0.05, high=table.value + 0.05, n=100, good=50, missing=0)
    table = pd.concat([table.assign(metric=metric) for metric in paper.METRIC_LABELS])
    return paper.table_frameworks(table, names, tables.SLICE_LABELS)


def test_the_sentence_follows_the_numbers():
    cells = accuracy(multi_agent=(0.9, 0.5), adversarial=(0.7, 0.8), length_only=(0.8, 0.5))
    sentence = sentences.says_table1(cells, "released")
    assert ("On all rows the highest accuracy is that of Multi-agent framework, 90.0 [85.0, 95.0] %. Multi-agent "
            "framework is not apart from Length only (baseline).") in sentence
    assert ("On length-matched rows the highest accuracy is that of Adversarial framework, 80.0 [75.0, 85.0] %. "
            "Adversarial framework is above Length only (baseline).") in sentence
    below = sentences.says_table1(accuracy(multi_agent=(0.4, 0.5), length_only=(0.8, 0.5)), "released")
    assert "Multi-agent framework is below Length only (baseline)." in below


def test_ablations_that_cost_something_are_named():
    rates = {"multi_agent": (0.9, 0.9), "multi_agent without judge": (0.6, 0.6)}
    cells = accuracy(paper.TABLE4, **rates)
    sentence = sentences.says_table4(cells[cells.Rows == "all"], paper.WHOLES)
    assert sentence.startswith("1 of 1 parts that are left out cost accuracy beyond both intervals, 0 raise it.")
    assert "Accuracy falls: without judge agent." in sentence
    alone = accuracy(paper.TABLE4, multi_agent=(0.9, 0.9))
    assert sentences.says_table4(alone, paper.WHOLES).startswith("No framework without a part stands beside its whole")


@pytest.mark.parametrize("base, sft, sentence", [
    (0.2, 0.6, "the highest rate is that of sft, 60.0 [55.0, 65.0] %. sft is above base, 20.0 [15.0, 25.0] %."),
    (0.6, 0.2, "By Signal-1 no trained policy has a higher rate than base."),
    (0.6, 0.6, "By Signal-1 the rate is the same for all 2, 60.0 %.")])
def test_policies_are_put_against_the_base(base, sft, sentence):
    table = pd.DataFrame([dict(policy=name, scene="general", signal="Signal-1", value=rate, low=rate - 0.05,
                               high=rate + 0.05, n=40) for name, rate in (("base", base), ("sft", sft))])
    cells = paper.table_excellence(table, table[:0], "general", "Table 3", "base (tiny)")
    assert sentence in sentences.says_excellence(cells)


def test_table_5_waits_for_ratings_and_weighs_them():
    empty = tables.table_human(None, "base (tiny)")
    assert len(empty) == 5 and list(empty) == ["Method", "Ours", "n", *TASK.dimensions, "Weighted"]
    assert sum(TASK.dimensions.values()) == pytest.approx(1)
    scores = pd.DataFrame({"policy": "sft", "dimension": list(TASK.dimensions), "value": [3.0, 2.0, 1.0, 2.0, 3.0]})
    scores = scores.assign(low=scores.value - 0.1, high=scores.value + 0.1, n=30)
    filled = tables.table_human(scores, "base (tiny)").set_index("Method")
    assert filled.loc["SFT", "Weighted"] == "2.25" and filled.loc["RM+RL", "Weighted"] == ""
    assert filled.loc["SFT", "Creativity"] == "2.00 [1.90, 2.10]"


def test_every_agent_has_its_ablation_row():
    from creawrite.judge import VARIANTS
    assert set(VARIANTS) <= set(paper.TABLE4) and set(paper.TABLE1) | set(paper.BASELINES) <= set(tables.EVALUATORS)


def test_a_stage_that_lacks_is_named(kit):
    with pytest.raises(paper.KitError, match="run 'new' has no evaluate/frameworks.csv: run stage 08_evaluate first"):
        paper.read_results("new")


def test_what_is_kept_of_an_older_state_stands_in_every_caption(kit):
    folder = run_dir("old")
    write_json(folder / "adversarial" / "judge.json", {"engine": "nobody"})
    write_json(folder / "data" / "source.json", {"source": "sample"})
    write_json(folder / "sft" / "base" / "policy.json", {"parameters": 2_000_000})
    facts = ("Judged by: nobody; data: sample; policies: a 2.0 M-parameter model trained from scratch; "
             "cells: value [95 % interval].")
    assert tables.provenance("old") == facts
    note = {"stage": "grpo", "when": "", "why": "a comment moved", "changed": ["code"]}
    write_json(folder / "grpo" / "kept.json", [note])
    assert tables.provenance("old") == f"{facts} Stage grpo keeps results of older code or inputs: a comment moved."


@pytest.mark.parametrize("card, label", [
    ({"parameters": 175_680}, "base (0.2 M parameters, trained from scratch)"),
    ({"hub": "Qwen/Qwen2.5-7B-Instruct", "revision": ""}, "base (Qwen/Qwen2.5-7B-Instruct, the paper's own)"),
    ({"hub": "Qwen/Qwen2.5-0.5B-Instruct", "revision": ""}, "base (Qwen/Qwen2.5-0.5B-Instruct)"),
    ({"hub": "/somewhere/Qwen2.5-7B-Instruct", "revision": ""}, "base (the model of folder Qwen2.5-7B-Instruct)")])
def test_a_row_of_the_paper_says_what_stands_in_it(kit, card, label):
    "The paper's name stays, and beside it stands what ours is; a folder's place on a machine is nobody's business."
    shutil.copyfile(REPOSITORY / "data/published.csv", kit / "data/published.csv")
    write_json(run_dir("small") / "sft" / "base" / "policy.json", card)
    assert tables.base_label("small") == label and "/somewhere" not in tables.policy_described("small")
    rates = pd.DataFrame([dict(policy="base", scene="general", signal="Signal-1", value=0.5, low=0.4, high=0.6, n=40)])
    cells = paper.table_excellence(rates, rates[:0], "general", "Table 2", label)
    assert cells[["Model", "Ours"]].values.tolist()[3:5] == [["Qwen2.5-7B-Instruct", label], ["SFT", "sft"]]
    caption = paper.caption_excellence(2, "general", cells, label)
    assert ("our base is another model" in caption) == ("the paper's own" not in label)


def log_of(*rewards, live=0.5):
    "A training log of so many updates."
    rows = [(step, "reward", value) for step, value in enumerate(rewards, 1)] + [(1, "live_groups", live)]
    return pd.DataFrame(rows, columns=["step", "metric", "value"])


@pytest.fixture
def seeded(kit):
    "A run whose sft-rm was trained with two seeds, which examiners have seen, one seed with a finding."
    folder = run_dir("seeded")
    for name, rewards, stopped in (("sft-rm", (0, 1, 2), ""), ("sft-rm-43", (0, 3), "Entropy fell to a tenth.")):
        write_csv(folder / "grpo" / name / "log.csv", log_of(*rewards, live=0.2 * len(rewards)))
        write_json(folder / "grpo" / name / "policy.json", {"kept_step": 2, "steps": len(rewards), "stopped": stopped})
    line = dict(run="sft-rm", reward="reward_model", n=40, seeds=2, missing=0, before=0.0, after=2.0, gain=2.0)
    line |= dict(low=-3.0, high=7.0)
    write_csv(folder / "grpo" / "gains.csv", pd.DataFrame([line]))
    kinds = dict(reward="reward_model", n=48, missing=0, needed="low > 50 %")
    write_csv(folder / "grpo" / "preflight.csv", pd.DataFrame([
        kinds | dict(kind="twins", passed=25, rate=0.52, low=0.38, high=0.66, ok=False),
        kinds | dict(kind="shuffled", passed=45, rate=0.94, low=0.83, high=0.98, ok=True)]))
    seen = dict(run="sft-rm", reward="reward_model", gain_training=2.0, ratio=-0.2, ratio_low=-0.3, ratio_high=-0.1)
    write_csv(folder / "examine" / "transfer.csv", pd.DataFrame([
        seen | dict(examiner="offline", gain=-0.2, low=-0.3, high=-0.1),
        seen | dict(examiner="tfidf", gain=0.1, low=0.05, high=0.2)]))
    changed = dict(run="sft-rm", kind="length", before=40.0, after=80.0, difference=40.0, p_holm=1e-6, liked=0.9)
    changed |= dict(feature="length", support=-0.4, finding=1)
    write_csv(folder / "examine" / "changes.csv", pd.DataFrame([changed]))
    write_json(folder / "examine" / "findings.json", [
        dict(run="sft-rm", feature="length", kind="length", onset=2, evidence="Length goes from 40.0 to 80.0.")])
    points = [dict(run=name, step=0, judge="training", value=0.0) for name in ("sft-rm", "sft-rm-43")]
    write_csv(folder / "examine" / "curves.csv", pd.DataFrame(points))
    return "seeded"


def test_trainings_of_several_seeds_are_one_line(seeded):
    trainings, preflight = paper.described_trainings(seeded, "")
    assert trainings.cells.to_dict("records") == [{
        "run": "sft-rm", "reward": "reward_model", "seeds": 2, "before": "0.000", "after": "2.000",
        "gain": "2.000 [-3.000, 7.000]", "live groups": "0.500", "kept": "2 of 3; 2 of 2",
        "stopped": "Entropy fell to a tenth", "n": 40, "missing": 0}]
    assert "The training of sft-rm ended early: Entropy fell to a tenth." in trainings.sentence
    assert "one seed" not in trainings.sentence and "not told from unchanged" in trainings.sentence
    assert preflight.cells.reward_model.tolist() == [
        "52.0 [38.0, 66.0], n = 48, fails", "94.0 [83.0, 98.0], n = 48"]
    assert ("Warning: reward_model passes 1 of 2 kinds, and a policy may learn just what it fails on. On twins it "
            "cannot tell a sound greeting from a flawed one of equal length.") == preflight.sentence


def test_examiners_and_findings_stand_in_the_report(seeded):
    transfer, changes, findings = paper.described_examiners(seeded, "")
    assert transfer.cells["gain by examiner"].tolist() == ["-0.200 [-0.300, -0.100]", "0.100 [0.050, 0.200]"]
    assert "The reward that trained it rises while an examiner sees a loss: sft-rm." in transfer.sentence
    assert changes.cells[["feature", "support", "finding"]].values.tolist() == [["length", "-0.40", "1"]]
    assert findings.sentence.startswith("In sft-rm the reward likes what the examiners do not: length (from step 2).")
    assert "No such change is found: sft-rm-43." in findings.sentence
    for table in (transfer, changes, findings):
        tables.write_table(run_dir(seeded) / "paper", table)
        assert table.caption.startswith("Table ") and table.name in sum((paper.STORY | paper.FURTHER).values(), [])
    (run_dir(seeded) / "examine" / "findings.json").write_text("[]")
    clean = paper.described_examiners(seeded, "")[-1]
    assert clean.sentence.startswith("No such change is found: sft-rm, sft-rm-43.")


def test_curves_are_means_over_seeds(seeded):
    lines = run_figures.training_logs(seeded)["GRPO: reward model's score"]
    assert [(label, len(logs)) for label, logs, _ in lines] == [("base-rm", 0), ("sft-rm", 2)]
    panel = run_figures.figure_training(seeded).axes[2]
    assert [line.get_label() for line in panel.lines][-1] == "sft-rm (2 seeds)"
    assert panel.lines[-1].get_ydata().tolist() == [0, 2, 2]  # of 0 and 0, 1 and 3, 2 alone


def test_a_rate_says_over_how_many_seeds():
    line = dict(policy="sft-rm", scene="general", signal="Signal-1", value=0.5, low=0.2, high=0.8, n=40)
    assert paper.rate_cells(pd.DataFrame([line]), "general", "sft-rm")[1] == "40"
    assert paper.rate_cells(pd.DataFrame([line]).assign(seeds=3), "general", "sft-rm")[1] == "40 x 3 seeds"


def finished_run(name, shift=0.0):
    "A run with two small tables, a figure and a record."
    folder = run_dir(name)
    excellence = pd.DataFrame([
        dict(policy=policy, scene="all", signal="Signal-1", value=rate, low=rate - 0.03, high=rate + 0.03, n=400,
             missing=0)
        for policy, rate in (("base", 0.3), ("sft", 0.5 + shift))])
    write_csv(folder / "evaluate" / "excellence.csv", excellence)
    probe = dict(evaluator="x", flaw="all", value=0.7, low=0.6, high=0.8, n=90, ties=3, missing=0,
                 sound_good=np.nan, flawed_bad=np.nan)
    write_csv(folder / "evaluate" / "probe.csv", pd.DataFrame([probe]))
    stages = {"data": {"fingerprint": "abc"}, "evaluate": {"fingerprint": name}}
    write_json(folder / "run.json", {"profile": "smoke", "stages": stages})
    return folder


def test_equal_runs_do_not_differ(kit, creawrite):
    finished_run("one"), finished_run("two")
    code, output, error = creawrite("compare", "one", "two")
    assert (code, error) == (0, "")
    assert "3 numbers have an interval in both runs; 3 are equal, 0 differ by more than chance" in output
    assert re.search(r"\| data +\| abc +\| abc +\| same", output)
    assert re.search(r"\| evaluate +\| one +\| two +\| differs", output)


def test_a_real_difference_is_named_with_its_interval(kit, creawrite):
    finished_run("one"), finished_run("two", shift=0.2)
    output = creawrite("compare", "one", "two")[1]
    line = r"excellence +\| sft, all, Signal-1 +\| +0.500 \| +0.700 \| \+0.200 \[\+0.158, \+0.242\]"
    assert "1 differ by more than chance" in output and re.search(line, output)


RULERS = {  # what differs -> a file of each run, the table and word of the number, why it cannot be compared
    "engine": ("adversarial/judge.json", "excellence", "Signal-1", "rates of different engines"),
    "principles": ("adversarial/judge.json", "excellence", "Signal-2", "rates of different judges"),
    "source": ("data/source.json", "excellence", "Signal-1", "different data (one, two)"),
    "score": ("reward_model/log.csv", "rewards", "reward model", "scores of different reward models")}


@pytest.mark.parametrize("ruler", RULERS)
def test_what_was_measured_with_another_ruler_is_marked_and_not_tested(kit, creawrite, ruler):
    "Numbers that were far apart, and called a difference."
    place, table, word, why = RULERS[ruler]
    for name, shift in (("one", 0), ("two", 0.2)):
        folder = finished_run(name, shift)
        rates = pd.read_csv(folder / "evaluate/excellence.csv").assign(signal=word)
        (folder / "evaluate/excellence.csv").unlink()
        if ruler == "score": rates = rates.rename(columns={"signal": "reward"})
        write_csv(folder / "evaluate" / f"{table}.csv", rates)
        if place.endswith("csv"): write_csv(folder / place, pd.DataFrame({"step": [1], "value": [name]}))
        else: write_json(folder / place, {ruler: name})
    output = creawrite("compare", "one", "two")[1]
    assert ("3 numbers have an interval in both runs; 2 of them cannot be compared; of the others 1 are equal, "
            "0 differ by more than chance") in output
    assert re.search(rf"\| +2 \| {re.escape(why)} +\|", output) and "0.200" not in output


def test_a_p_value_has_three_digits(kit, creawrite):
    finished_run("one"), finished_run("two", shift=0.2)
    assert re.search(r"\[\+0.158, \+0.242\] +\| < 0.001 +\|", creawrite("compare", "one", "two")[1])


def test_reference_runs_can_be_compared(kit, creawrite):
    folder = finished_run("one")
    shutil.copytree(folder, kit / "outputs/reference/one")
    assert "3 are equal" in creawrite("compare", "one", "reference/one")[1]


def test_runs_of_an_earlier_numbering_compare(kit, creawrite):
    "Stages that are libraries now, and executed copies under other numbers, are no hindrance."
    old, new = finished_run("before"), finished_run("after")
    stages = {stage: {"fingerprint": "0"} for stage in ("data", "llm", "offline", "evaluate")}
    write_json(old / "run.json", {"profile": "smoke", "stages": stages})
    (old / "10_evaluate.ipynb").write_text("{}")
    (new / "08_evaluate.ipynb").write_text("{}")
    for pair in (("before", "after"), ("after", "before")):
        code, output, error = creawrite("compare", *pair)
        assert (code, error) == (0, "") and "3 are equal" in output and re.search(r"\| llm .*not run.* differs", output)


def test_compare_answers_clearly(kit, creawrite):
    finished_run("smoke")
    write_json(run_dir("empty") / "run.json", {"profile": "smoke", "stages": {}})
    for other, code, answer in (("smok", 2, "no run 'smok' in outputs; the nearest is 'smoke'"),
                                ("empty", 2, "has no tables yet"), ("../x", 2, "must be a plain folder name")):
        got, output, error = creawrite("compare", "smoke", other)
        assert (got, output) == (code, "") and answer in error


def test_two_runs_of_one_truth_rarely_differ():
    "Without a difference about one comparison in twenty names one."
    gc.freeze()  # multipletests collects garbage at each call, which takes long beside torch
    rng, alarms = np.random.default_rng(0), 0
    keys = pd.DataFrame({"policy": [f"p{i}" for i in range(8)], "scene": "all"})
    for _ in range(30):
        pair = []
        for _ in range(2):
            rates = rng.binomial(300, 0.4, 8) / 300
            reach = 1.96 * np.sqrt(rates * (1 - rates) / 300)
            pair.append(keys.assign(value=rates, low=rates - reach, high=rates + reach, n=300))
        alarms += (compare.tested_differences(*pair).p_holm < 0.05).any()
    assert alarms <= 4


def test_report_stands_alone(smoke_run):
    folder = run_dir(smoke_run) / "paper"
    first, further = ((folder / f"{name}.html").read_text(encoding="utf-8") for name in ("report", "further"))
    for page in (first, further):
        links = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)([^"']+)""", page)
        assert links in (["further.html"], ["report.html"]) and "<script" not in page
        assert "offline rulebook engine (not an LLM)" in page
    assert (first + further).count("data:image/png;base64,") >= 6 and (first + further).count('class="says"') >= 9
    order = [first.index(f"Table {number}.") for number in (1, 2, 3, 4, 5)]
    assert order == sorted(order) and all(f"Table {letter}." in further for letter in ("A1", "E", "P"))
    assert "How to read this run" in first and "plumbing check" in first and "never differed" in first
    assert first.count("<bdi>") == 2 * 10 * 6, "query and greeting, ten of each policy"
    links = re.findall(r"\]\(([^)]+\.png)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert links and all((folder / link).is_file() for link in links)


def test_every_evaluator_stands_on_every_slice_and_on_the_probe(smoke_run):
    table = pd.read_csv(run_dir(smoke_run) / "evaluate" / "evaluators.csv")
    wanted = {f"agreement, {slice}" for slice in ("all", "leak_free", "length_matched", "leak_free_length_matched")}
    wanted |= {"probe", "length preference", "missing", "seconds per verdict"}
    for name, part in table.groupby("evaluator"): assert wanted <= set(part.measure), name
    assert set(table.evaluator) == {"multi_agent", "adversarial", "adversarial without reflection", "reward model",
                                    "TF-IDF", "length only", "always good"}
    probe = pd.read_csv(run_dir(smoke_run) / "evaluate" / "probe.csv")
    assert probe.groupby("evaluator").flaw.nunique().eq(13).all()
    assert (probe.low <= probe.value).all() and (probe.value <= probe.high).all()
    assert "query" not in json.dumps([*probe, *table])


def test_texts_do_nothing_to_any_format_of_a_table(tmp_path):
    bad = "<b>祝|福</b> *x* `y` $1_2^3~4\\\\input{z} & 5% #\u202e\x1b[31m"
    write_table(tmp_path, Table("bad", "A caption & 5 %.", pd.DataFrame({"text": [bad], "n": ["1"]})))
    page = report_page("bad", "nobody", table_html((tmp_path / "bad.md").read_text("utf-8").partition("\n\n")[2]))
    seen = BeautifulSoup(page, "html.parser")
    assert [cell.get_text() for cell in seen.find_all("td")] == [printable(bad), "1"] and not seen.find_all(["b", "em"])
    lines = (tmp_path / "bad.tex").read_text("utf-8")
    assert r"\$1\_2\textasciicircum{}3\textasciitilde{}4" in lines
    assert r"\textbackslash{}\textbackslash{}input\{z\}" in lines
    assert not {"\u202e", "\x1b"} & set(lines)
