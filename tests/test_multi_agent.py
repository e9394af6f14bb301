"Path A beyond the single chain: retrieval, streaming and resume, votes, pairs, ablations."
import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from conftest import REPOSITORY
from endpoint import Served
from creawrite import multi_agent, offline, policies, retrieval
from creawrite.core import KitError, outputs_dir
from creawrite.data import read_sample, sample_splits
from creawrite.engines import OFFLINE, embedded_client
from creawrite.judge import AGENTS, VARIANTS, DebateRecord, Framework
from creawrite.ledger import Ledger
from creawrite.llm import LLM, open_llm
from creawrite.multi_agent import (
    POLLED, Group, ablation_verdicts, judge_candidates, pair_of, read_groups, table_ablations, whole_lines,
    write_candidates, write_groups)
from creawrite.retrieval import Retriever
from creawrite.settings import defaults
from creawrite.splits import SFTRow
from creawrite.task import TASK

SAMPLE = sample_splits(read_sample())
QUERY = "给爱钓鱼的爸爸的生日祝福语"
DEFAULTS = defaults("multi_agent")


def engine(folder): return LLM(Ledger(folder / "ledger.sqlite"), OFFLINE, embedded_client(), "offline-rulebook")


@pytest.fixture
def llm(tmp_path): return engine(tmp_path)


@pytest.fixture
def bare_kit(tmp_path, monkeypatch):
    "A kit without stages, for whatever writes under outputs/."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[smoke]\n")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))


@pytest.fixture
def serve(monkeypatch):
    "Serve an application on loopback and name it as the endpoint."
    servers = []

    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started: time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        names = {"OPENAI_BASE_URL": address, "OPENAI_API_KEY": "any", "CREAWRITE_MODEL": "local"}
        for name, value in names.items(): monkeypatch.setenv(name, value)
        return address

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def rows(*texts):
    "A corpus of (query, response, clicks)."
    return [SFTRow(id=str(i), query=query, response=response, clicks=clicks)
            for i, (query, response, clicks) in enumerate(texts)]


def retriever(corpus, guarded=frozenset(), **settings):
    "A Retriever with the stage's own defaults."
    stage = {name: DEFAULTS[name] for name in ("k_search", "k_final", "encoder")}
    return Retriever(corpus, guarded, **stage | settings)


@pytest.mark.parametrize("query, response", [
    ("中秋给老师的祝福语", "别的话"),
    ("中秋给老师的祝福语！", "别的话"),
    ("别的请求", "愿月色照亮您归家的路，愿灯火年年都暖。"),
    ("别的请求", "愿月色照亮您归家的路！愿灯火年年都暖")])
def test_the_guard_stops_what_is_or_nearly_is_in_the_evaluation_set(query, response):
    guarded = {"中秋给老师的祝福语", "愿月色照亮您归家的路，愿灯火年年都暖。"}
    corpus = rows((query, response, None), ("中秋给同学的祝福", "愿你的窗前有一轮好月亮。", None))
    retrieve = retriever(corpus, guarded)
    assert retrieve.blocked == 1
    assert [row.response for row in retrieve("中秋祝福")] == ["愿你的窗前有一轮好月亮。"]


def test_the_own_query_never_comes_back_however_often_it_stands_in_the_corpus():
    own = [(QUERY, f"自己的第{i}条", 99) for i in range(30)]
    corpus = rows(*own, ("给爸爸的生日祝福", "愿鱼竿常有好消息。", None))
    assert [row.response for row in retriever(corpus, k_search=5)(QUERY)] == ["愿鱼竿常有好消息。"]


def test_only_the_nearest_rows_compete_by_clicks():
    corpus = rows(("爸爸生日祝福", "甲", 1), ("爸爸的生日祝福", "乙", 5), ("考研加油", "丙", 1000))
    assert [row.response for row in retriever(corpus, k_search=2, k_final=2)("给爸爸的生日祝福")] == ["乙", "甲"]


@pytest.mark.parametrize("retrieve", [
    retriever([]),
    retriever(rows(("中秋祝福", "愿月圆。", None))),
    retriever(rows((QUERY, "愿月圆。", None)), k_final=0)])
def test_nothing_found_still_gives_candidates(llm, retrieve):
    examples = retrieve("qwxyz")
    assert examples == [] and all(asyncio.run(write_candidates(llm, QUERY, examples, 2)))


