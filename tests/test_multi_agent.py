"Path A beyond the single chain: retrieval, streaming and resume, votes, pairs, ablations."
import asyncio, json, os, random, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from conftest import REPOSITORY
from creawrite import multi_agent, offline, sft
from creawrite.data import PREFIX, SFTRow, read_sample, sample_splits
from creawrite.llm import OFFLINE, LLM, Ledger, embedded
from creawrite.multi_agent import AGENTS, VARIANTS, Framework, Group, Record, Retriever
from creawrite.runs import KitError, run_dir

SAMPLE = sample_splits(read_sample())
QUERY = "给爱钓鱼的爸爸的生日祝福语"


def engine(folder): return LLM(Ledger(folder / "ledger.sqlite"), OFFLINE, embedded(), "offline-rulebook")


@pytest.fixture
def llm(tmp_path): return engine(tmp_path)


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
        for name, value in {"OPENAI_BASE_URL": address, "OPENAI_API_KEY": "any", "CREAWRITE_MODEL": "local"}.items(): monkeypatch.setenv(name, value)
        return address

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def rows(*texts): return [SFTRow(id=str(i), query=query, response=response, clicks=clicks) for i, (query, response, clicks) in enumerate(texts)]


@pytest.mark.parametrize("query, response", [
    ("中秋给老师的祝福语", "别的话"), ("中秋给老师的祝福语！", "别的话"), ("别的请求", "愿月色照亮您归家的路，愿灯火年年都暖。"), ("别的请求", "愿月色照亮您归家的路！愿灯火年年都暖")])
def test_the_guard_stops_what_is_or_nearly_is_in_the_evaluation_set(query, response):
    guarded = {"中秋给老师的祝福语", "愿月色照亮您归家的路，愿灯火年年都暖。"}
    retrieve = Retriever(rows((query, response, None), ("中秋给同学的祝福", "愿你的窗前有一轮好月亮。", None)), guarded)
    assert retrieve.blocked == 1 and [row.response for row in retrieve("中秋祝福")] == ["愿你的窗前有一轮好月亮。"]


def test_the_own_query_never_comes_back_however_often_it_stands_in_the_corpus():
    corpus = rows(*[(QUERY, f"自己的第{i}条", 99) for i in range(30)], ("给爸爸的生日祝福", "愿鱼竿常有好消息。", None))
    assert [row.response for row in Retriever(corpus, k_search=5)(QUERY)] == ["愿鱼竿常有好消息。"]


def test_only_the_nearest_rows_compete_by_clicks():
    corpus = rows(("爸爸生日祝福", "甲", 1), ("爸爸的生日祝福", "乙", 5), ("考研加油", "丙", 1000))
    assert [row.response for row in Retriever(corpus, k_search=2, k_final=2)("给爸爸的生日祝福")] == ["乙", "甲"]


@pytest.mark.parametrize("retrieve", [Retriever([]), Retriever(rows(("中秋祝福", "愿月圆。", None))), Retriever(rows((QUERY, "愿月圆。", None)), k_final=0)])
def test_nothing_found_still_gives_candidates(llm, retrieve):
    found = retrieve("qwxyz")
    assert found == [] and all(asyncio.run(multi_agent.write(llm, QUERY, found, 2)))


def test_many_queries_at_once_find_what_each_finds_alone():
    retrieve, queries = Retriever(SAMPLE["sft"]), [row.query for row in SAMPLE["evaluation"]][:60]
    assert retrieve.search(queries, batch=7) == [retrieve(query) for query in queries]


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_search_is_exact(monkeypatch, faiss):
    if not faiss: monkeypatch.setattr(multi_agent.importlib.util, "find_spec", lambda name: None)
    corpus, wanted = (np.random.default_rng(i).normal(size=(n, 8)).astype(np.float32) for i, n in enumerate((200, 5)))
    scores, best = multi_agent.nearest(corpus)(wanted, 10)
    assert (best == np.argsort(-(wanted @ corpus.T), axis=1)[:, :10]).all() and np.allclose(scores, np.take_along_axis(wanted @ corpus.T, best, 1), atol=1e-5)


def embedder(asked):
    "An embeddings endpoint that counts characters, and remembers what it was asked."
    async def embeddings(request):
        body = await request.json()
        if body["model"] != "letters": return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        asked.extend(body["input"])
        data = [{"object": "embedding", "index": i, "embedding": [float(text.count(c)) + 0.01 for c in "爸生日月中秋"]} for i, text in enumerate(body["input"])]
        return JSONResponse({"object": "list", "model": "letters", "data": data[::-1], "usage": {"prompt_tokens": 0, "total_tokens": 0}})
    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])


