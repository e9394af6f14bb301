"The judges' passport: one examination for every evaluator, and a judge that tells nothing is refused in words."
import json
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY, kit_command
from endpoint import Served
from tiny_gguf import tiny_gguf

SMALL = dict(n_rows=24, n_matched=12, n_probe=12, n_sealed=12, n_checks=6, n_slow=12, n_teach=24)


@pytest.fixture
def out():
    "A folder of the real kit for a run, gone afterwards."
    folder = REPOSITORY / "outputs/test-passport"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder / "passport"
    shutil.rmtree(folder, ignore_errors=True)


def passport(engine, sizes=SMALL, **endpoint):
    "Exit code and what is said."
    options = [f"-ppassport.{name}={n}" for name, n in sizes.items()]
    process = kit_command("passport", engine, "--run", "test-passport", *options, endpoint=endpoint)
    told = process.communicate()[0]
    assert "Traceback" not in told, told
    return process.returncode, told


def test_the_rulebook_sits_it(smoke_run):
    out = REPOSITORY / "outputs" / smoke_run / "passport"
    table, page = pd.read_csv(out / "passport.csv"), pd.read_csv(out / "page.csv").set_index("evaluator")
    graded = pd.DataFrame([json.loads(line) for line in (out / "grades.jsonl").read_text().splitlines()])
    names = {"rulebook, principles", "rulebook, whole word", "rulebook, rubric", "reward model", "TF-IDF"}
    assert set(table.evaluator) == set(graded.evaluator) == set(page.index) >= names
    sealed = table.query("measure == 'pairs ranked right' and slice == 'sealed'").set_index("evaluator").n
    assert (sealed == 24).all() and not {"text", "query"} & set(graded), "numbers, no texts"
    assert pd.read_csv(out / "sealed.csv").query("flaw == 'all'").p_holm.notna().sum() == table.evaluator.nunique() - 1
    assert (out / "figure_passport.png").is_file()


def test_a_coin_is_refused_in_words(out):
    enough = SMALL | dict(n_rows=60, n_probe=60, n_slow=60)
    with Served("coin") as served:
        coin = dict(OPENAI_BASE_URL=served.url, OPENAI_API_KEY="k", CREAWRITE_MODEL="coin")
        code, told = passport("endpoint", enough, **coin)
    words = " ".join(told.split())
    assert code == 1 and "is uninformative as a judge of this task" in words and "no better than a coin" in words, told
    assert "is not asked question by question" in words and (out / "passport.csv").is_file(), "the tables stay"


def test_a_model_file_sits_it_in_every_mode(out, tmp_path):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    code, told = passport(f"local:{file}", SMALL | dict(n_slow=3, n_probe=3, n_checks=3))
    assert code == 0 or "is uninformative as a judge of this task" in " ".join(told.split()), told
    table = pd.read_csv(out / "passport.csv").set_index(["evaluator", "measure"])
    questions = table.loc["Tiny Test Instruct, principles"].value
    assert questions["probability of yes and no"] < 0.5 and questions["missing"] > 0, "it says neither yes nor no"
    assert questions["seconds per judgement"] > 0
    assert str(tmp_path) not in told + (out.parent / "run.json").read_text()