def test_many_queries_at_once_find_what_each_finds_alone():
    retrieve, queries = retriever(SAMPLE["sft"]), [row.query for row in SAMPLE["evaluation"]][:60]
    assert retrieve.search(queries, batch=7) == [retrieve(query) for query in queries]


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_search_is_exact(monkeypatch, faiss):
    if not faiss: monkeypatch.setattr(retrieval.importlib.util, "find_spec", lambda name: None)
    corpus, queries = (np.random.default_rng(i).normal(size=(n, 8)).astype(np.float32) for i, n in enumerate((200, 5)))
    scores, best = retrieval.inner_product_search(corpus)(queries, 10)
    assert (best == np.argsort(-(queries @ corpus.T), axis=1)[:, :10]).all()
    assert np.allclose(scores, np.take_along_axis(queries @ corpus.T, best, 1), atol=1e-5)


def embedder(asked):
    "An embeddings endpoint that counts characters, and remembers what it was asked."
    async def embeddings(request):
        body = await request.json()
        if body["model"] != "letters": return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        asked.extend(body["input"])
        data = []
        for i, text in enumerate(body["input"]):
            vector = [float(text.count(letter)) + 0.01 for letter in "爸生日月中秋"]
            data.append({"object": "embedding", "index": i, "embedding": vector})
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return JSONResponse({"object": "list", "model": "letters", "data": data[::-1], "usage": usage})
    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])


def test_vectors_of_an_endpoint_are_asked_for_once_per_content(serve, tmp_path):
    asked = []
    serve(embedder(asked))
    corpus = rows(("爸爸生日", "愿您常乐。", None), ("中秋", "愿月圆。", None))
    by_letters = partial(retriever, encoder="endpoint:letters", cache=tmp_path, k_final=1)
    nearest = [by_letters(corpus)("中秋月") for _ in range(2)]
    assert [row.query for row, in nearest] == ["中秋", "中秋"] and len(asked) == 3, "two rows and a query, once"
    changed = [corpus[0], corpus[1].model_copy(update={"response": "愿月长圆。"})]
    by_letters(changed)
    assert len(asked) == 5, "another text, another vector"
    with pytest.raises(KitError, match="no embeddings"): retriever(corpus, encoder="endpoint:numbers")


def tiny_policy(folder, seed=1):
    "A policy of a few thousand random weights."
    dialogues = [policies.policy_messages(row.query) + policies.policy_answer(row.response) for row in SAMPLE["sft"]]
    tokenizer = policies.train_tokenizer(dialogues, 400)
    policies.save_model(folder, policies.new_model(tokenizer, 16, 1, 2, 32, seed), tokenizer, name="base")
    return folder


def test_a_local_encoder_is_known_by_its_weights(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    for seed in (1, 2):
        body = Transformer(str(tiny_policy(tmp_path / f"policy{seed}", seed)))
        modules = [body, Pooling(body.get_embedding_dimension())]
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / f"encoder{seed}"))
    encoder, texts = f"local:{tmp_path / 'encoder1'}", ["生日快乐", "中秋"]
    matrix = retrieval.vectors(encoder, texts, tmp_path)
    assert matrix.shape == (2, 16) and np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    before = retrieval.encoder_identity(encoder)
    (tmp_path / "encoder1").rename(tmp_path / "old")
    (tmp_path / "encoder2").rename(tmp_path / "encoder1")
    assert retrieval.encoder_identity(encoder) != before
    assert not np.allclose(retrieval.vectors(encoder, texts, tmp_path), matrix)
    with pytest.raises(KitError, match="cannot be loaded"): retrieval.encode("local:/nowhere/at/all", ["生日"])


def test_a_local_policy_writes_the_same_from_any_point_on(bare_kit):
    tiny_policy(outputs_dir() / "other" / "sft" / "base")
    queries, examples = [row.query for row in SAMPLE["queries"][:7]], [SAMPLE["sft"][:1], *[[]] * 6]
    write = partial(multi_agent.policy_texts, queries=queries, examples=examples, n_candidates=2, seed=3,
                    max_new_tokens=8, batch=3)
    texts = lambda first: list(write("other/sft/base", first=first))
    whole = texts(0)
    assert len(whole) == 7 and all(len(some) == 2 for some in whole)
    assert len({text for some in whole for text in some}) > 7
    assert texts(4) == whole[4:] and texts(7) == []
    with pytest.raises(KitError): next(write("other/sft/sft"))


