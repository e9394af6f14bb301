"Stage 01 and its rooms: schemas, readers, download, sample, scene and constraint rules."
import hashlib, http.server, json, threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from creawrite import data
from creawrite.core import KitError, file_digest, read_json
from creawrite.files import read_alpaca, read_pairs, read_verl
from creawrite.splits import (SPLITS, EvaluationRow, Prompt, Query, SFTRow, cap, has_split, held_out, load_split,
                              read_split, responses, write_splits)
from creawrite.task import TASK
from creawrite.text import Constraint, constraint, keeps, normalise, scene

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def kit(tmp_path, monkeypatch):
    "A kit folder of its own, so that no test writes into the repository's outputs."
    (tmp_path / "kit/nbs").mkdir(parents=True)
    (tmp_path / "kit/settings.ini").touch()
    (tmp_path / "kit/data").symlink_to(REPOSITORY / "data")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path / "kit"))
    return tmp_path / "kit"


def released():
    "Upstream's files, or a skip."
    for folder in (REPOSITORY / "data/released", REPOSITORY.parent / "shared/released"):
        if (folder / "sft/sft_data.json").is_file(): return folder
    pytest.skip("the released data is not here: creawrite data fetch")


@pytest.mark.parametrize("text, expected", [
    ("\ufeff生日\u200b快乐", "生日快乐"), (" 平安\r\n喜乐\r ", "平安\n喜乐"), ("e\u0301", "é"),
    ("祝福\u2028绵长", "祝福\n绵长"), ("愿你，安好！（真的）", "愿你，安好！（真的）"),
    ("👩\u200d👧", "👩\u200d👧"), ("福\u200d到", "福到"),
    ("\u3000岁岁平安\u3000", "岁岁平安"), ("\u2066新年\u2069", "新年"), ("\u200b \ufeff", "")])
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


HIGH = """\
春节祝福 除夕给爸妈 元旦快乐 元宵佳节 元霄节 端午安康 七夕告白 中秋团圆 重阳敬老 国庆放假 母亲节 父亲节快乐
教师节给导师 儿童节 六一 圣诞快乐 护士节 泼水节 跨年夜 蛇年大吉 给奶奶拜个年 大年初二 年初三拜年 正月十五 腊八
小年 新的一年 生日快乐 八十大寿 寿星 周岁 女儿12岁 三十岁 兔年新春 五一劳动节 复活节 祖国生日 节日快乐""".split()
GENERAL = """\
祝同事升职 新婚快乐 乔迁之喜 考试顺利 早日康复 晚安 毕业赠言 开业大吉 健康长寿 季节更替 时节如歌 细节动人
节气问候 环节顺利 节节高升 岁月静好 胜过年龄 初三年级加油 初一新生 满月酒 退休生活 节约用水 情节动人
结婚纪念日""".split()


@pytest.mark.parametrize("query, expected", [*((query, "high-frequency") for query in HIGH),
                                             *((query, "general") for query in GENERAL)])
def test_scene(query, expected): assert scene(query) == expected


CONSTRAINTS = {
    "新婚祝福八个字": ("chars", 8), "8个字恭祝乔迁": ("chars", 8), "祝福语四字": ("chars", 4),
    "二十八字贺词": ("chars", 28), "写一句十四字的祝福": ("chars", 14), "元宵祝福１２字": ("chars", 12),
    "创作1个十字祝福": ("chars", 10), "生日祝福简短八个字": ("chars", 8), "祝两个人幸福的八个字": ("chars", 8),
    "四句祝福": ("clauses", 4), "两句话就好": ("clauses", 2), "写六句给朋友": ("clauses", 6),
    "祝福5句": ("clauses", 5),
    "不超过20字": ("short", 20), "30字以内的祝福": ("short", 30), "最多十五个字": ("short", 15),
    "简短点": ("short", 20), "短一点": ("short", 20), "一句话祝福": ("short", 20),
    "生日祝福": None, "四字成语": None, "四字词语": None, "创作2个八字祝福": None, "三条祝福，四句": None,
    "写几句": None, "每日一句": None, "第一句": None, "每日一句话": None, "五十字左右": None, "一百字祝福": None,
    "100句祝福": None, "十句吉祥话": None, "不提生日两字": None, "带福字的话": None, "八字开头": None, "二三字": None,
    "8到10字": None}


