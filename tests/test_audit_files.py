"creawrite audit FILE...: any file of texts and labels from the shell, and a clear answer to odd ones."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from creawrite.core import read_json, read_jsonl, run_dir
from creawrite.text import stray

AUDIT = Path(__file__).parents[1] / "nbs" / "02_audit.ipynb"


@pytest.fixture
def kit(kit):
    "The throwaway kit with the audit's own notebook, whose parameters are the command's defaults."
    shutil.copy(AUDIT, kit / "nbs" / "04_audit.ipynb")
    return kit


def write(folder, name, rows, columns=None):
    "A file in the form that its name asks for."
    path, table = folder / name, pd.DataFrame(rows, columns=columns)
    if path.suffix == ".parquet": table.to_parquet(path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in table.to_dict("records")]
        path.write_text("\n".join(lines), encoding="utf-8")
    else: table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",", encoding="utf-8-sig")
    return str(path)


def texts(n, seed=0):
    "Long good texts and short bad ones, half and half."
    rng, letters = np.random.default_rng(seed), list("春夏秋冬风花雪月山水云星梦光")
    draw = lambda low, high: "".join(rng.choice(letters, rng.integers(low, high))) + "，愿你安好。"
    return [(draw(20, 40), 1) if i % 2 else (draw(3, 25), 0) for i in range(n)]


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "mine.parquet"])
def test_two_columns_go_through_one_command(kit, creawrite, name):
    code, told, error = creawrite("audit", write(kit, name, texts(80), ["Text", "label"]))
    assert (code, error) == (0, "") and "80 labelled rows, 50.0 [39.3, 60.7] % of them good" in told
    assert "Length alone separates good from bad: AUC 0.9" in told and "threshold fitted on the other folds" in told
    assert "outputs/audit-mine/audit/" in told
    folder = run_dir("audit-mine") / "audit"
    table = pd.read_csv(folder / "table_a1.csv", keep_default_na=False)
    assert not table.check.str.startswith("query").any()
    names = {"all", "leak_free", "length_matched", "leak_free_length_matched"}
    assert set(read_json(folder / "slices.json")["evaluation"]) == names
    figures = [folder / f"figure_a{n}.{kind}" for n in (1, 2) for kind in ("svg", "png")]
    assert all(figure.stat().st_size > 3000 for figure in figures)


def test_several_files_show_what_they_share(kit, creawrite):
    train, test, more = texts(60, 1), texts(40, 2), texts(30, 3)
    test[0] = (train[1][0].replace("愿你", "祝你"), 0)  # a near-duplicate under the other label
    test[1] = train[3]
    pairs = [("生日祝福", good, bad) for (bad, _), (good, _) in zip(more[::2], more[1::2])]
    files = [write(kit, "train.csv", train, ["text", "label"]), write(kit, "test.csv", test, ["text", "label"]),
             write(kit, "pairs.csv", pairs, ["query", "chosen", "rejected"])]
    code, told, error = creawrite("audit", *files, "--run", "shared")
    assert (code, error) == (0, "") and "38 of 40 rows of evaluation are leak-free" in told
    assert "fitted on pairs_train" in told
    rows = read_jsonl(run_dir("shared") / "audit" / "examples.jsonl")
    examples = [(row["part"], row["other"], row["kind"]) for row in rows]
    assert ("sft", "evaluation good", "same") in examples and ("sft", "evaluation bad", "near") in examples


def test_labels_to_doubt_and_stray_pieces_are_listed(kit, creawrite):
    rows = texts(120)
    rows[0] = (texts(2, 9)[1][0], 0)  # a text like the good ones
    rows[2] = (rows[1][0], 0)  # the same text under both labels
    rows[4] = ("祝你every天开心，锟斤拷", 0)
    creawrite("audit", write(kit, "noisy.csv", rows, ["text", "label"]))
    folder, ids = run_dir("audit-noisy") / "audit", {}
    for row in read_jsonl(folder / "suspects.jsonl"): ids.setdefault(row["reason"], set()).add(int(row["id"][-5:]) - 1)
    assert ids["near-duplicate with the other label"] == {1, 2} and 0 in ids["a model of characters doubts the label"]
    assert [row["pieces"] for row in read_jsonl(folder / "stray.jsonl")] == [["锟斤拷", "every"]]


ONE_LABEL = [(text, 1) for text, _ in texts(30)]
EQUAL_LENGTHS = [("愿你安好" + "春夏秋冬"[i % 4], i % 2) for i in range(40)]


@pytest.mark.parametrize("rows, columns, code, answer", [
    (texts(20), ["words", "label"], 2, "has the columns words, label: the audit needs text and label"),
    ([], ["text", "label"], 1, "has no rows: there is nothing to audit"),
    ([("愿你安好", "maybe")], ["text", "label"], 1, "row 1: label 'maybe' is not one of 1, 0, good, bad"),
    ([("愿你安好", 1), ("", 0)], ["text", "label"], 1, "row 2: field 'response': is empty"),
    (ONE_LABEL, ["text", "label"], 0, "All rows carry one label: nothing can be separated"),
    (EQUAL_LENGTHS, ["text", "label"], 0, "All responses have the same length: it tells nothing"),
    (texts(5), ["text", "label"], 0, "So few rows decide nothing: look at the intervals"),
    (texts(2), ["text", "label"], 0, "One label has a single row: length cannot be tested"),
], ids=["missing column", "no rows", "odd label", "empty text", "one label", "equal lengths", "five rows", "two rows"])
def test_odd_files_get_a_clear_answer(kit, creawrite, rows, columns, code, answer):
    got, told, error = creawrite("audit", write(kit, "odd.csv", rows, columns))
    assert got == code and answer in (error if code else told) and "Traceback" not in error
    if code == 0 and len(rows) != 5: assert "nan" not in told and "alone separates" not in told


UNREADABLE = {"empty.csv": "has no rows", "latin.csv": "save it as UTF-8", "broken.jsonl": "was cut off",
              "image.png": "ends with .png is not known", "absent.csv": "no such file"}


def test_unreadable_files_get_a_clear_answer(kit, creawrite):
    (kit / "empty.csv").touch()
    (kit / "latin.csv").write_bytes("text,label\n祝好,1\n".encode("gb18030"))
    (kit / "broken.jsonl").write_text('{"text": "祝好", "label"')
    (kit / "image.png").touch()
    (kit / "outputs" / "busy").mkdir()
    (kit / "outputs" / "busy" / "run.json").write_text("{}")
    for name, answer in UNREADABLE.items():
        code, told, error = creawrite("audit", str(kit / name))
        assert code in (1, 2) and answer in error and told == ""
    fine = write(kit, "fine.csv", texts(20), ["text", "label"])
    assert "holds a run of the notebooks" in creawrite("audit", fine, "--run", "busy")[2]


@pytest.mark.parametrize("text, query, pieces", [
    ("愿你前路有光，VIP待遇，Wi-Fi满格", "", []),
    ("Happy生日", "写句happy birthday", []),
    ("愿你every天都好", "", ["every"]),
    ("お誕生日", "", ["お"]),
    ("С праздником", "", ["С", "праздником"]),
    ("祝ⁿⁿⁿ", "", ["ⁿⁿⁿ"]),
    ("愿\ufffd好", "", ["\ufffd"]),
    ("谢谢鎴戜滑", "", ["鎴"]),
    ("🎂🎉生日快乐～", "", []),
])
def test_stray(text, query, pieces): assert stray(text, query) == pieces