def served_policy():
    "A server that says back what it was asked."
    async def complete(request):
        body = await request.json()
        choices = []
        for i in range(body["n"]):
            text = f"{body['messages'][-1]['content']} {body['model']} {i}"
            choices.append({"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}})
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}
        return JSONResponse(reply)

    async def models(request):
        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "us"}
        return JSONResponse({"object": "list", "data": [model]})

    completions = Route("/v1/chat/completions", complete, methods=["POST"])
    return Starlette(routes=[completions, Route("/v1/models", models)])


def test_a_served_policy_writes_plain_text(serve):
    address = serve(served_policy())

    async def texts(address, examples):
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            return await multi_agent.served_texts(client, QUERY, examples, 3, seed=42, max_new_tokens=80)
    assert asyncio.run(texts(address, [])) == [f"{TASK.prefix}{QUERY} policy {i}" for i in range(3)]
    shown = asyncio.run(texts(address, SAMPLE["sft"][:2]))[0]
    assert all(row.response in shown for row in SAMPLE["sft"][:2]) and f"{QUERY} policy 0" in shown
    with pytest.raises(KitError, match="serves no policy"): asyncio.run(texts(address.replace("/v1", "/v2"), []))


def label(llm, **changes):
    "label_candidates of two queries with the stage's own defaults."
    names = ("candidates_from", "n_candidates", "max_new_tokens", "n_votes", "seed")
    settings = {name: DEFAULTS[name] for name in names} | changes
    path = asyncio.run(multi_agent.label_candidates("labelled", llm, [QUERY, "中秋祝福"], [[], []], **settings))
    return list(read_groups(path))


@pytest.mark.parametrize("source", ["llm", "server", "policy"])
def test_every_writer_is_labelled(source, serve, llm, bare_kit):
    "All three kinds of candidates_from go the whole way, and the same call again asks nothing."
    address = serve(served_policy())
    tiny_policy(outputs_dir() / "other" / "sft" / "base")
    candidates_from = {"llm": "llm", "server": address, "policy": "other/sft/base"}[source]
    groups = label(llm, candidates_from=candidates_from, n_candidates=2, max_new_tokens=8)
    assert [group.query for group in groups] == [QUERY, "中秋祝福"]
    assert all(record.final in (0, 1) for group in groups for record in group.records) and groups[0].records
    calls = llm.ledger.costs().calls.sum()
    assert label(llm, candidates_from=candidates_from, n_candidates=2, max_new_tokens=8) == groups
    assert llm.ledger.costs().calls.sum() == calls


def test_the_resume_key_follows_whatever_decides_a_line(llm, bare_kit):
    key = partial(multi_agent.records_key, llm, [QUERY], [[]], "llm", n_votes=1)
    twin = engine(outputs_dir() / "twin")
    twin.label = "another engine"
    others = [multi_agent.records_key(twin, [QUERY], [[]], "llm", n_votes=1),
              multi_agent.records_key(llm, ["中秋祝福"], [[]], "llm", n_votes=1),
              multi_agent.records_key(llm, [QUERY], [SAMPLE["sft"][:1]], "llm", n_votes=1),
              multi_agent.records_key(llm, [QUERY], [[]], "http://localhost/v1", n_votes=1),
              key(n_votes=3)]
    for seed in (1, 2):  # other weights under the same name
        tiny_policy(outputs_dir() / "other" / "sft" / "base", seed)
        others.append(multi_agent.records_key(llm, [QUERY], [[]], "other/sft/base", n_votes=1))
    assert len({key(), *others}) == 1 + len(others) and key() == key()
    with pytest.raises(KitError): multi_agent.records_key(llm, [QUERY], [[]], "other/sft/nothing", n_votes=1)


