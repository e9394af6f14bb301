"Files as people have them: every shape of data file gets its right rows, or one sentence about the actual cause."
import bz2
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from creawrite import audit, data
from creawrite.core import KitError, UsageError, read_json, run_dir
from creawrite.encodings import decode_text
from creawrite.files import about_parts, as_splits, own_parts, read_parts
from creawrite.layouts import as_part
from creawrite.splits import NO_QUERY
from creawrite.task import TASK
from creawrite.text import own_script, stray

QUERIES = [f"送给{who}的生日祝福" for who in ("妈妈", "老师", "同事", "朋友", "客户")]
GOOD = [f"愿{who}平安喜乐，新的一年里笑口常开，好运相伴。" for who in ("妈妈", "老师", "同事", "朋友", "客户")]
BAD = [f"祝{who}快乐。" for who in ("妈妈", "老师", "同事", "朋友", "客户")]
LABELLED = [dict(query=query, response=text, label=label) for query, good, bad in zip(QUERIES, GOOD, BAD)
            for text, label in ((good, 1), (bad, 0))]
PAIRS = [dict(query=query, chosen=good, rejected=bad) for query, good, bad in zip(QUERIES, GOOD, BAD)]


def lines(rows): return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def whole(rows): return json.dumps(rows, ensure_ascii=False, indent=1)


def table(rows, **how): return pd.DataFrame(rows).to_csv(index=False, **how)


def part_of(folder, name, content, **how):
    "A file of this content, as the kit reads it."
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return as_part(path, **how)


def texts(part):
    "Rows without their ids."
    return [row.model_dump(exclude={"id"}, exclude_none=True) for row in part.rows]


def user(text): return {"role": "user", "content": text}


def assistant(text): return {"role": "assistant", "content": text}


def human(text): return {"from": "human", "value": text}


def gpt(text): return {"from": "gpt", "value": text}


# ---- one set of labelled rows, in every dress

UTF16_TXT = table(LABELLED, sep="\t").encode("utf-16")  # what Excel calls Unicode text
DRESSES = {
    "a.jsonl": lines(LABELLED), "named.json": lines(LABELLED), "list.jsonl": whole(LABELLED), "A.JSON": whole(LABELLED),
    "data.json": whole({"data": LABELLED}), "deep.json": whole({"code": 0, "result": {"items": LABELLED, "n": 10}}),
    "columns.json": pd.DataFrame(LABELLED).to_json(), "lists.json": whole(pd.DataFrame(LABELLED).to_dict("list")),
    "keys.json": whole({str(i): row for i, row in enumerate(LABELLED)}), "b.ndjson": lines(LABELLED) + "\n\n",
    "pretty.jsonl": "\n".join(whole(row) for row in LABELLED), "commas.jsonl": lines(LABELLED).replace("}\n", "},\n"),
    "crlf.jsonl": lines(LABELLED).replace("\n", "\r\n"), "mac.jsonl": lines(LABELLED).replace("\n", "\r"),
    "escaped.jsonl": "\n".join(map(json.dumps, LABELLED)), "bom.jsonl": "\ufeff" + lines(LABELLED),
    "c.csv": table(LABELLED), "C.CSV": table(LABELLED), "semi.csv": table(LABELLED, sep=";"),
    "d.tsv": table(LABELLED, sep="\t"), "tabs.csv": table(LABELLED, sep="\t"), "bars.csv": table(LABELLED, sep="|"),
    "sep.csv": "sep=;\r\n" + table(LABELLED, sep=";"), "mixed.csv": table(LABELLED).replace("\n", "\r\n", 3),
    "excel.csv": table(LABELLED).replace("\n", "\r\n").encode("utf-8-sig"),
    "gb.csv": table(LABELLED).encode("gb18030"), "utf16.csv": table(LABELLED).encode("utf-16"),
    "utf16be.jsonl": lines(LABELLED).encode("utf-16-be"), "unicode.txt": UTF16_TXT, "rows.txt": lines(LABELLED),
    "index.csv": pd.DataFrame(LABELLED).to_csv(), "a.csv.gz": gzip.compress(table(LABELLED).encode()),
    "a.jsonl.bz2": bz2.compress(lines(LABELLED).encode()), "noending": lines(LABELLED), "table.json": table(LABELLED)}


