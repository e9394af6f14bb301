"A user's table becomes splits that share nothing."
import csv
import json
import shutil

import pytest
from conftest import REPOSITORY

from creawrite.core import UsageError, read_jsonl, root
from creawrite.own_data import import_files
from creawrite.splits import responses
from creawrite.text import near_duplicates


@pytest.fixture
def here(monkeypatch, tmp_path):
    "The kit's folder, with own data elsewhere."
    for name in ("nbs", "settings.ini"): (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "data/sample", tmp_path / "data/sample")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    return tmp_path


def table(path, n=80, columns=("query", "response", "label")):
    "Our sample as a user's CSV."
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in read_jsonl(root() / "data/sample/greetings.jsonl")[:n]:
            query, good, weak = row["query"], row["good"], row["weak"]
            if columns[-1] == "label": writer.writerows([(query, good, 1), (query, weak, 0)])
            else: writer.writerow((query, good, weak))
    return path


@pytest.mark.parametrize("columns", [("query", "response", "label"), ("query", "chosen", "rejected")])
def test_one_table_becomes_seven_splits(here, columns):
    folder, splits, told = import_files([table(here / "my greetings.csv", columns=columns)])
    assert folder == "data/own/my-greetings" and told[0].startswith("my greetings.csv: ")
    assert {name: len(rows) for name, rows in splits.items()} == dict(
        sft=48, pairs_train=48, pairs_test=12, prompts_train=48, prompts_test=12, evaluation=40, queries=48)
    for name, rows in splits.items():
        lines = [json.loads(line) for line in (here / folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert lines == [row.model_dump() for row in rows]


def test_what_nearly_stands_twice_stays_together(here):
    path = table(here / "a.csv", 60)
    rows = read_jsonl(root() / "data/sample/greetings.jsonl")[:60]
    twins = [(row["query"] + "。", row["good"] + "！", 1) for row in rows]
    with path.open("a", encoding="utf-8", newline="") as file: csv.writer(file).writerows(twins)
    splits = import_files([path])[1]
    known = [text for row in splits["sft"] + splits["pairs_test"] for text in (row.query, *responses(row))]
    for field in ("query", "response"):
        held = [getattr(row, field) for row in splits["evaluation"]]
        assert held and not near_duplicates(known, held)


@pytest.mark.parametrize("rows, options, says", [
    ("query,response,label\n给妈妈,好,1\n", {}, "0 of 1 queries have both a good and a weak greeting"),
    ("text,label\n祝您好,1\n再见,0\n", {}, "has no queries"),
    ("query,response,label\n给妈妈,好,7\n给爸爸,好,1\n", {}, "label"),
    ("一,二\n1,2\n", {}, "column"),
    ("query,response,label\n给妈妈,好,1\n", {"name": "../x"}, "cannot be a folder's name")])
def test_what_cannot_be_used_is_told_and_nothing_is_written(here, rows, options, says):
    (here / "bad.csv").write_text(rows, "utf-8")
    with pytest.raises(UsageError, match=says): import_files([here / "bad.csv"], **options)
    assert not (here / "data/own").exists()


def test_a_folder_that_is_there_is_kept(here):
    import_files([table(here / "a.csv")], "mine")
    with pytest.raises(UsageError, match="data/own/mine is there already"): import_files([here / "a.csv"], "mine")
