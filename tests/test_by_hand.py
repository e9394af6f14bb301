"The small commands and their Python: judge a file, score, audit a table, list runs, open a report."
import asyncio
import json
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY, kit_command

from creawrite.audit import audit_frame
from creawrite.core import KitError, UsageError, read_jsonl
from creawrite.judge import judge_texts
from creawrite.rewards import score_texts


def say(*words):
    "Exit code and what a command says."
    process = kit_command(*words)
    return process.communicate()[0], process.returncode


def sample(n):
    return read_jsonl(REPOSITORY / "data/sample/greetings.jsonl")[:n]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path, no_endpoint):
    "Outputs in a folder of the test's own."
    for name in ("data", "nbs", "settings.ini"): (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "outputs").mkdir()
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    return tmp_path


def test_ten_texts_are_judged_in_three_lines(elsewhere):
    rows = sample(5)
    queries, texts = [row["query"] for row in rows] * 2, [row["good"] for row in rows] + [row["weak"] for row in rows]
    table = judge_texts(queries, texts)
    assert list(table) == ["query", "text", "good", "grade"] and table.good.isin([0, 1]).all() and len(table) == 10

    async def as_in_a_notebook(): return judge_texts(queries, texts)

    pd.testing.assert_frame_equal(asyncio.run(as_in_a_notebook()), table)
    with pytest.raises(UsageError, match="3 queries and 2 texts"): judge_texts(queries[:3], texts[:2])


def test_a_table_in_memory_is_audited_in_three_lines(elsewhere):
    frame = pd.DataFrame([{"query": row["query"], "response": row[side], "label": int(side == "good")}
                          for row in sample(40) for side in ("good", "weak")])
    table, sentences = audit_frame(frame)
    assert {"check", "split", "value", "low", "high"} <= set(table) and len(sentences) > 1


def test_texts_are_scored_in_three_lines(smoke_run, no_endpoint):
    rows = sample(4)
    scores = score_texts(smoke_run, [row["query"] for row in rows], [row["good"] for row in rows])
    assert scores.shape == (4,) and len(set(scores)) > 1
    with pytest.raises(KitError, match="holds no reward model"): score_texts("no-such-run", ["一"], ["二"])


def test_a_file_is_judged_beside_its_labels(tmp_path):
    rows = [{"query": row["query"], "response": row[side], "label": int(side == "good")}
            for row in sample(12) for side in ("good", "weak")]
    rows[0]["response"] += "\x1b[31m\u202e"
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        options = ["--engine", "offline", "--run", "test-judge", "--out", tmp_path / "out.csv"]
        told, code = say("judge", tmp_path / "mine.jsonl", *options)
        assert code == 0 and "of 24 texts are good" in told and "Agreement with the labels: " in told, told
        assert "Length only, good if above" in told and "4 more: --out" in told
        assert "\x1b" not in told and "\u202e" not in told, "what a text holds does nothing to a terminal"
        assert len(pd.read_csv(tmp_path / "out.csv")) == 24
        (tmp_path / "bad.csv").write_text("text,label\n好,1\n坏,0\n")
        told, code = say("judge", tmp_path / "bad.csv", "--run", "test-judge")
        assert code == 2 and "no rows with a query and a response" in told
    finally: shutil.rmtree(REPOSITORY / "outputs/test-judge", ignore_errors=True)


def test_runs_are_listed_and_opened(smoke_run):
    told, code = say("runs")
    assert code == 0 and smoke_run in told and "reference/cpu" in told
    told, code = say("open", smoke_run)
    assert code == 0 and told.strip() == f"outputs/{smoke_run}/paper/report.html"
    told, code = say("open", "test-smoek")
    assert code == 2 and f"the nearest is '{smoke_run}'" in told


def test_version_help_and_completion():
    assert say("--version") == ("creawrite 0.1.0\n", 0)
    told, code = say("--help")
    assert code == 0 and "Exit codes: 0 done, 1 an error, 2 wrong usage, 130 stopped" in " ".join(told.split())
    assert "--install-completion" in told