@pytest.mark.parametrize("name", DRESSES)
def test_the_same_rows_in_every_dress(tmp_path, name):
    part = part_of(tmp_path, name, DRESSES[name])
    assert part.form == "evaluation" and texts(part) == LABELLED


def test_parquet_whatever_its_name(tmp_path):
    for name in ("a.parquet", "a.csv"):
        pq.write_table(pa.Table.from_pylist(LABELLED), tmp_path / name)
        assert texts(as_part(tmp_path / name)) == LABELLED


def test_how_a_file_was_read_is_told(tmp_path):
    told = lambda name: part_of(tmp_path, name, DRESSES[name]).notes
    assert told("a.jsonl") == told("c.csv") == told("bom.jsonl") == []
    assert told("named.json") == ["JSON Lines in spite of its name"] and told("gb.csv") == ["GB18030"]
    assert told("unicode.txt") == ["UTF-16", "fields separated by tabs"]
    assert told("data.json") == ["the rows under 'data'"]
    assert told("index.csv") == ["ignored columns: (no name)"]


# ---- other kits' layouts

def transcript(query, text): return f"\n\nHuman: {query}\n\nAssistant: {text}"


PAIR_LAYOUTS = {
    "dpo": lambda q, c, r: dict(prompt=q, chosen=c, rejected=r),
    "orca": lambda q, c, r: dict(system="你是助手", question=q, chosen=c, rejected=r),
    "messages": lambda q, c, r: dict(prompt=q, chosen=[user(q), assistant(c)], rejected=[user(q), assistant(r)]),
    "messages alone": lambda q, c, r: dict(chosen=[user(q), assistant(c)], rejected=[user(q), assistant(r)]),
    "prompt messages": lambda q, c, r: dict(prompt=[user(q)], chosen=[assistant(c)], rejected=[assistant(r)]),
    "sharegpt": lambda q, c, r: dict(conversations=[human(q)], chosen=gpt(c), rejected=gpt(r)),
    "turn lists": lambda q, c, r: dict(chosen=[human(q), gpt(c)], rejected=[human(q), gpt(r)]),
    "system turns": lambda q, c, r: dict(chosen=[dict(role="system", content="x"), user(q), assistant(c)],
                                         rejected=r, prompt=q),
    "alpaca": lambda q, c, r: dict(instruction=q, input="", chosen=c, rejected=r),
    "alpaca, two outputs": lambda q, c, r: dict(instruction=q, input="", output=[c, r]),
    "ultrafeedback": lambda q, c, r: dict(prompt=q, messages=[user(q), assistant(c)], chosen=[user(q), assistant(c)],
                                          rejected=[user(q), assistant(r)], score_chosen=8.0, score_rejected=3.0),
    "transcripts": lambda q, c, r: dict(chosen=transcript(q, c), rejected=transcript(q, r)),
    "parts": lambda q, c, r: dict(prompt=q, chosen=[assistant([dict(type="text", text=c)])], rejected=r),
    "chinese names": lambda q, c, r: {"问题": q, "Chosen ": c, "REJECTED": r}}


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_pairs_in_every_layout(tmp_path, layout, kind):
    rows = [PAIR_LAYOUTS[layout](*pair.values()) for pair in PAIRS]
    if kind == "jsonl": (tmp_path / "a.jsonl").write_text(lines(rows))
    elif kind == "parquet":
        try: pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        except pa.ArrowException: pytest.skip("Parquet holds no such mixture")
    else:
        cells = [{name: value if isinstance(value, str) else str(value) for name, value in row.items()} for row in rows]
        (tmp_path / "a.csv").write_text(table(cells))
        if layout == "alpaca, two outputs": pytest.skip("a table has no lists of texts")
    part = as_part(tmp_path / f"a.{kind}")
    assert part.form == "pairs" and texts(part) == PAIRS