@pytest.mark.parametrize("name, old, new, stale", [
    ("task", "你替人写祝福语。", "请替人写祝福语。", True),  # a prompt
    ("task", "你复核一份终审结论。", "请复核一份终审结论。", True),
    ("task", "你评判一条祝福语是好是坏。", "请评判一条祝福语是好是坏。", False),  # Path B's
    ("answers", "1 合格，0 不合格", "1 好，0 不好", True),  # an answer's schema
    ("answers", "祝福语正文", "祝福语全文", True),
    ("judge", "the first verdict stands", "the first one stands", True),  # code
    ("retrieval", "needs sentence-transformers", "wants sentence-transformers", False)])
def test_an_edit_starts_the_records_anew(kit, name, old, new, stale):
    "The key covers prompts, answer schemas and code of the agents, and nothing that no agent is told."
    judges = SimpleNamespace(label="an engine", model="m")
    key = lambda: multi_agent.records_key(judges, [QUERY], [[]], "llm", n_votes=1)
    before, path = key(), kit / "creawrite" / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert (key() != before) == stale


def test_the_stream_is_lazy_bounded_and_in_order():
    drawn, under_way, most = [], 0, 0

    def items():
        for i in range(50):
            drawn.append(i)
            yield i

    async def work(i):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (i % 3))
        under_way -= 1
        return i

    async def collect():
        got = []
        async for i in multi_agent.in_order(work, items(), at_once=5):
            got.append(i)
            assert len(drawn) <= i + 5 + 1
        return got

    assert asyncio.run(collect()) == list(range(50)) and 1 < most <= 5


def test_an_error_ends_the_stream_and_keeps_what_is_written(tmp_path):
    async def work(query):
        if query == "戊": raise KitError("the endpoint is gone")
        return Group(query=query, records=[])

    queries, path = list("甲乙丙丁戊己"), tmp_path / "records.jsonl"
    start = lambda: asyncio.run(write_groups(path, "k", work, lambda first: queries[first:], at_once=2))
    with pytest.raises(KitError, match="gone"): start()
    assert not path.exists() and whole_lines(tmp_path / ".records-k.jsonl") == 4
    queries[4] = "五"
    start()
    assert [group.query for group in read_groups(path)] == list("甲乙丙丁五己")


def test_another_key_begins_anew_and_clears_up(tmp_path):
    async def work(query): return Group(query=query, records=[])
    (tmp_path / ".records-old.jsonl").write_text(Group(query="旧", records=[]).model_dump_json() + "\n")
    asyncio.run(write_groups(tmp_path / "records.jsonl", "new", work, lambda first: ["新"][first:]))
    assert [group.query for group in read_groups(tmp_path / "records.jsonl")] == ["新"]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


CHILD = """
import asyncio, sys
from pathlib import Path
from creawrite.llm import open_llm
from creawrite.multi_agent import judge_candidates, write_candidates, write_groups
llm, queries = open_llm("killed", "endpoint"), sys.argv[2:]
async def work(query): return await judge_candidates(llm, query, await write_candidates(llm, query, [], 3), 1)
asyncio.run(write_groups(Path(sys.argv[1]), "k", work, lambda first: queries[first:], at_once=3))
"""


def test_killed_it_goes_on_without_asking_again(serve, tmp_path, monkeypatch, bare_kit):
    asked = Counter()

    async def counted(scope, receive, send):
        message = await receive()
        asked[message["body"]] += 1
        await asyncio.sleep(0.01)
        async def again(): return message
        await offline.app(scope, again, send)

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    serve(Starlette(routes=[Mount("/", app=counted)]))
    path, queries = tmp_path / "records.jsonl", [row.query for row in SAMPLE["queries"][:10]]
    child = [sys.executable, "-c", CHILD, str(path), *queries]
    first = subprocess.Popen(child, cwd=tmp_path)
    part = tmp_path / ".records-k.jsonl"  # only looked at: `whole_lines` would cut a line off that is being written
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 4) and first.poll() is None: time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before, lines = sum(asked.values()), part.read_bytes()
    assert not path.exists() and before
    subprocess.run(child, cwd=tmp_path, check=True)
    assert path.read_bytes().startswith(lines[:lines.rindex(b"\n") + 1]), "what was written stays"
    assert sum(asked.values()) - len(asked) <= 32, "at most what was on its way when it was killed"

    async def whole(llm):
        return [await judge_candidates(llm, query, await write_candidates(llm, query, [], 3), 1) for query in queries]
    assert list(read_groups(path)) == asyncio.run(whole(engine(tmp_path))), "as if nothing had happened"


