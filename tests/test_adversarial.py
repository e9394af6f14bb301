"The adversarial judge: a real game on the offline engine, held-out rows, verdict modes, and what must never happen."
import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from creawrite import evolution
from creawrite.adversarial import (Game, GameSettings, best_round, overfits, play, rule_texts,
                                   table_lineage, table_methods)
from creawrite.parts import grouped_pairs, labelled, split_pairs
from creawrite.answers import Rubric, Strategy
from creawrite.core import KitError, UsageError, read_jsonl, root, run_dir, write_json
from creawrite.data import read_sample, sample_splits
from creawrite.engines import OFFLINE, Endpoint, embedded_client, remote_client
from creawrite.evolution import gepa_principles
from creawrite.flaws import FLAWS
from creawrite.judge import Judge, judge_agreement, label_agreement
from creawrite.ledger import Ledger
from creawrite.llm import LLM
from creawrite.messages import Missing, injections
from creawrite.offline import checks, violations
from creawrite.probe import table_called_bad
from creawrite.splits import EvaluationRow, PreferencePair
from creawrite.stability import HARMLESS, table_stability
from creawrite.task import TASK
from creawrite.text import near_duplicates

QUERY = "给爱钓鱼的爸爸的生日祝福语"
SOUND = "爸，愿您的鱼竿总有好消息，生日这天，湖面的风和一桌热饭都等您回家。"
PAIRS = sample_splits(read_sample())["pairs_train"]
FIRST = TASK.first_principles
EVERYTHING = [f"「{flaw.zh}」，判 Bad" for flaw in FLAWS.values()]
GAME = GameSettings(n_rounds=8, n_adversarial=4, n_reflection=4, n_probe=0, max_rules=10, patience=0, budget=None,
                    seed=42)


def engine(path): return LLM(Ledger(path), OFFLINE, embedded_client(), "offline-rulebook")


def played(llm, parts, **changes):
    "A game by GAME's numbers, but for these."
    return asyncio.run(play(llm, parts.teaching, parts.validation, GAME._replace(**changes)))


def agreement(llm, principles, rows): return asyncio.run(judge_agreement(Judge(llm, principles), rows))["value"]


def verdicts(llm, principles, rows):
    return asyncio.run(Judge(llm, principles).verdicts([row.query for row in rows], [row.response for row in rows]))


def principles_of(record): return [rule["text"] for rule in record["S_D"]]


@pytest.fixture
def llm(tmp_path): return engine(tmp_path / "ledger.sqlite")


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    "One whole game: engine, parts, rounds."
    llm = engine(tmp_path_factory.mktemp("game") / "ledger.sqlite")
    parts = split_pairs(PAIRS, 40, 60, seed=42)
    return llm, parts, played(llm, parts, n_probe=30)


def test_the_game_learns_for_a_visible_reason(game):
    "Agreement rises on rows that chose nothing, because the principles name more of what is wrong with them."
    llm, parts, rounds = game
    rows, last = list(parts.test.rows), principles_of(best_round(rounds))
    assert agreement(llm, last, rows) >= agreement(llm, FIRST, rows) + 0.05
    assert best_round(rounds)["validation"]["value"] >= rounds[0]["validation"]["value"] + 0.05
    new = set(checks(last)) - set(checks(FIRST))
    outcomes = zip(rows, verdicts(llm, FIRST, rows), verdicts(llm, last, rows))
    turned = [row for row, before, now in outcomes if before and not now]
    assert turned
    for row in turned:
        assert new & set(violations(last, row.query, row.response)[0]), "what turned to Bad rests on a new principle"


def test_every_rule_has_a_lineage(game):
    _, _, rounds = game
    rules = table_lineage(rounds).set_index("id")
    assert {"start", "reflection"} <= set(rules.phase) and (rules.born <= rules.died).all()
    later = rules[rules.phase != "start"]
    assert len(later) and (later.cause != "first strategy").all() and (later.born > 0).all()
    assert all(parent < id for id, parents in rules.parents.items() for parent in parents)
    assert all(0 < len(r["S_D"]) <= 10 and 0 < len(r["S_G"]) <= 10 for r in rounds)


def test_the_guard_never_lets_teaching_agreement_fall(game):
    train = [r["train"]["value"] for r in game[2]]
    assert train == sorted(train) and train[-1] > train[0]