ASKED, ANSWERED = dict(query="写祝福"), dict(query="写祝福", response="安康。")
CHAT = [user("写祝福"), assistant("安康。")]
OTHER_LAYOUTS = {
    "alpaca": (dict(instruction="写祝福", input="给妈妈", output="安康。"), "sft",
               ANSWERED | dict(query="写祝福\n给妈妈")),
    "chat": (dict(messages=CHAT), "sft", ANSWERED),
    "sharegpt": (dict(conversations=[human("写祝福"), gpt("安康。")]), "sft", ANSWERED),
    "trl": (dict(prompt=[user("写祝福")], completion=[assistant("安康。")]), "sft", ANSWERED),
    "kto": (dict(prompt="写祝福", completion="安康。", label=True), "evaluation", ANSWERED | dict(label=1)),
    "kto tag": (dict(messages=CHAT, kto_tag=False), "evaluation", ANSWERED | dict(label=0)),
    "several turns": (dict(messages=[user("写祝福"), assistant("给谁？"), user("妈妈"), assistant("安康。")]), "sft",
                      ANSWERED | dict(query="写祝福\n给谁？\n妈妈")),
    "verl": (dict(prompt=[user(TASK.prefix + "写祝福")], reward_model=dict(ground_truth="")), "prompts", ASKED),
    "open question": (dict(conversations=[human("写祝福")]), "prompts", ASKED),
    "input": (dict(input="写祝福", output="安康。"), "sft", ANSWERED),
    "no query": (dict(text="安康。", label="good"), "evaluation", dict(query=NO_QUERY, response="安康。", label=1)),
    "chinese": ({"指令": "写祝福", "回答": "安康。", "标签": "否"}, "evaluation", ANSWERED | dict(label=0))}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_layouts(tmp_path, layout):
    row, form, values = OTHER_LAYOUTS[layout]
    for name, content in (("a.jsonl", lines([row, row])), ("one.json", whole(row)), ("list.json", whole([row]))):
        part = part_of(tmp_path, name, content)
        assert part.form == form and texts(part)[-1] == values


def test_what_was_left_out_is_told(tmp_path):
    turns = [dict(role="system", content="x"), user("一"), assistant("二"), user("三"), assistant("四")]
    assert part_of(tmp_path, "a.jsonl", lines([dict(messages=turns, src=1)])).notes == [
        "system turns left out in 1 rows",
        "several turns in 1 texts: the query is all that stands before the last answer", "ignored columns: src"]
    apart = [dict(chosen=[user("一"), assistant("二")], rejected=[user("三"), assistant("四")])]
    assert part_of(tmp_path, "b.jsonl", lines(apart)).notes == [
        "chosen and rejected answer different questions in 1 rows"]
    scored = [dict(PAIRS[0], score_chosen=2, score_rejected=5)]
    assert part_of(tmp_path, "d.jsonl", lines(scored)).notes == [
        "score_chosen is below score_rejected in 1 rows", "ignored columns: score_chosen, score_rejected"]
    both = [dict(text="好", response="妙", label=1)]
    part = part_of(tmp_path, "c.jsonl", lines(both))
    assert part.rows[0].response == "妙" and part.notes == ["ignored columns: text"]


HELPSTEER = [dict(prompt=QUERIES[i % 5], response=GOOD[i % 5] + str(i),
                  helpfulness=i % 5, correctness=i % 4, verbosity=i % 3) for i in range(30)]
ULTRAFEEDBACK = [dict(source="x", instruction=QUERIES[i % 5], models=["a", "b"], completions=[
    dict(model="a", response=GOOD[i % 5], overall_score=7.5 + i % 2),
    dict(model="b", response=BAD[i % 5], overall_score=3.0)]) for i in range(10)]