def test_vectors_of_an_endpoint_are_asked_for_once_per_content(serve, tmp_path):
    asked = []
    serve(embedder(asked))
    corpus = rows(("爸爸生日", "愿您常乐。", None), ("中秋", "愿月圆。", None))
    found = [Retriever(corpus, encoder="endpoint:letters", cache=tmp_path, k_final=1)("中秋月") for _ in range(2)]
    assert [row.query for row, in found] == ["中秋", "中秋"] and len(asked) == 3, "two rows and a query, once"
    changed = [corpus[0], corpus[1].model_copy(update={"response": "愿月长圆。"})]
    Retriever(changed, encoder="endpoint:letters", cache=tmp_path)
    assert len(asked) == 5, "another text, another vector"
    with pytest.raises(KitError, match="no embeddings"): Retriever(corpus, encoder="endpoint:numbers")


def tiny_policy(folder, seed=1):
    "A policy of a few thousand random weights."
    dialogues = [sft.messages(row.query) + sft.answer(row.response) for row in SAMPLE["sft"]]
    tokenizer = sft.train_tokenizer(dialogues, 400)
    sft.save_model(folder, sft.new_model(tokenizer, 16, 1, 2, 32, seed), tokenizer, name="base")
    return folder


def test_a_local_encoder_is_known_by_its_weights(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    for seed in (1, 2):
        body = Transformer(str(tiny_policy(tmp_path / f"policy{seed}", seed)))
        SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu").save(str(tmp_path / f"encoder{seed}"))
    encoder = f"local:{tmp_path / 'encoder1'}"
    made = multi_agent.vectors(encoder, ["生日快乐", "中秋"], tmp_path)
    assert made.shape == (2, 16) and np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    before = multi_agent.identity(encoder)
    (tmp_path / "encoder1").rename(tmp_path / "old")
    (tmp_path / "encoder2").rename(tmp_path / "encoder1")
    assert multi_agent.identity(encoder) != before and not np.allclose(multi_agent.vectors(encoder, ["生日快乐", "中秋"], tmp_path), made)
    with pytest.raises(KitError, match="cannot be loaded"): multi_agent.encode("local:/nowhere/at/all", ["生日"])


def test_a_local_policy_writes_the_same_from_any_point_on(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[smoke]\n")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    tiny_policy(run_dir("other") / "sft" / "base")
    queries, examples = [row.query for row in SAMPLE["queries"][:7]], [SAMPLE["sft"][:1], *[[]] * 6]
    texts = lambda first: list(multi_agent.policy_texts("other/base", queries, examples, 2, seed=3, first=first, batch=3, max_new_tokens=8))
    whole = texts(0)
    assert len(whole) == 7 and all(len(some) == 2 for some in whole) and len({text for some in whole for text in some}) > 7
    assert texts(4) == whole[4:] and texts(7) == []
    with pytest.raises(KitError): next(multi_agent.policy_texts("other/sft", queries, examples))


def test_a_served_policy_writes_plain_text(serve):
    async def complete(request):
        body = await request.json()
        asked = body["messages"][-1]["content"]
        choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{asked} {body['model']} {i}"}} for i in range(body["n"])]
        return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices})
    async def models(request): return JSONResponse({"object": "list", "data": [{"id": "policy", "object": "model", "created": 0, "owned_by": "us"}]})
    address = serve(Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]))

    async def texts(address, examples):
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client: return await multi_agent.served_texts(client, QUERY, examples, 3)
    assert asyncio.run(texts(address, [])) == [f"{PREFIX}{QUERY} policy {i}" for i in range(3)]
    shown = asyncio.run(texts(address, SAMPLE["sft"][:2]))[0]
    assert all(row.response in shown for row in SAMPLE["sft"][:2]) and f"{QUERY} policy 0" in shown
    with pytest.raises(KitError, match="serves no policy"): asyncio.run(texts(address.replace("/v1", "/v2"), []))


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
    queries = list("甲乙丙丁戊己")
    start = lambda: asyncio.run(multi_agent.progress(tmp_path / "records.jsonl", "k", work, lambda first: queries[first:], at_once=2))
    with pytest.raises(KitError, match="gone"): start()
    assert not (tmp_path / "records.jsonl").exists() and multi_agent.whole_lines(tmp_path / ".records-k.jsonl") == 4
    queries[4] = "五"
    start()
    assert [group.query for group in multi_agent.groups(tmp_path / "records.jsonl")] == list("甲乙丙丁五己")