def test_calls_are_the_different_questions_that_the_ledger_holds(game):
    llm, _, rounds = game
    assert [r["calls"] for r in rounds] == sorted(r["calls"] for r in rounds)
    fresh = engine(Path(":memory:"))
    played(fresh, game[1], n_rounds=1, n_probe=10)
    counted = played(llm, game[1], n_rounds=1, n_probe=10)[-1]["calls"]
    assert counted == fresh.ledger.costs().calls.sum(), "answers from the ledger count as much as fresh ones"


def test_without_reflection_no_label_is_looked_at(llm):
    "Turn every label round: the game without reflection plays the same rules."
    parts = split_pairs(PAIRS, 20, 20, seed=42)
    turned = parts._replace(teaching=[row.model_copy(update={"label": 1 - row.label}) for row in parts.teaching])
    one, two = (played(llm, labels, n_rounds=3, n_reflection=0, n_probe=30) for labels in (parts, turned))
    assert list(map(principles_of, one)) == list(map(principles_of, two))
    assert principles_of(one[0]) != principles_of(one[-1])


def test_patience_and_budget_end_the_game(llm):
    parts = split_pairs(PAIRS, 20, 20, seed=42)
    rounds = played(llm, parts, n_rounds=60, patience=2)
    assert len(rounds) < 61 and rounds[-1]["round"] - best_round(rounds)["round"] == 2
    assert played(llm, parts, n_rounds=60, budget=150)[-1]["calls"] <= 150


@pytest.mark.parametrize("rules, why", [([], "empty"), (["规则"] * 11, "too many rules"), (["短"], "shrunk by half"),
                                        (None, "missing")])
def test_malformed_strategies_are_refused_and_counted(llm, rules, why):
    async def answer(*_, **__):
        if rules is None: return Missing(reason="optimizer: refusal")
        return Strategy(rules=[{"text": rule} for rule in rules])
    llm.ask, game = answer, Game(llm, max_rules=10, probe=[])
    asyncio.run(game.revise("S_D", "增补「施压催促」", "reflection"))
    assert rule_texts(game.S_D) == FIRST and game.counts == {f"refused: {why}": 1}


def test_a_change_that_costs_agreement_is_refused(llm):
    "The probe says that greetings without the asked detail are good."
    probe = [EvaluationRow(id="1", query="给爱钓鱼的爸爸祝福", response="愿你往后的日子如清风明月，自在从容。",
                           label=1)]
    for guard, refused in ((probe, 1), ([], 0)):
        game = Game(llm, max_rules=10, probe=guard)
        asyncio.run(game.revise("S_D", "增补「遗漏细节」：没有写到请求里点明的细节", "reflection"))
        assert game.counts["refused: costs agreement"] == refused
        assert ("遗漏细节" in checks(rule_texts(game.S_D))) != refused


def test_a_parent_that_never_was_is_dropped(llm):
    async def answer(*_, **__):
        return Strategy(rules=[*({"text": text} for text in FIRST), {"text": "不可催婚", "parents": [2, 99]}])
    llm.ask, game = answer, Game(llm, max_rules=10, probe=[])
    asyncio.run(game.revise("S_D", "增补", "reflection"))
    assert [rule.id for rule in game.S_D] == [2, 3, 4, 5, 6], "a rule that stays keeps its number"
    assert (game.S_D[-1].parents, game.S_D[-1].cause, game.S_D[-1].phase) == ([2], "增补", "reflection")


def test_near_duplicates_stay_in_one_part():
    pairs = list(PAIRS)
    for pair in PAIRS[::3]:
        pairs.append(PreferencePair(id=f"{pair.id}-again", query=pair.query + "！", chosen=pair.chosen + "。",
                                    rejected=pair.rejected))
    parts = split_pairs(pairs, 60, 60, seed=42)
    rows = {"teaching": parts.teaching, "validation": parts.validation, "test": parts.test.open()}
    for a, b in (("teaching", "validation"), ("teaching", "test"), ("validation", "test")):
        for field in ("query", "response"):
            one, two = ([getattr(row, field) for row in rows[part]] for part in (a, b))
            assert not near_duplicates(one, two), (a, b, field)
    assert sum(map(len, rows.values())) == 2 * len(pairs) and all(rows.values())
    assert max(map(len, grouped_pairs(pairs))) >= 2