@pytest.mark.parametrize("query, expected", CONSTRAINTS.items())
def test_constraint(query, expected):
    assert constraint(query) == (expected and Constraint(kind=expected[0], value=expected[1]))


@pytest.mark.parametrize("kind, value, text, kept", [
    ("chars", 8, "推窗得月，满室清风。", True), ("chars", 8, "推窗得月，满室清风啊。", False),
    ("chars", 4, "平安喜乐 ok 🎉！", True), ("chars", 4, "", False),
    ("clauses", 2, "山高水长，一路平安！", True), ("clauses", 2, "山高水长,\n一路平安!!🎉", True),
    ("clauses", 3, "一，二，三，四", False), ("clauses", 1, "愿你、我、他都好", True),
    ("short", 6, "一路平安！", True), ("short", 3, "一路平安", False), ("short", 20, "", True)])
def test_keeps(kind, value, text, kept): assert keeps(Constraint(kind=kind, value=value), text) is kept


GOOD = {"id": "a", "query": "生日祝福", "response": "愿你岁岁有花。", "label": 1}


@pytest.mark.parametrize("line, complaint", [
    ('{"id": "a", "query": "生', "row 2: not a whole JSON object"), ("[1, 2]", "row 2: field 'the row'"),
    (json.dumps({**GOOD, "label": 2}), "row 2: field 'label'"),
    (json.dumps({**GOOD, "label": "1"}), "field 'label'"), (json.dumps({**GOOD, "mark": 1}), "field 'mark'"),
    (json.dumps({**GOOD, "query": " \u200b"}), "field 'query': is empty"),
    (json.dumps({key: GOOD[key] for key in ("id", "query", "label")}), "field 'response': Field required"),
    (json.dumps({**GOOD, "response": 3}), "field 'response'"), (json.dumps(GOOD), "occurs twice")])
def test_wrong_row_is_named(tmp_path, line, complaint):
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(KitError, match="evaluation.jsonl, row 2") as error: read_split(path, EvaluationRow)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": "a", "query": "平安\u2028喜乐"}\n', encoding="utf-8")
    assert read_split(tmp_path / "q.jsonl", Query)[0].query == "平安\n喜乐"


def test_missing_empty_and_misencoded_files(tmp_path):
    with pytest.raises(KitError, match="creawrite data fetch"): read_split(tmp_path / "no.jsonl", Query)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(KitError, match="has no rows"): read_split(tmp_path / "empty.jsonl", Query)
    (tmp_path / "gbk.jsonl").write_bytes("生日".encode("gbk"))
    with pytest.raises(KitError, match="not UTF-8"): read_split(tmp_path / "gbk.jsonl", Query)


def turn(role, value): return {"from": role, "value": value}


PAIR = {"conversations": [turn("human", "生日祝福")], "chosen": turn("gpt", "愿你岁岁有花。"),
        "rejected": turn("gpt", "快乐。")}


@pytest.mark.parametrize("change, complaint", [
    ({"conversations": [turn("user", "生日祝福")]}, "conversations.0.from"), ({"conversations": []}, "conversations"),
    ({"conversations": PAIR["conversations"] * 2}, "conversations"),
    ({"chosen": turn("human", "好")}, "chosen.from"), ({"rejected": {"from": "gpt"}}, "rejected.value"),
    ({"chosen": "好"}, "chosen")])
def test_wrong_pair_is_named(tmp_path, change, complaint):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PAIR, {**PAIR, **change}]), encoding="utf-8")
    with pytest.raises(KitError, match="row 2") as error: read_pairs(path, "p")
    assert complaint in str(error.value)


def test_broken_json_list(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PAIR])[:-9], encoding="utf-8")
    with pytest.raises(KitError, match="line 1: not valid JSON"): read_pairs(path, "p")
    path.write_text('{"a": 1}')
    with pytest.raises(KitError, match="expected a JSON list"): read_pairs(path, "p")