def test_every_switch_changes_verdicts_and_asks_only_its_own_questions(llm):
    rows = SAMPLE["evaluation"][:60]
    queries, responses = [row.query for row in rows], [row.response for row in rows]
    asked = lambda: Counter(llm.ledger.costs().set_index("role").calls.to_dict())
    full = asyncio.run(Framework(llm).verdicts(queries, responses))
    anew = {"positive": {"judge", "reflect"}, "negative": {"judge", "reflect"}, "judge": {"reflect"}, "reflect": set()}
    for left_out in AGENTS:
        before, variant = asked(), Framework(llm, VARIANTS[f"multi_agent without {left_out}"])
        assert asyncio.run(variant.verdicts(queries, responses)) is not None
        assert set(asked() - before) == anew[left_out]
    before = asked()
    verdicts = asyncio.run(ablation_verdicts(llm, queries, responses))
    assert list(verdicts) == [*VARIANTS, POLLED] and verdicts["multi_agent"] == full
    assert set(asked() - before) == {"judge"}, "the judge alone, four times; all else is in the ledger"
    rows = SAMPLE["evaluation"]
    verdicts = asyncio.run(ablation_verdicts(llm, [row.query for row in rows], [row.response for row in rows]))
    assert all(verdicts[name] != verdicts["multi_agent"] for name in [*list(VARIANTS)[1:], POLLED])


@pytest.mark.parametrize("reason, final", [("另见广告", 0), ("", 1), ("  ", 1)])
def test_an_overturned_verdict_needs_a_reason(llm, reason, final):
    async def answer(role, messages, schema, **_):
        if role in ("positive", "negative"): return schema(points=[])
        return schema(judge=1, reason="好") if role == "judge" else schema(judge=0, reason=reason)
    llm.ask = answer
    record = asyncio.run(Framework(llm).record(QUERY, "愿您常乐。"))
    assert (record.judge, record.final) == (1, final)


def test_reflect_sees_the_whole_record(llm):
    seen = {}

    async def answer(role, messages, schema, **_):
        seen[role] = messages[-1]["content"]
        if role in ("positive", "negative"): return schema(points=[{"point": f"{role}论点", "reason": "原文"}])
        return schema(judge=1, reason="初判理由")
    llm.ask = answer
    asyncio.run(Framework(llm).record(QUERY, "愿您常乐。"))
    assert all(word in seen["reflect"] for word in (QUERY, "愿您常乐。", "positive论点", "negative论点", "初判理由"))
    assert "初判理由" not in seen["judge"]


def debates(query=QUERY, **finals):
    "Records of one query: greeting -> the verdicts of its chains."
    records = []
    for text, verdicts in finals.items():
        for sample, final in enumerate(verdicts):
            records.append(DebateRecord(query=query, response=text, sample=sample, judge=final, final=final))
    return records


def pair(records, id="p", seed=0, close=DEFAULTS["close"]): return pair_of(records, id, random.Random(seed), close)


def test_votes_choose_the_pair_that_is_furthest_apart():
    records = debates(甲=[1, 1, 1], 乙=[1, 1, 0], 丙=[0, 0, 1], 丁=[0, 0, 0], 戊=[None, None, None])
    assert (pair(records).chosen, pair(records).rejected) == ("甲", "丁") and "戊" not in multi_agent.votes(records)


@pytest.mark.parametrize("finals", [
    dict(甲=[1, 0], 乙=[0]), dict(甲=[1], 乙=[0, 1]), dict(甲=[1, 0], 乙=[1, 0])])
def test_a_tie_is_neither_good_nor_bad(finals): assert pair(debates(**finals)) is None


def test_equals_are_drawn_by_seed():
    records = debates(甲=[1], 乙=[1], 丙=[0], 丁=[0])
    drawn = [pair(records, seed=seed) for seed in range(40)]
    assert {(one.chosen, one.rejected) for one in drawn} == {("甲", "丙"), ("甲", "丁"), ("乙", "丙"), ("乙", "丁")}


def test_close_pairs_prefer_length_to_votes():
    records = debates(愿您常乐=[1, 1, 0], 愿您一年四季都有好心情=[1, 1, 1], 祝好=[0, 0, 0])
    assert pair(records).chosen == "愿您一年四季都有好心情"
    assert pair(records, close=2).chosen == "愿您常乐"
    assert pair(records, close=1) is None