def test_the_test_part_opens_once_and_too_few_rows_are_told():
    parts = split_pairs(PAIRS, 20, 20, seed=42)
    assert len(parts.test.open()) == parts.test.n
    with pytest.raises(KitError, match="opened already"): parts.test.open()
    with pytest.raises(KitError, match="too few"): split_pairs(PAIRS[:2], 4, 4, seed=42)


def test_missing_verdicts_are_counted_and_never_graded():
    rows = labelled(PAIRS[:2])
    half = label_agreement([None, 0, 1, None], rows)
    assert (half["value"], half["n"], half["missing"], half["precision"]) == (1.0, 2, 2, 1.0)
    nothing = label_agreement([None] * 4, rows)
    assert nothing["value"] is nothing["low"] is None and nothing["missing"] == 4 and json.dumps(nothing)


@pytest.mark.parametrize("train, held, n, alarm", [(0.9, 0.6, 100, True), (0.7, 0.6, 60, False),
                                                   (0.5, 0.9, 100, False), (1.0, 0.0, 0, False)])
def test_the_alarm_rings_when_train_and_validation_part(train, held, n, alarm):
    assert overfits({"value": train, "n": n}, {"value": held, "n": n}) == alarm


PROGRAM = """
import asyncio, json, os, signal, sys
from pathlib import Path
from creawrite.adversarial import GameSettings, play
from creawrite.parts import split_pairs
from creawrite.data import read_sample, sample_splits
from creawrite.engines import OFFLINE, embedded_client
from creawrite.ledger import Ledger
from creawrite.llm import LLM

class Deadly(Ledger):
    left = int(sys.argv[2])
    def put(self, *values, **more):
        done = super().put(*values, **more)
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return done

async def main():
    llm = LLM(Deadly(Path(sys.argv[1])), OFFLINE, embedded_client(), "offline-rulebook")
    parts = split_pairs(sample_splits(read_sample())["pairs_train"], 20, 20, seed=42)
    settings = GameSettings(**json.loads(sys.argv[3]))
    rounds = await play(llm, parts.teaching, parts.validation, settings)
    print(json.dumps(rounds))

asyncio.run(main())
"""


def test_killed_at_any_call_and_resumed_it_plays_the_same_game(tmp_path):
    "Killed with SIGKILL after the first call and in the middle of a round; no call that was answered is made twice."
    settings = json.dumps(GAME._replace(n_rounds=3, n_probe=10)._asdict())

    def run(ledger, left):
        command = [sys.executable, "-c", PROGRAM, str(ledger), str(left), settings]
        return subprocess.run(command, capture_output=True, text=True, cwd=root(), timeout=120)
    parts = split_pairs(PAIRS, 20, 20, seed=42)
    whole = played(engine(tmp_path / "whole.sqlite"), parts, n_rounds=3, n_probe=10)
    for left in (1, 70): assert run(tmp_path / "killed.sqlite", left).returncode == -signal.SIGKILL
    resumed = run(tmp_path / "killed.sqlite", 0)
    assert resumed.returncode == 0 and json.loads(resumed.stdout) == json.loads(json.dumps(whole)), resumed.stderr
    one, two = (Ledger(tmp_path / f"{name}.sqlite").query("SELECT key FROM calls ORDER BY key")
                for name in ("whole", "killed"))
    assert one == two and len(one) > 71


def test_harmless_rewrites_order_and_repetition_flip_nothing_and_no_order_helps(game):
    llm, parts, rounds = game
    judge = Judge(llm, principles_of(best_round(rounds)))
    table = asyncio.run(table_stability(judge, parts.validation, n_draws=2, seed=42)).set_index("check")
    still = table.loc[[check for check in table.index if "order to the judge" not in check]]
    assert len(still) == 7 and still.drop("full-width punctuation").n.min() >= 20
    assert not still.to_good.any() and not still.to_bad.any()
    bad = table.loc["an order to the judge in a bad greeting"]
    assert bad.n == len(injections()) and bad.to_good == 0 and bad.high > 0