def test_scores_are_told_and_the_user_names_the_label(tmp_path):
    part = part_of(tmp_path, "h.jsonl", lines(HELPSTEER))
    assert part.form == "sft" and "ignored columns: helpfulness, correctness, verbosity" in part.notes
    assert "helpfulness, correctness, verbosity could be it" in part.notes[-1]
    assert "--label 'helpfulness>=2'" in part.notes[-1]
    part = part_of(tmp_path, "h.jsonl", lines(HELPSTEER), label="helpfulness>=3")
    assert [row.label for row in part.rows[:5]] == [0, 0, 0, 1, 1]
    assert part.notes == ["ignored columns: correctness, verbosity"]
    part = part_of(tmp_path, "u.jsonl", lines(ULTRAFEEDBACK))
    assert len(part.rows) == 20 and "overall_score could be it" in part.notes[-1]
    part = part_of(tmp_path, "u.jsonl", lines(ULTRAFEEDBACK), label="overall_score > 5")
    assert [row.label for row in part.rows[:2]] == [1, 0]
    rated = [dict(text=text, rating=i % 5 + 1) for i, text in enumerate(GOOD + BAD)]
    with pytest.raises(UsageError, match="'rating' could be the label, say --label 'rating>=NUMBER'"):
        part_of(tmp_path, "r.csv", table(rated))
    rated = [dict(text=text, label=i % 5 + 1) for i, text in enumerate(GOOD + BAD)]
    advice = "'label' holds numbers from 1 to 5: say which of them are good with --label 'label>=3'"
    with pytest.raises(UsageError, match=advice): part_of(tmp_path, "l.csv", table(rated))


@pytest.mark.parametrize("given, read", [
    (["Good", "BAD", " good "], [1, 0, 1]), (["是", "否"], [1, 0]), ([1.0, 0.0], [1, 0]),
    (["label_1", "LABEL_0"], [1, 0]),
    ([True, False], [1, 0]), (["1,0", "0,0"], [1, 0]), ([1, -1], [1, 0]), (["yes", "no"], [1, 0]),
    (["优秀", "差"], [1, 0]), ([1, float("nan"), 0], [1, 0]), (["1", "", "nan", "None", "0"], [1, 0]),
    ([None, 1, 0], [1, 0]), ([1, 1], [1, 1])])
def test_labels(tmp_path, given, read):
    rows = [dict(text=f"愿你安好{i}", label=label) for i, label in enumerate(given)]
    part = part_of(tmp_path, "a.jsonl", lines(rows))
    assert [row.label for row in part.rows] == read
    left_out = len(given) - len(read)
    assert (f"{left_out} rows without a label left out" in part.notes) == bool(left_out)


# ---- one sentence about the actual cause

def workbook():
    "A real workbook would need another package; this has its parts."
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file: file.writestr("xl/workbook.xml", "<workbook/>")
    return held.getvalue()


def parquet_bytes():
    held = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(LABELLED), held)
    return held.getvalue()