def test_another_key_begins_anew_and_clears_up(tmp_path):
    async def work(query): return Group(query=query, records=[])
    (tmp_path / ".records-old.jsonl").write_text(Group(query="旧", records=[]).model_dump_json() + "\n")
    asyncio.run(multi_agent.progress(tmp_path / "records.jsonl", "new", work, lambda first: ["新"][first:]))
    assert [group.query for group in multi_agent.groups(tmp_path / "records.jsonl")] == ["新"]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


CHILD = """
import asyncio, sys
from pathlib import Path
from creawrite.llm import open_llm
from creawrite.multi_agent import label, progress, write
llm, queries = open_llm("killed", "endpoint"), sys.argv[2:]
async def work(query): return await label(llm, query, await write(llm, query, [], 3))
asyncio.run(progress(Path(sys.argv[1]), "k", work, lambda first: queries[first:], at_once=3))
"""


def test_killed_it_goes_on_without_asking_again(serve, tmp_path, monkeypatch):
    asked = Counter()

    async def counted(scope, receive, send):
        message = await receive()
        asked[message["body"]] += 1
        await asyncio.sleep(0.01)
        async def again(): return message
        await offline.app(scope, again, send)

    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[smoke]\n")
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    serve(Starlette(routes=[Mount("/", app=counted)]))
    path, queries = tmp_path / "records.jsonl", [row.query for row in SAMPLE["queries"][:10]]
    child = [sys.executable, "-c", CHILD, str(path), *queries]
    first = subprocess.Popen(child, cwd=tmp_path)
    while multi_agent.whole_lines(tmp_path / ".records-k.jsonl") < 4 and first.poll() is None: time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before, lines = sum(asked.values()), (tmp_path / ".records-k.jsonl").read_bytes()
    assert not path.exists() and before
    subprocess.run(child, cwd=tmp_path, check=True)
    assert path.read_bytes().startswith(lines[:lines.rindex(b"\n") + 1]), "what was written stays"
    assert sum(asked.values()) - len(asked) <= 32, "at most what was on its way when it was killed"

    async def whole(llm): return [await multi_agent.label(llm, query, await multi_agent.write(llm, query, [], 3)) for query in queries]
    assert list(multi_agent.groups(path)) == asyncio.run(whole(engine(tmp_path))), "as if nothing had happened"


def test_every_switch_changes_verdicts_and_asks_only_its_own_questions(llm):
    rows = SAMPLE["evaluation"][:60]
    queries, responses = [row.query for row in rows], [row.response for row in rows]
    asked = lambda: Counter(llm.ledger.costs().set_index("role").calls.to_dict())
    full = asyncio.run(Framework(llm).verdicts(queries, responses))
    anew = {"positive": {"judge", "reflect"}, "negative": {"judge", "reflect"}, "judge": {"reflect"}, "reflect": set()}
    for left_out in AGENTS:
        before = asked()
        assert asyncio.run(Framework(llm, VARIANTS[f"multi_agent without {left_out}"]).verdicts(queries, responses)) is not None
        assert set(asked() - before) == anew[left_out]
    before = asked()
    said = asyncio.run(multi_agent.ablations(llm, queries, responses))
    assert list(said) == list(VARIANTS) and said["multi_agent"] == full and asked() == before, "all of it is in the ledger"
    rows = SAMPLE["evaluation"]
    said = asyncio.run(multi_agent.ablations(llm, [row.query for row in rows], [row.response for row in rows]))
    assert all(said[name] != said["multi_agent"] for name in list(VARIANTS)[1:])


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
    assert all(word in seen["reflect"] for word in (QUERY, "愿您常乐。", "positive论点", "negative论点", "初判理由")) and "初判理由" not in seen["judge"]


def said(**finals): return [Record(query=QUERY, response=text, sample=i, judge=final, final=final) for text, given in finals.items() for i, final in enumerate(given)]