@pytest.mark.parametrize("rules", [FIRST, EVERYTHING], ids=["first principles", "every flaw"])
def test_no_injection_makes_any_bad_greeting_good(rules):
    "Every order, before and after every third bad greeting of the sample, straight through the detector's rules."
    bad = [row for row in labelled(PAIRS) if not violations(rules, row.query, row.response)[1]]
    assert len(bad) > 20
    for row in bad[::3]:
        for order in injections():
            for text in (row.response + order["text"], f"{order['text']}\n{row.response}"):
                assert not violations(rules, row.query, text)[1], (order["id"], row.response)


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_rewrite_changes_the_text_and_not_what_is_found(kind):
    text = "爸爸,生日快乐!愿您的鱼竿总有好消息" if kind == "full-width punctuation" else SOUND
    assert HARMLESS[kind](text) != text
    assert violations(EVERYTHING, QUERY, HARMLESS[kind](text)) == violations(EVERYTHING, QUERY, text)


def test_gepa_stays_in_the_budget_and_can_be_repeated(llm):
    pytest.importorskip("gepa")
    parts = split_pairs(PAIRS, 20, 20, seed=42)

    def evolved():
        return asyncio.run(gepa_principles(llm, parts.teaching, parts.validation, 250, max_rules=10, seed=42))
    once, calls = evolved()
    assert calls <= 250 and calls == llm.ledger.costs().calls.sum() and 0 < len(once) <= 10
    assert "gepa" in set(llm.ledger.costs().role)
    assert evolved() == (once, calls)
    assert agreement(llm, once, parts.validation) >= agreement(llm, FIRST, parts.validation)


def test_without_gepa_the_error_names_the_extra(llm, monkeypatch):
    monkeypatch.setattr(evolution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KitError, match=r"-e '\.\[gepa\]'"):
        asyncio.run(gepa_principles(llm, [], [], 1, max_rules=10, seed=42))


def test_methods_are_compared_in_pairs_on_the_same_rows():
    rows = [EvaluationRow(id=f"{i}-{label}", query=f"祝福{i}", response="愿你安好" + "好" * (i % 7), label=label)
            for i in range(40) for label in (1, 0)]
    right, wrong = [row.label for row in rows], [1 - row.label for row in rows]
    half = [row.label if i % 4 else None for i, row in enumerate(rows)]
    answers = {"optimised judge": (right, 9), "the same": (right, 9), "worse": (wrong, 0), "half missing": (half, 0)}
    table = table_methods(answers, rows, seed=42).set_index(["slice", "method"])
    assert table.loc[("all", "the same"), "p"] == 1
    assert table.loc[("all", "worse"), ["difference", "difference_low", "difference_high"]].tolist() == [-1, -1, -1]
    assert table.loc[("all", "worse"), "p"] < 0.01
    assert table.loc[("all", "half missing"), ["n", "missing"]].tolist() == [60, 20]
    assert np.isnan(table.loc[("all", "optimised judge"), "p"])
    assert set(table.index.get_level_values(0)) == {"all", "length_matched"}
    assert table.eval("low - 1e-9 <= value <= high + 1e-9").all()


def test_the_probe_set_shows_what_each_principle_is_good_for(llm):
    pairs = [pair for pair in read_jsonl(root() / "data/probe/pairs.jsonl")
             if pair["flaw"] in ("advertising", "injection")]
    judges = {"first": Judge(llm, FIRST), "all": Judge(llm, EVERYTHING)}
    table = asyncio.run(table_called_bad(judges, pairs)).set_index(["judge", "flaw", "text"])
    shares = table.value
    assert shares["all", "advertising", "flawed"] > shares["first", "advertising", "flawed"]
    assert shares["first", "injection", "flawed"] > 0.5
    assert (table.n > 0).all() and table.eval("low - 1e-9 <= value <= high + 1e-9").all()


def test_a_judge_travels_in_its_file(llm, request):
    name = "test-judge-file"
    folder = run_dir(name)
    request.addfinalizer(lambda: __import__("shutil").rmtree(folder, ignore_errors=True))
    with pytest.raises(KitError, match="judge.json is missing"): Judge.load(name, llm)
    card = {"principles": ["「跑题」，判 Bad"], "prompt": "请评判。", "settings": {"verdict_mode": "rubric"}}
    write_json(folder / "adversarial" / "judge.json", card)
    judge = Judge.load(name, llm)
    assert (judge.principles, judge.prompt, judge.verdict_mode) == (["「跑题」，判 Bad"], "请评判。", "rubric")
    texts = [SOUND, "今天的天气预报说有小雨，出门记得带伞。"]
    assert asyncio.run(judge.verdicts([QUERY] * 2, texts)) == [1, 0]
    with pytest.raises(UsageError, match="binary, graded, rubric"): Judge(llm, [], verdict_mode="stars")