SURROGATE = [LABELLED[0], dict(LABELLED[1], response="好\ud83d")]
HEADLESS = "愿你平安喜乐，新的一年里笑口常开，好运相伴。,1\n" * 3
TWO_ANSWERS = dict(prompt="x", response_a="a", response_b="b", winner="a")
KOREAN, JAPANESE = "생일 축하합니다 항상 건강하고 행복하세요", "お誕生日おめでとうございます"
REFUSED = {
    ("broken.jsonl", lines(LABELLED[:2]) + '\n{"query": "x", "respon\n' + lines(LABELLED[2:])): [
        "row 3", "line 3 begins '{\"query\": \"x\", \"respon'", "mend or remove that line"],
    ("first.jsonl", '{"query": "x"\n' + lines(LABELLED)): ["line 1 begins '{\"query\": \"x\"'"],
    ("text.jsonl", lines(LABELLED[:3]) + "\nDONE\n"): ["line 4 begins 'DONE'"],
    ("cut.json", whole(LABELLED)[:-60]): ["cut off"],
    ("trailing.json", '[\n{"query": "x"},\n]'): ["line 3, which begins ']'", "not valid JSON"],
    ("surrogate.jsonl", "\n".join(map(json.dumps, SURROGATE))): ["row 2: field 'response'", "lone surrogate \\ud83d"],
    ("raw.jsonl", lines(SURROGATE)): ["row 2: field 'response'", "lone surrogate"],
    ("number.json", "[1, 2]"): ["row 1: expected one object with named fields per row, found a number"],
    ("several.json", whole({"train": LABELLED, "test": LABELLED})): ["several lists (train, test)"],
    ("extra.csv", "text,label\n愿你平安,喜乐,1\n"): ["line 2: 3 fields where the header has 2", "quotation marks"],
    ("quote.csv", 'text,label\n好,1\n"愿你平安,0\n妙,1\n'): ["line 3", "never closed"],
    ("twice.csv", "text,text,label\na,b,1\n"): ["two columns 'text'"],
    ("headless.csv", HEADLESS): ["put a line of names above it"],
    ("ab.jsonl", lines([TWO_ANSWERS])): ["name the better one chosen"],
    ("page.csv", "<!DOCTYPE html>\n<html><body>Sign in</body></html>"): ["a web page", "download the file itself"],
    ("book.csv", workbook()): ["is an Excel workbook", "CSV UTF-8"],
    ("book.xls", b"\xd0\xcf\x11\xe0" + bytes(600)): ["Excel"],
    ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"): ["LFS pointer", "git lfs pull"],
    ("cut.parquet", parquet_bytes()[:-30]): ["cannot be read as Parquet"],
    ("x.parquet", "hello"): ["is no Parquet file"],
    ("plain.jsonl", "生日祝福\n新年祝福\n"): ["line 1 is not JSON, it begins '生日祝福'"],
    ("cut.csv.gz", gzip.compress(table(LABELLED).encode())[:-20]): ["compressed and breaks off"],
    ("sjis.csv", f"text,label\n{JAPANESE},1\n".encode("shift_jis")): ["looks like Shift-JIS", "save it as UTF-8"],
    ("big5.csv", "text,label\n祝您生日快樂，健康長壽，幸福安康,1\n".encode("big5")): ["looks like Big5"],
    ("korea.csv", f"text,label\n{KOREAN},1\n".encode("euc_kr")): ["looks like EUC-KR"],
    ("latin.csv", "text,label\nAlles Gute für dich, schöne Grüße,1\n".encode("latin-1")): ["looks like Windows-1252"],
    ("few.csv", "text,label\n祝好,1\n".encode("gb18030")): ["save it as UTF-8"],
    ("half.csv", table(LABELLED).encode() + "x,祝".encode()[:-1]): ["ends in the middle of a character", "line 12"],
    ("byte.csv", table(LABELLED[:3]).encode() + b"x\xff,y,1\n" + table(LABELLED).encode()): ["the first in line 5"],
    ("empty.jsonl", ""): ["has no rows"], ("blank.csv", "\n \n"): ["has no rows"],
    ("header.csv", "text,label\n"): ["has no rows"], ("list.json", "[]"): ["has no rows"],
    ("data.json", '{"data": []}'): ["has no rows"],
    ("nothing.csv", "text,label\n好,\n妙,nan\n"): ["no row has a label"],
    ("tool.jsonl", lines([dict(messages=[user("x"), dict(role="tool", content="y")])])): ["row 1", "a turn by 'tool'"],
    ("number.jsonl", lines([LABELLED[0], dict(LABELLED[1], response=3)])): ["row 2: field 'response'"],
    ("missing.jsonl", lines([LABELLED[0], dict(query="x", label=1)])): ["row 2: field 'response': is empty"],
    ("mix.csv", table(LABELLED).encode() + table(LABELLED, header=False).encode("gb18030")): ["holds two encodings"],
    ("binary.csv", bytes(range(1, 256)) * 20): ["holds binary data, no text"],
    ("arena.jsonl", lines([dict(conversation_a=[user("x"), assistant("a")], winner="model_a",
                                conversation_b=[user("x"), assistant("b")])])): ["name the better one chosen"],
    ("nested.jsonl", lines([dict(conversations=[dict(messages=[])])] * 2)): ["row 1", "a turn without role and"],
    ("nulls.jsonl", "null\n" + lines(LABELLED)): ["row 1: expected one object with named fields per row, found empty"],
    ("infinite.jsonl", lines([LABELLED[0], dict(LABELLED[1], label=float("inf"))])): ["row 2: label inf is not one of"],
    ("deep.json", "[" * 100_000): ["too many lists inside each other"],
    ("a.docx", "x"): ["ends with .docx is not known"]}


@pytest.mark.parametrize("name, content", REFUSED, ids=[name for name, _ in REFUSED])
def test_a_refusal_names_the_cause(tmp_path, name, content):
    with pytest.raises(KitError) as refused: part_of(tmp_path, name, content)
    said = str(refused.value)
    assert all(words in said for words in REFUSED[name, content]) and name in said and "\n" not in said, said
    if "utf-8" in said.lower(): assert "JSON" not in said, "a hint is about the cause"