def test_alpaca_and_verl(tmp_path):
    records = [{"instruction": "写祝福", "input": "给妈妈", "output": "安康。"},
               {"instruction": "写祝福", "output": "好。"}]
    (tmp_path / "sft.json").write_text(json.dumps(records), encoding="utf-8")
    assert [row.query for row in read_alpaca(tmp_path / "sft.json")] == ["写祝福\n给妈妈", "写祝福"]
    prompt = lambda role, text: [{"content": text, "role": role}]
    prompts = [prompt("user", TASK.prefix + "生日"), prompt("user", "新年")]
    pq.write_table(pa.table({"prompt": prompts, "ability": ["x", "x"]}), tmp_path / "a.parquet")
    assert [row.query for row in read_verl(tmp_path / "a.parquet", "p")] == ["生日", "新年"]
    pq.write_table(pa.table({"prompt": [prompt("user", "新年"), prompt("system", "生日")]}), tmp_path / "b.parquet")
    with pytest.raises(KitError, match="row 2: field 'prompt.0.role'"): read_verl(tmp_path / "b.parquet", "p")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(KitError, match="cannot be read as Parquet"): read_verl(tmp_path / "c.parquet", "p")


FILES = {"sft/sft_data.json": bytes(range(256)) * 400, "random_query.txt": "生日祝福\n".encode() * 50}


