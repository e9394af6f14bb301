"What a model answered about our own texts, played back without it."
import asyncio
import json

import pytest

from creawrite.core import KitError, read_jsonl, root, run_dir, write_json
from creawrite.engines import engine_name
from creawrite.judge import Framework
from creawrite.ledger import exported_calls
from creawrite.llm import open_llm
from creawrite.questions import first_questions, read_greetings
from creawrite.recording import export_own, is_own, own_texts
from endpoint import Served


def sealed(): return read_jsonl(root() / "data/probe/sealed.jsonl")[:3]


def readings(run, engine):
    "What the questions make of three sound greetings of ours."
    asked = [pair["query"] for pair in sealed()], [pair["sound"] for pair in sealed()]
    return asyncio.run(read_greetings(open_llm(run, engine), first_questions()[:4], *asked)).tolist()


@pytest.fixture
def here(monkeypatch, tmp_path, no_endpoint):
    "The kit's own texts, and outputs elsewhere."
    from conftest import REPOSITORY
    for name in ("data", "nbs", "settings.ini"): (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "outputs").mkdir()
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    return tmp_path


def test_our_own_texts_go_out_and_come_back(here):
    first = readings("a", "offline")
    asyncio.run(Framework(open_llm("a", "offline")).verdicts(["给老师的祝福"], ["一句不在文件里的祝福"]))
    assert export_own("a", here / "own.jsonl.xz") == 12
    calls = list(exported_calls(here / "own.jsonl.xz"))
    assert all(is_own(call["request"]) for call in calls) and "不在文件里" not in json.dumps(calls, ensure_ascii=False)
    engine = "recorded:own.jsonl.xz"
    assert readings("b", engine) == first and engine_name(engine) == engine_name("offline")
    assert open_llm("b", engine).mode == "replay"
    with pytest.raises(KitError, match="the ledger holds no call"):
        asyncio.run(read_greetings(open_llm("b", engine), first_questions()[:1], ["别的请求"], ["别的祝福"]))


def test_of_a_run_on_our_sample_everything_is_ours(here):
    asyncio.run(Framework(open_llm("a", "offline")).verdicts(["给老师的祝福"], ["一句不在文件里的祝福"]))
    with pytest.raises(KitError, match="no call of run a concerns our own texts alone"):
        export_own("a", here / "own.jsonl.xz")
    assert not (here / "own.jsonl.xz").exists()
    for source, number in (("released", 0), ("sample", 4)):
        write_json(run_dir("a") / "run.json", {"stages": {"data": {"parameters": {"source": source}}}})
        if number: assert export_own("a", here / "own.jsonl.xz") == number


def test_what_cannot_be_played_is_told(here):
    with pytest.raises(KitError, match="there is no file nowhere.jsonl.xz"): open_llm("a", "recorded:nowhere.jsonl.xz")
    (here / "text.xz").write_text("no export")
    with pytest.raises(KitError, match="text.xz cannot be read"): open_llm("a", "recorded:text.xz")


def test_no_text_of_others_counts_as_ours(here):
    assert len(own_texts()) > 1000 and "祝您生日快乐" not in own_texts()


def test_of_two_engines_one_is_named(here, monkeypatch):
    readings("a", "offline")
    with Served("coin") as served:
        for name, value in dict(OPENAI_BASE_URL=served.url, OPENAI_API_KEY="k", CREAWRITE_MODEL="other").items():
            monkeypatch.setenv(name, value)
        pair = sealed()[0]
        asyncio.run(Framework(open_llm("a", "endpoint")).verdicts([pair["query"]], [pair["sound"]]))
        replayed = open_llm("a", "endpoint", "replay").label
    assert replayed.startswith("other @") and open_llm("a", "offline", "replay").label == engine_name("offline")
    with pytest.raises(KitError, match="replay needs a ledger of one engine"): open_llm("a", "auto", "replay")
    export_own("a", here / "both.jsonl.xz")
    with pytest.raises(KitError, match="holds the answers of 2 engines"): open_llm("b", "recorded:both.jsonl.xz")
    assert export_own("a", here / "one.jsonl.xz", "other @") > 0
    assert open_llm("b", "recorded:one.jsonl.xz").label == replayed
    with pytest.raises(KitError, match="an engine with 'nobody' in its name"):
        export_own("a", here / "none.jsonl.xz", "nobody")