def test_places_that_are_no_file(tmp_path):
    for path, words in ((tmp_path / "none.csv", "no such file"), (tmp_path / ("名" * 90 + ".csv"), "too long"),
                        (tmp_path, "folder without a file that ends with")):
        with pytest.raises(UsageError, match=words): read_parts([path])
    if os.geteuid():
        (tmp_path / "secret.csv").touch(mode=0)
        with pytest.raises(UsageError, match="Permission denied"): as_part(tmp_path / "secret.csv")


def test_gb18030_is_read_when_unmistakable_only():
    prose = "给第600位邻居的新年祝福，愿你琴棋花月书山冬风酒茶春棋灯冬月画茶花秋秋。"
    assert decode_text(prose.encode("gb18030"), "a") == (prose, "GB18030")
    for text, codec in ((KOREAN, "euc_kr"), ("結婚おめでとう。末永くお幸せに。", "euc_jp"),
                        ("с днём рождения, всего самого хорошего", "cp1251")):
        with pytest.raises(UsageError, match="looks like"): decode_text(text.encode(codec), "a")


# ---- several files, folders, a run's own data

def test_a_folder_of_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/reward_test.json").write_text(whole(PAIRS[:2]))
    (tmp_path / "sub/reward_train.json").write_text(whole(PAIRS[2:]))
    (tmp_path / "eval.CSV").write_text(table(LABELLED))
    (tmp_path / "q.txt").write_text("生日祝福\n生日祝福\n新年祝福\n")
    (tmp_path / "notes.json").write_text('{"author": "x"}')
    for name in ("README.md", "LICENSE.txt", ".hidden.csv"): (tmp_path / name).write_text("x")
    parts, left_out = read_parts([tmp_path])
    assert {name: len(rows) for name, rows in as_splits(parts).items()} == dict(
        pairs_train=3, pairs_test=2, evaluation=10, queries=3)
    assert len(left_out) == 1 and "notes.json has the columns author" in left_out[0]
    assert "q.txt: 3 queries, 2 of them distinct, taken as queries; a query per line." in about_parts(parts)