def test_queries_without_a_pair_are_counted():
    finals = {"全好": [1, 1], "全坏": [0, 0], "有别": [1, 0], "平": [[1, 0]], "无": [None, None], "空": []}
    groups = []
    for query, outcomes in finals.items():
        chains = {f"{query}{i}": final if isinstance(final, list) else [final] for i, final in enumerate(outcomes)}
        groups.append(Group(query=query, records=debates(query, **chains), missing=query == "空"))
    pairs = [one for group in groups if group.records and (one := pair(group.records, group.query))]
    table = multi_agent.table_report(multi_agent.record_facts(groups), pairs, len(groups), missing=1)
    table = table.set_index("quantity")
    count = lambda start: round((table.value * table.n)[next(name for name in table.index if name.startswith(start))])
    assert [one.query for one in pairs] == ["有别"]
    outcomes = ("that gave", "whose candidates are all good", "whose candidates are all bad", "without a verdict")
    assert [count(f"queries {outcome}") for outcome in outcomes] == [1, 1, 1, 2]
    assert count("candidates tied") == 1
    assert (count("verdicts missing"), count("candidates missing")) == (2, 1)
    assert table.loc["verdict entropy within a query (bits)", "value"] == pytest.approx((0 + 0 + 1 + 1) / 4)


def test_near_repetitions_are_left_out_and_every_pair_keeps_its_records():
    line = "愿您的鱼竿总有好消息，湖面的风和一桌热饭都等您回家"
    groups = []
    for i, text in enumerate((line, line + "呀", line)):
        groups.append(Group(query=str(i), records=debates(str(i), **{text: [1], f"祝{i % 2}好": [0]})))
    pairs = [pair(group.records, f"p{i}") for i, group in enumerate(groups)]
    distinct = multi_agent.without_repeats(pairs)
    assert distinct[0] == pairs[0] and len(distinct) < 3
    reasons = list(multi_agent.pair_records(groups, distinct))
    summary = [(why["id"], why["chosen"][0]["response"], why["rejected"][0]["final"]) for why in reasons]
    assert summary == [(one.id, one.chosen, 0) for one in distinct]


def test_paired_comparison_counts_by_hand():
    labels, first, other = [1] * 12, [1] * 11 + [None], [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1]
    verdicts, queries = {"multi_agent": first, "other": other, "same": first}, [str(i) for i in range(12)]
    table = table_ablations(verdicts, labels, queries, {"all": list(range(12)), "none": []})
    row = table[(table.evaluator == "other") & (table.slice == "all")].iloc[0]
    assert (row.n, row.missing) == (11, 1)
    assert row.difference == pytest.approx(-7 / 11) and row.p == pytest.approx(2 * 0.5**7)
    assert row.difference_low < row.difference < row.difference_high < 0
    same = table[(table.evaluator == "same") & (table.slice == "all")].iloc[0]
    assert (same.p, same.value) == (1, 1) and same.low < 1, "11 of 11 is no certainty"
    assert table[table.slice == "none"].value.isna().all()


def test_the_last_word_comes_with_its_probability(tmp_path, monkeypatch):
    "An endpoint that says how sure it was of 1: the probability is in the record, in the ledger, and is the grade."
    with Served("coin") as served:
        for name, value in (("OPENAI_BASE_URL", served.url), ("OPENAI_API_KEY", "k"), ("CREAWRITE_MODEL", "coin")):
            monkeypatch.setenv(name, value)
        for name in ("nbs", "settings.ini", "data"): (tmp_path / name).symlink_to(REPOSITORY / name)
        monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
        framework = Framework(open_llm("t", "endpoint"))
        records = asyncio.run(framework.records([QUERY] * 4, list("甲乙丙丁")))
        grades = asyncio.run(framework.grades([QUERY] * 4, list("甲乙丙丁")))
    assert [record.good for record in records] == grades and {record.final for record in records} == {0, 1}
    assert all(record.good == pytest.approx(0.75 if record.final else 0.25) for record in records)
    replayed = Framework(open_llm("t", mode="replay"))
    assert asyncio.run(replayed.grades([QUERY] * 4, list("甲乙丙丁"))) == grades