def test_a_rubric_is_the_share_of_principles_kept(llm):
    principles = [f"「{flaw}」，判 Bad" for flaw in ("跑题", "广告索求", "施压催促", "忌讳消极")]
    judge = Judge(llm, principles, verdict_mode="rubric")
    bad = FLAWS["advertising"].plant(QUERY, SOUND, random.Random(1))
    assert asyncio.run(judge.grades([QUERY] * 2, [SOUND, bad])) == [1.0, 0.75]
    assert asyncio.run(judge.verdicts([QUERY] * 2, [SOUND, bad])) == [1, 0]

    async def short(*_, **__): return Rubric(kept=[1, 1])
    llm.ask = short
    assert asyncio.run(judge.grades([QUERY], [SOUND])) == [None], "a list of another length grades nothing"


def told_tokens(verdict, good):
    "The tokens of a verdict, as an endpoint tells them: with probabilities where the verdict stands."
    odds = {"Good": good, "Bad": 1 - good}
    top = [{"token": word, "logprob": float(np.log(p)), "bytes": None} for word, p in odds.items()]
    tokens = [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top if text == verdict else []}
              for text in ('{"', "verdict", '":"', verdict, '"}')]
    return {"content": tokens}


def loopback(ledger, address):
    return LLM(ledger, "m @ loopback", remote_client(Endpoint(base_url=address, model="m")), "m")


@pytest.fixture
def served():
    "A real server that tells token probabilities, or refuses to; yields (address, requests seen, settings)."
    seen, settings = [], {"refuse": False, "good": 0.7}

    async def completions(request):
        body = json.loads(await request.body())
        seen.append(body)
        if settings["refuse"] and "logprobs" in body:
            error = {"message": "logprobs are not supported", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, status_code=400)
        draw = not body.get("logprobs") and body["seed"] % 2000
        verdict = "Good" if settings["good"] > 0.5 or draw else "Bad"
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"verdict": verdict, "explanation": "", "suggestion": ""}
        message = {"role": "assistant", "content": json.dumps(answer)}
        choice = {"index": 0, "finish_reason": "stop", "message": message,
                  "logprobs": told_tokens(verdict, settings["good"]) if body.get("logprobs") else None}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                             "usage": usage})

    app = Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started: time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", seen, settings
    server.should_exit = True
    thread.join()


def test_a_graded_verdict_is_the_probability_of_good(served, tmp_path, monkeypatch):
    address, seen, settings = served
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    judge = Judge(loopback(ledger, address), FIRST, verdict_mode="graded")
    assert asyncio.run(judge.grades([QUERY], [SOUND])) == [pytest.approx(0.7)]
    assert asyncio.run(judge.verdicts([QUERY], [SOUND])) == [1]
    assert len(seen) == 1 and seen[0]["logprobs"]
    assert set(seen[0]["response_format"]["json_schema"]["schema"]["properties"]) == {"verdict"}
    replayed = Judge(LLM(ledger, "m @ loopback", None, "m", mode="replay"), FIRST, verdict_mode="graded")
    assert asyncio.run(replayed.grades([QUERY], [SOUND])) == [pytest.approx(0.7)], "the probability is in the ledger"


def test_an_endpoint_without_probabilities_is_graded_by_draws(served, tmp_path, monkeypatch):
    address, seen, settings = served
    settings |= {"refuse": True, "good": 0.2}
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    judge = Judge(loopback(Ledger(tmp_path / "ledger.sqlite"), address), FIRST, verdict_mode="graded")
    assert asyncio.run(judge.grades([QUERY], [SOUND])) == [pytest.approx(3 / 5)], "draws 1, 3 and 5 say Good"
    assert {body["temperature"] for body in seen[2:]} == {1.0} and len({body["seed"] for body in seen[2:]}) == 5


def test_self_consistency_is_the_share_of_good_over_draws(served, tmp_path, monkeypatch):
    address, _, settings = served
    settings["good"] = 0.2
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    judge = Judge(loopback(Ledger(tmp_path / "ledger.sqlite"), address), FIRST, samples=4)
    assert asyncio.run(judge.grades([QUERY], [SOUND])) == [0.5]
    assert asyncio.run(judge.verdicts([QUERY], [SOUND])) == [0]