class Server(http.server.BaseHTTPRequestHandler):
    "Serves FILES with Range support; breaks off the first `breaks` answers half-way."
    breaks, ranges, seen = 0, True, []

    def do_GET(self):
        body, wanted = FILES.get(self.path.removeprefix("/dataset/")), self.headers.get("Range")
        type(self).seen.append((self.path, wanted))
        if body is None: return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if type(self).breaks > 0:
            type(self).breaks -= 1
            body = body[:start + (len(body) - start) // 2]
        self.wfile.write(body[start:])

    def log_message(self, *_): pass


@pytest.fixture
def server(monkeypatch):
    files = {name: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in FILES.items()}
    monkeypatch.setattr(data, "manifest", lambda: {"base_url": "http://127.0.0.1:9/none", "files": files})
    monkeypatch.setattr(Server, "seen", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/dataset"
        running.shutdown()


def whole(folder):
    "All files with their content, and no half ones."
    complete = all((folder / name).read_bytes() == body for name, body in FILES.items())
    return complete and not list(folder.rglob("*.part"))


@pytest.mark.parametrize("breaks, ranges", [(0, True), (1, True), (2, True), (0, False)])
def test_download_resumes(tmp_path, server, monkeypatch, breaks, ranges):
    monkeypatch.setattr(Server, "breaks", breaks)
    monkeypatch.setattr(Server, "ranges", ranges)
    assert len(data.fetch(target=tmp_path, base_url=server)) == 2
    assert whole(tmp_path)
    half = len(FILES["sft/sft_data.json"]) // 2
    asked = [wanted for path, wanted in Server.seen if path.endswith("sft_data.json")]
    assert asked == [None, f"bytes={half}-", f"bytes={half + half // 2}-"][:breaks + 1]


def test_download_continues_in_the_next_call(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Server, "breaks", 4)
    with pytest.raises(KitError, match="run the command again to continue"):
        data.fetch(target=tmp_path, base_url=server)
    assert (tmp_path / "sft/sft_data.json.part").stat().st_size > len(FILES["sft/sft_data.json"]) // 2
    data.fetch(target=tmp_path, base_url=server)
    assert whole(tmp_path)
    asked = len(Server.seen)
    data.fetch(target=tmp_path, base_url=server)
    assert len(Server.seen) == asked


def test_wrong_checksum_overwrites_nothing(tmp_path, server, monkeypatch):
    old = tmp_path / "sft/sft_data.json"
    old.parent.mkdir()
    old.write_text("mine")
    monkeypatch.setitem(FILES, "sft/sft_data.json", bytes(len(FILES["sft/sft_data.json"])))
    with pytest.raises(KitError, match="wrong checksum"): data.fetch(target=tmp_path, base_url=server)
    assert old.read_text() == "mine" and not list(tmp_path.rglob("*.part"))


def test_no_server_and_no_such_file(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(KitError, match="Not Found"): data.fetch(target=tmp_path, base_url=server + "/elsewhere")
    with pytest.raises(KitError, match="--from"): data.fetch(target=tmp_path)


def test_fetch_from_a_folder(tmp_path, server):
    for name, body in FILES.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(body)
    data.fetch(tmp_path / "from", target=tmp_path / "to")
    assert whole(tmp_path / "to") and not Server.seen
    (tmp_path / "from/random_query.txt").unlink()
    data.fetch(tmp_path / "from", target=tmp_path / "to")
    with pytest.raises(KitError, match="random_query.txt is missing"):
        data.fetch(tmp_path / "from", target=tmp_path / "other")


def test_sample_is_what_the_card_says():
    rows = data.read_sample(REPOSITORY / "data/sample/greetings.jsonl")
    assert len(rows) == 264 and Counter(row.split for row in rows) == {"train": 132, "test": 44, "evaluation": 88}
    texts = {row.good for row in rows} | {row.weak for row in rows}
    assert len({row.query for row in rows}) == 264 and len(texts) == 528
    occasions = Counter(row.occasion for row in rows)
    assert len(occasions) == 24 and set(occasions.values()) == {11} and len({row.receiver for row in rows}) == 141
    flaws = Counter(row.flaw for row in rows)
    assert len(flaws) == 12 and min(flaws.values()) >= 12
    card = (REPOSITORY / "data/README.md").read_text(encoding="utf-8")
    assert all(f"{flaw} {count}" in card for flaw, count in flaws.items())
    for split in ("train", "test", "evaluation"): assert {row.flaw for row in rows if row.split == split} == set(flaws)


def test_sample_constraints_are_stated_and_kept():
    rows = data.read_sample(REPOSITORY / "data/sample/greetings.jsonl")
    kinds = Counter(row.constraint.kind for row in rows if row.constraint)
    assert kinds == {"chars": 24, "clauses": 21, "short": 15}
    for row in rows:
        assert constraint(row.query) == row.constraint, row.query
        unbroken = row.flaw != "broken_constraint"
        if not row.constraint: assert unbroken
        else: assert [keeps(row.constraint, text) for text in (row.good, row.weak)] == [True, unbroken], row.id


def test_sample_lengths_are_balanced_and_texts_distinct():
    rows = data.read_sample(REPOSITORY / "data/sample/greetings.jsonl")
    for part in (rows, *([row for row in rows if row.split == split] for split in ("train", "test", "evaluation"))):
        lengths = [len(row.good) for row in part] + [len(row.weak) for row in part]
        assert 0.40 <= roc_auc_score([1] * len(part) + [0] * len(part), lengths) <= 0.60
    for texts in ([row.query for row in rows], [row.good for row in rows], [row.weak for row in rows]):
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts)
        assert np.triu((vectors @ vectors.T).toarray(), 1).max() < 0.5


ALL_ROWS = dict.fromkeys(SPLITS, 0)


def test_sample_splits(kit):
    available = data.write_data("t", "sample", ALL_ROWS, 42)
    assert {name: len(load_split("t", name)) for name in SPLITS} == available == dict(
        sft=132, pairs_train=132, pairs_test=44, prompts_train=132, prompts_test=44, evaluation=176, queries=132)
    assert len(held_out("t")) == 44
    parts = [{row.query for row in load_split("t", name)} for name in ("pairs_train", "pairs_test", "evaluation")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    table = pd.read_csv(kit / "outputs/t/data/splits.csv")
    assert table.split.tolist() == list(SPLITS) and table.rows.sum() == 792
    assert read_json(kit / "outputs/t/data/source.json") == {"source": "sample"}


def test_capped_splits(kit):
    available = data.write_data("t", "sample", ALL_ROWS | {"sft": 10, "evaluation": 500}, 42)
    assert (available["sft"], len(load_split("t", "sft"))) == (132, 10)
    assert len(load_split("t", "evaluation")) == 176 and len(load_split("t", "queries")) == 132
    rows = data.splits_of("sample")["sft"]
    assert load_split("t", "sft") == cap(rows, 10, 42) != rows[:10]


def test_held_out_drops_what_training_knows(kit):
    query = lambda name, *queries: [Prompt(id=str(i), query=text) for i, text in enumerate(queries)]
    row = SFTRow(id="a", query="生日", response="好。")
    write_splits("t", {"sft": [row], "prompts_train": query("p", "新年"),
                       "prompts_test": query("p", "新年", "生日", "乔迁", "乔迁 ")})
    assert [row.query for row in held_out("t")] == ["乔迁", "乔迁"]


def test_own_folder(kit, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(KitError, match="neither sample, released nor a folder"): data.splits_of(str(own))
    (own / "evaluation.jsonl").write_text(json.dumps(GOOD), encoding="utf-8")
    data.write_data("t", "sample", ALL_ROWS, 42)
    assert data.write_data("t", str(own), ALL_ROWS, 42) == {"evaluation": 1}
    assert read_json(kit / "outputs/t/data/source.json") == {
        "source": "own data", "read": ["evaluation.jsonl: 1 labelled rows, taken as evaluation."]}
    assert load_split("t", "evaluation")[0].response == GOOD["response"] and not has_split("t", "sft")
    with pytest.raises(KitError, match="run stage 01_data first"): load_split("t", "sft")
    with pytest.raises(KitError, match="the splits are sft"): load_split("t", "stf")


def test_a_stage_asks_only_for_splits_that_it_declares(kit, monkeypatch):
    write_splits("t", data.splits_of("sample"))
    here = str(kit.resolve())
    monkeypatch.setenv("CREAWRITE_READS", json.dumps(dict(
        stage="sft", own=f"{here}/outputs/t/sft/", guarded=[f"{here}/outputs/", f"{here}/data/"],
        reads=[f"{here}/outputs/t/data/sft.jsonl"])))
    assert has_split("t", "sft") and len(load_split("t", "sft")) == 132
    for ask in (has_split, load_split):
        with pytest.raises(KitError, match="evaluation.jsonl and does not declare it"): ask("t", "evaluation")


def test_cap_is_a_fixed_nested_subset():
    rows = [Query(id=str(i), query="祝福") for i in range(100)]
    small, large = cap(rows, 10, seed=1), cap(rows, 30, seed=1)
    assert len(small) == 10 and set(row.id for row in small) < set(row.id for row in large) and small != rows[:10]
    assert cap(rows, 0, seed=1) == rows and cap(rows, 200, seed=1) == rows and cap(rows, 10, seed=2) != small
    with pytest.raises(KitError, match="cap of -1"): cap(rows, -1, seed=1)


def test_published_figures_are_numbers_with_a_source():
    table = pd.read_csv(REPOSITORY / "data/published.csv")
    assert table.columns.tolist() == ["table", "row", "column", "value", "low", "high", "unit", "source"]
    assert (table[["value", "low", "high"]].notna().any(axis=1)).all() and table.source.notna().all()
    assert table[["value", "low", "high"]].dtypes.eq(float).all() and len(table) == 7


@pytest.mark.released
def test_released_files_are_the_manifests():
    folder, files = released(), data.manifest()["files"]
    assert all(file_digest(folder / name) == entry["sha256"] for name, entry in files.items()) and len(files) == 7


@pytest.mark.released
def test_released_splits(kit):
    splits = data.released_splits(released())
    assert {name: len(rows) for name, rows in splits.items()} == dict(
        sft=4000, pairs_train=6310, pairs_test=1586, prompts_train=3200, prompts_test=800, evaluation=2000,
        queries=10000)
    assert len({row.query for row in splits["queries"]}) == 8138
    assert sum(row.label for row in splits["evaluation"]) == 1004
    assert not any(row.query.startswith(TASK.prefix) for row in splits["prompts_train"])
    write_splits("t", {name: splits[name] for name in ("sft", "pairs_train", "prompts_train", "prompts_test")})
    assert len(held_out("t")) == 753


@pytest.mark.released
def test_sample_shares_nothing_with_the_released_data():
    splits, rows = data.released_splits(released()), data.read_sample(REPOSITORY / "data/sample/greetings.jsonl")
    queries = {row.query for part in splits.values() for row in part}
    texts = {text for part in splits.values() for row in part for text in responses(row)}
    assert not queries & {row.query for row in rows}
    assert not texts & {text for row in rows for text in (row.good, row.weak)}