def test_own_data_through_the_same_reader(tmp_path):
    (tmp_path / "SFT.csv").write_text(table([dict(id=7, query="生日", response="好", clicks=3, by="x")]))
    pairs = [PAIR_LAYOUTS["messages alone"](*pair.values()) for pair in PAIRS]
    (tmp_path / "pairs_train.json").write_text(lines(pairs))
    pq.write_table(pa.table({"prompt": [[user(TASK.prefix + "新年")]]}), tmp_path / "prompts_test.parquet")
    (tmp_path / "queries.txt").write_bytes("生日祝福语，要温暖一点\n新年快乐的话\n".encode("gb18030"))
    splits, told = own_parts(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == dict(sft=1, pairs_train=5, prompts_test=1, queries=2)
    assert splits["sft"][0].model_dump() == dict(id="7", query="生日", response="好", clicks=3)
    assert "SFT.csv: 1 queries with a response, taken as sft; ignored columns: by." in told
    for name, content, complaint in (
            ("sft.jsonl", "x", "two files for sft"), ("evaluation.csv", table(PAIRS), "evaluation needs query"),
            ("pairs_test.csv", table([dict(chosen="a", rejected="b")]), "field 'query' is missing"),
            ("prompts_train.jsonl", lines([dict(id=1, query="x")] * 2), "id '1' occurs twice")):
        (tmp_path / name).write_text(content)
        with pytest.raises(KitError, match=complaint): own_parts(tmp_path)
        (tmp_path / name).unlink()


def test_a_single_file_or_a_folder_without_our_names_is_own_data_too(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(PAIRS[:3]))
    (tmp_path / "test.jsonl").write_text(lines(PAIRS[3:]))
    splits = data.splits_of(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == dict(pairs_train=3, pairs_test=2)
    assert list(data.splits_of(str(tmp_path / "train.jsonl"))) == ["pairs_train"]
    with pytest.raises(KitError, match="neither sample, released nor a"): data.splits_of(str(tmp_path / "none"))


def test_copies_of_upstreams_files_are_found_by_their_checksum(tmp_path, monkeypatch):
    files = {"a/train.json": b"[\n1]\n", "b/train.json": b"[\n2]\n"}
    listed = {name: dict(bytes=len(body), sha256=hashlib.sha256(body).hexdigest()) for name, body in files.items()}
    monkeypatch.setattr(data, "manifest", lambda: dict(base_url="http://nowhere", files=listed))
    for name, body in files.items():
        place = tmp_path / "clone" / "deep" / name
        place.parent.mkdir(parents=True)
        place.write_bytes(body.replace(b"\n", b"\r\n"))  # as git checks out on Windows
    data.fetch(tmp_path / "clone", target=tmp_path / "to")
    assert all((tmp_path / "to" / name).read_bytes() == body for name, body in files.items())
    (tmp_path / "page/a").mkdir(parents=True)
    (tmp_path / "page/a/train.json").write_text("<!doctype html><html></html>")
    with pytest.raises(KitError, match="is a web page"): data.fetch(tmp_path / "page", target=tmp_path / "other")
    assert not list(tmp_path.rglob("*.part"))


# ---- scripts

ENGLISH = [dict(query=f"A wish for {who}", response=f"Dear {who}, many happy returns of the day, naïve café 生日",
                label=i % 2) for i, who in enumerate(["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn"])]


@pytest.mark.parametrize("text, script, pieces", [
    ("Happy birthday, café Zoë", "Latin", []), ("Happy birthday 生日快乐", "Latin", ["生日快乐"]),
    ("Itâ€™s Ã© NÃO", "Latin", ["â€", "Ã©"]), ("お誕生日おめでとう、every day", "Japanese", ["every", "day"]),
    ("С днём рождения", "Cyrillic", []), ("생일 축하해요", "Hangul", []), ("愿你every天开心", "Han", ["every"])])
def test_a_text_has_a_script_of_its_own(text, script, pieces):
    assert own_script([text]) == script and stray(text, "", script) == pieces


# ---- the command

@pytest.fixture
def kit(kit):
    "The throwaway kit with the audit's own notebook, whose parameters are the command's defaults."
    shutil.copy(REPOSITORY / "nbs" / "02_audit.ipynb", kit / "nbs" / "04_audit.ipynb")
    return kit


def test_an_english_file_is_not_all_stray(kit, creawrite):
    (kit / "e.jsonl").write_text(lines(ENGLISH))
    code, told, error = creawrite("audit", str(kit / "e.jsonl"))
    assert (code, error) == (0, "")
    assert "mojibake in 3 of 3 texts of evaluation good (the data's own script is Latin)" in told
    notes = pd.read_csv(run_dir("audit-e") / "audit" / "table_a1.csv", keep_default_na=False).set_index("check").note
    assert "the data's own script is Latin" in notes["good response with stray script or mojibake"]


def test_what_was_read_and_why_there_is_nothing_to_say(kit, creawrite):
    (kit / "q.TXT").write_text("生日祝福\n新年祝福\n")
    code, told, error = creawrite("audit", str(kit / "q.TXT"))
    assert code == 0 and "Nothing to tell of queries" in told
    assert "q.TXT: 2 queries, taken as queries; a query per line." in told
    (kit / "same.jsonl").write_text(lines([dict(pair, rejected=pair["chosen"]) for pair in PAIRS[:3]] + PAIRS[3:]))
    told = creawrite("audit", str(kit / "same.jsonl"))[1]
    assert "pairs_train: chosen and rejected are the same text in 3 of 5 pairs" in told
    findings = read_json(run_dir("audit-same") / "audit" / "findings.json")
    assert findings[0] == "same.jsonl: 5 pairs, taken as pairs_train."
    (kit / "one.csv").write_text(table(LABELLED[:1]))
    assert "All rows carry one label" in creawrite("audit", str(kit / "one.csv"))[1]


def test_two_files_of_one_name_have_two_folders(kit, creawrite):
    places = []
    for folder, rows in (("a", LABELLED), ("b", LABELLED[:6]), ("a", LABELLED)):
        (kit / folder).mkdir(exist_ok=True)
        (kit / folder / "mine.csv").write_text(table(rows))
        told = creawrite("audit", str(kit / folder / "mine.csv"))[1]
        places.append(told.split("outputs/")[-1].split("/")[0])
    assert places[0] == places[2] == "audit-mine" and places[1].startswith("audit-mine-")
    count = lambda run: len((run_dir(run) / "data/evaluation.jsonl").read_text().splitlines())
    assert [count(place) for place in places[:2]] == [10, 6]
    assert creawrite("audit", str(kit / "b" / "mine.csv"), "--run", "named")[0] == 0 and count("named") == 6


ODD_NAMES = ["祝" * 80 + ".csv", "x" * 240 + ".jsonl", os.fsdecode("祝福.csv".encode("gbk")), "a b/-#.csv"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=["Chinese", "long", "GBK", "signs"])
def test_odd_names(kit, creawrite, name):
    path = kit / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(table(LABELLED) if name.endswith("csv") else lines(LABELLED))
    code, told, error = creawrite("audit", str(path))
    assert (code, error) == (0, "") and "10 labelled rows" in told
    made, = [place.name for place in (kit / "outputs").iterdir()]
    assert len(made.encode()) <= 100 and made.startswith("audit-")
    assert "300 bytes long" in creawrite("audit", str(path), "--run", "y" * 300)[2]


def test_labels_of_the_users_choice(kit, creawrite):
    (kit / "h.jsonl").write_text(lines(HELPSTEER))
    told = creawrite("audit", str(kit / "h.jsonl"), "--label", "helpfulness>=3")[1]
    assert "30 labelled rows, 40.0 " in told and "ignored columns: correctness, verbosity" in told
    code, _, error = creawrite("audit", str(kit / "h.jsonl"), "--label", "helpful")
    assert code == 2 and "has no column 'helpful': the nearest is 'helpfulness'" in error


def test_in_the_c_locale(tmp_path):
    "File names, texts and sentences are UTF-8 whatever the locale says."
    (tmp_path / "祝福.csv").write_bytes(table(LABELLED).encode("gb18030"))
    code = ("import sys; from pathlib import Path; from creawrite.layouts import as_part; "
            "print(len(as_part(Path(sys.argv[1])).rows))")
    environment = os.environ | dict(LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = [sys.executable, "-c", code, str(tmp_path / "祝福.csv").encode()]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "10", done.stderr


# ---- runs with hardly any splits

def test_a_run_without_splits_gets_a_sentence(kit):
    with pytest.raises(KitError, match="has no splits to audit: run stage 01_data of it first"):
        audit.run_audit("fresh", seed=1, width=5, close=5)


HARDLY_ANY = [PAIRS[:1], LABELLED[:1], LABELLED[:2], [dict(query="x")], [dict(query="x", response="好")]]


@pytest.mark.parametrize("rows", HARDLY_ANY)
def test_table_a1_of_hardly_any_rows(kit, rows):
    (kit / "a.jsonl").write_text(lines(rows))
    _, sentences = audit.audit_files([kit / "a.jsonl"], "", seed=1, width=5, close=5)
    assert len(sentences) > 1 and not any("nan" in sentence for sentence in sentences[1:])


RELEASED = {"evaluation_set/evaluate_data.json": ("evaluation", 2000), "sft/sft_data.json": ("sft", 4000),
            "reward_model/reward_data_train.json": ("pairs", 6310),
            "reward_model/reward_data_test.json": ("pairs", 1586),
            "grpo_data/train.parquet": ("prompts", 3200), "grpo_data/test.parquet": ("prompts", 800),
            "random_query.txt": ("prompts", 10000)}


@pytest.mark.released
def test_every_released_file_reads_as_the_strict_readers_do():
    places = (REPOSITORY / "data/released", REPOSITORY.parent / "shared/released")
    folder = next((place for place in places if (place / "sft/sft_data.json").is_file()), None)
    if not folder: pytest.skip("the released data is not here: creawrite data fetch")
    for name, (form, n) in RELEASED.items():
        part = as_part(folder / name)
        assert (part.form, len(part.rows)) == (form, n)
    parts, left_out = read_parts([folder])
    splits, strict = as_splits(parts), data.released_splits(folder)
    assert not left_out and splits.keys() == strict.keys()
    bare = lambda rows: [row.model_dump(exclude={"id"}) for row in rows]
    for name, rows in strict.items(): assert bare(rows) == bare(splits[name]), name