def test_votes_choose_the_pair_that_is_furthest_apart():
    records = said(甲=[1, 1, 1], 乙=[1, 1, 0], 丙=[0, 0, 1], 丁=[0, 0, 0], 戊=[None, None, None])
    made = multi_agent.pair(records, "p", random.Random(0))
    assert (made.chosen, made.rejected) == ("甲", "丁") and "戊" not in multi_agent.votes(records)


@pytest.mark.parametrize("finals", [dict(甲=[1, 0], 乙=[0]), dict(甲=[1], 乙=[0, 1]), dict(甲=[1, 0], 乙=[1, 0])])
def test_a_tie_is_neither_good_nor_bad(finals): assert multi_agent.pair(said(**finals), "p", random.Random(0)) is None


def test_equals_are_drawn_by_seed():
    records = said(甲=[1], 乙=[1], 丙=[0], 丁=[0])
    pairs = {(made.chosen, made.rejected) for i in range(40) for made in [multi_agent.pair(records, "p", random.Random(i))]}
    assert pairs == {("甲", "丙"), ("甲", "丁"), ("乙", "丙"), ("乙", "丁")}


def test_close_pairs_prefer_length_to_votes():
    records = said(愿您常乐=[1, 1, 0], 愿您一年四季都有好心情=[1, 1, 1], 祝好=[0, 0, 0])
    assert multi_agent.pair(records, "p", random.Random(0)).chosen == "愿您一年四季都有好心情"
    assert multi_agent.pair(records, "p", random.Random(0), close=2).chosen == "愿您常乐"
    assert multi_agent.pair(records, "p", random.Random(0), close=1) is None


def test_queries_without_a_pair_are_counted(tmp_path):
    finals = {"全好": [1, 1], "全坏": [0, 0], "有别": [1, 0], "平": [[1, 0]], "无": [None, None], "空": []}
    groups = [Group(query=query, records=[r.model_copy(update={"query": query}) for r in said(**{f"{query}{i}": given if isinstance(given, list) else [given] for i, given in enumerate(finals[query])})],
                    missing=query == "空") for query in finals]
    pairs = [made for group in groups if group.records and (made := multi_agent.pair(group.records, group.query, random.Random(0)))]
    table = multi_agent.report(multi_agent.facts(groups), pairs, len(groups), missing=1).set_index("quantity")
    count = lambda name: round((table.value * table.n)[next(found for found in table.index if found.startswith(name))])
    assert [pair.query for pair in pairs] == ["有别"]
    assert [count(name) for name in ("queries that gave", "queries whose candidates are all good", "queries whose candidates are all bad", "queries without a verdict", "candidates tied")] == [1, 1, 1, 2, 1]
    assert (count("verdicts missing"), count("candidates missing")) == (2, 1)
    assert table.loc["verdict entropy within a query (bits)", "value"] == pytest.approx((0 + 0 + 1 + 1) / 4)


def test_near_repetitions_are_left_out_and_every_pair_keeps_its_records():
    line = "愿您的鱼竿总有好消息，湖面的风和一桌热饭都等您回家"
    groups = [Group(query=str(i), records=[r.model_copy(update={"query": str(i)}) for r in said(**{text: [1], f"祝{i % 2}好": [0]})]) for i, text in enumerate((line, line + "呀", line))]
    pairs = [multi_agent.pair(group.records, f"p{i}", random.Random(0)) for i, group in enumerate(groups)]
    kept = multi_agent.distinct(pairs)
    assert kept[0] == pairs[0] and len(kept) < 3
    why = list(multi_agent.pair_records(groups, kept))
    assert [(w["id"], w["chosen"][0]["response"], w["rejected"][0]["final"]) for w in why] == [(pair.id, pair.chosen, 0) for pair in kept]


def test_paired_comparison_counts_by_hand():
    labels, first, other = [1] * 12, [1] * 11 + [None], [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1]
    table = multi_agent.paired({"multi_agent": first, "other": other, "same": first}, labels, [str(i) for i in range(12)], {"all": list(range(12)), "none": []})
    row = table[(table.evaluator == "other") & (table.slice == "all")].iloc[0]
    assert (row.n, row.missing) == (11, 1)
    assert row.difference == pytest.approx(-7 / 11) and row.difference_low < row.difference < row.difference_high < 0 and row.p == pytest.approx(2 * 0.5**7)
    same = table[(table.evaluator == "same") & (table.slice == "all")].iloc[0]
    assert (same.p, same.value) == (1, 1) and same.low < 1, "11 of 11 is no certainty"
    assert table[table.slice == "none"].value.isna().all()
