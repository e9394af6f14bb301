"The human study as its users meet it: a real server, killed processes, a full disk, files, numbers, the whole path."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, kit_command

from creawrite import agreement, study
from creawrite.core import KitError, run_dir, write_jsonl
from creawrite.study import Design, new_study, open_study, record_answers, table_ratings
from creawrite.study_files import export_label_studio, export_potato, export_ratings, import_ratings, simulate_ratings
from creawrite.task import TASK

RUN, MARKUP = "rated", "<img src=x onerror=\"document.title='run'\"><b>愿你</b>&amp;平安"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
NAMES = ["Anna Muster", "Bo Beispiel"]
http = httpx2.Client(trust_env=False)


def write_greetings(prompts=12):
    "Two policies' greetings in both scenes, one of them with markup."
    texts = {"base": "第{}条，快乐", "sft": "第{}条，愿你安好"}
    rows = [dict(policy=policy, prompt_id=f"p{i}", query=f"请求{i}<i>", scene=TASK.scenes[i % 2], sample=0,
                 text=MARKUP if (policy, i) == ("sft", 3) else text.format(i))
            for policy, text in texts.items() for i in range(prompts)]
    write_jsonl(run_dir(RUN) / "evaluate" / "generations.jsonl", rows)


@pytest.fixture
def fresh(kit):
    "A study of two raters and 24 greetings, without checks and repeats, in a kit of its own."
    write_greetings()
    return new_study(RUN, Design(NAMES, items=24, repeats=0, checks=0))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if int(sys.argv[3]): resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from creawrite.rating_server import serve_study
serve_study(sys.argv[1], host=sys.argv[2])
"""


class Server:
    "A rating server in a process of its own."

    def __init__(self, most=0, host="127.0.0.1", **streams):
        command = [sys.executable, "-c", LIMITED, RUN, host, str(most)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **streams)
        self.links = [self.process.stdout.readline().strip().split(": ")[1] for _ in NAMES]
        self.base = self.links[0].partition("/r/")[0]
        self.wait()

    def wait(self):
        for _ in range(200):
            try: return http.get(self.links[0] + "/state").raise_for_status()
            except httpx2.ConnectError: time.sleep(0.05)

    def __enter__(self): return self

    def __exit__(self, *_): self.kill(signal.SIGTERM)

    def kill(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.wait()
        self.process.stdout.close()

    def post(self, link, events, now=None, **headers):
        own = {"Origin": self.base, "Sec-Fetch-Site": "same-origin"} | headers
        own = {name.replace("_", "-"): value for name, value in own.items() if value}
        return http.post(f"{link}/answers", json={"now": now or time.time() * 1000, "events": events}, headers=own)


def click(place, dimension, value, at=None, key=None):
    names = list(TASK.dimensions)
    return dict(key=key or f"{place:04}{dimension}{time.monotonic_ns()}", place=place, dimension=names[dimension],
                value=value, at=at or time.time() * 1000)


def whole(place, value): return [click(place, dimension, value) for dimension in range(5)]


# ---- who may send what

def test_links_sites_and_bad_input(fresh):
    with Server() as server:
        anna, other = server.links
        page = http.get(anna)
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"base|sft|Anna|p\d", http.get(f"{anna}/state").text.replace("base-uri", ""))
        for link in (f"{server.base}/r/{'x' * 32}", anna[:-1], f"{server.base}/", f"{anna}x"):
            wrong = http.get(link)
            assert wrong.status_code == 403 and "这个链接无效" in wrong.text and "not valid" in wrong.text
        assert http.get(f"{anna[:-2]}/state").status_code == 403
        assert server.post(anna[:-2], whole(0, 2)).status_code == 403
        for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site", "Sec-Fetch-Site": ""},
                        {"Origin": "null", "Sec-Fetch-Site": ""}, {"Origin": "", "Sec-Fetch-Site": ""}):
            refused = server.post(anna, whole(0, 2), **headers)
            assert refused.status_code == 403 and "own page" in refused.json()["error"], headers
        form = http.post(f"{anna}/answers", data={"now": "1"}, headers={"Origin": server.base})
        assert form.status_code == 415
        assert http.get(anna, headers={"Host": "evil.example"}).status_code == 400, "another name that leads here"
        assert http.post(f"{anna}/answers", content=b"x" * 200_000, headers={
            "Origin": server.base, "Content-Type": "application/json"}).status_code == 413
        for value in (0, 4, 2.5, "2", True):
            bad = server.post(anna, [click(0, 0, value), click(0, 1, 2)])
            assert bad.json()["refused"][0]["why"] == "a rating is 1, 2 or 3" and len(bad.json()["saved"]) == 1
        assert server.post(anna, [click(24, 0, 1)]).status_code == 422, "a place that there is not"
        assert len(fresh.rows("SELECT * FROM ratings")) == 1
        open_study(RUN).note("closed", "yes")
        assert http.get(anna).status_code == server.post(other, whole(0, 1)).status_code == 410
        assert "study is closed" in http.get(anna).text and len(fresh.rows("SELECT * FROM ratings")) == 1


def test_another_address_is_warned_of(fresh):
    with Server(host="127.0.0.2", stderr=subprocess.PIPE) as server:
        assert server.base.startswith("http://127.0.0.2:") and http.get(server.links[0]).status_code == 200
        assert "warning: 127.0.0.2 is open to other machines" in server.process.stderr.readline()
        server.process.stderr.close()


def test_two_raters_at_once_and_a_click_sent_twice(fresh):
    with Server() as server:
        def rate(link, value):
            for place in range(12):
                events = whole(place, value)
                assert server.post(link, events).status_code == server.post(link, events).status_code == 200
        threads = [threading.Thread(target=rate, args=pair) for pair in zip(server.links, (1, 3))]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        table = table_ratings(fresh)
        assert table.groupby("rater").weighted.agg(["size", "min", "max"]).values.tolist() == [[12, 1, 1], [12, 3, 3]]
        assert len(fresh.rows("SELECT * FROM answers")) == 120
        now = time.time() * 1000
        late = now - 3_600_000  # a phone whose clock is an hour late, and a click of a minute ago
        assert server.post(server.links[0], [click(0, 0, 2, at=late - 60_000)], now=late).json()["saved"]
        assert table_ratings(fresh).weighted.tolist()[:1] == [1], "the later click counts, whenever it arrives"


def test_killed_between_two_clicks_and_started_again(fresh):
    with Server() as server:
        links = server.links
        assert server.post(links[0], whole(0, 3)[:3]).status_code == 200
        server.kill()
        with Server() as again:
            assert again.links == links, "links outlive a restart"
            assert again.post(links[0], whole(0, 3)[3:]).status_code == 200
            state = http.get(f"{links[0]}/state").json()
    assert state["ratings"] == {"0": dict.fromkeys(TASK.dimensions, 3)} and len(table_ratings(fresh)) == 1


def test_a_full_disk_is_told_and_loses_nothing(fresh):
    size = fresh.path.stat().st_size
    with Server(most=size + 4096) as server:
        codes = []
        for place in range(23):
            codes.append(server.post(server.links[0], whole(place, 2)))
            if codes[-1].status_code != 200: break
        refused = codes[-1]
        assert refused.status_code == 507 and "cannot be written" in refused.json()["error"]
        assert http.get(server.links[0]).status_code == 200, "the page still opens"
    saved = sum(code.status_code == 200 for code in codes)
    assert len(table_ratings(fresh)) == saved < 23
    with Server() as server:
        assert server.post(server.links[0], whole(23, 2)).status_code == 200
    assert len(table_ratings(fresh)) == saved + 1


def test_a_stage_that_is_redone_keeps_what_people_wrote(tmp_path):
    from creawrite.runner import set_aside
    folder = tmp_path / "human"
    folder.mkdir()
    names = [study.STUDY_FILE, f"{study.STUDY_FILE}-journal", "scores.csv"]
    for name in names: (folder / name).write_text(name)
    with pytest.raises(RuntimeError), set_aside(folder, True):
        assert sorted(path.name for path in folder.iterdir()) == names[:2]
        raise RuntimeError("it fails before it has written anything")
    assert sorted(path.name for path in folder.iterdir()) == names
    with set_aside(folder, True): (folder / "excellence.csv").touch()
    assert sorted(path.name for path in folder.iterdir()) == [*names[:2], "excellence.csv"]


# ---- files, and designs that are none

def test_files_in_and_out(fresh, tmp_path):
    for place in range(4): record_answers(fresh, 1, whole(place, 1 + place % 3), time.time() * 1000)
    file = tmp_path / "out.csv"
    assert export_ratings(fresh, file) == 4
    assert not re.search("Anna|Bo ", file.read_text()) and set(pd.read_csv(file).rater) == {"R1"}
    study.study_path(RUN).unlink()
    copy = new_study(RUN, Design(NAMES, items=24, repeats=0, checks=0, seed=7))
    assert (import_ratings(copy, file), import_ratings(copy, file)) == (20, 0)
    same = ["item", *TASK.dimensions]
    assert table_ratings(copy)[same].sort_values("item").values.tolist() == (
        pd.read_csv(file)[same].sort_values("item").values.tolist())
    stranger = pd.read_csv(file).assign(rater="Chen")
    stranger.to_csv(file, index=False)
    assert import_ratings(copy, file) == 20 and set(table_ratings(copy).rater) == {"R1", "R3"}
    stranger.assign(item="0" * 12).to_csv(file, index=False)
    with pytest.raises(KitError, match="row 2: there is no greeting '000000000000'"): import_ratings(copy, file)
    assert export_label_studio(copy, tmp_path / "ls") == export_potato(copy, tmp_path / "potato") == 24
    tasks = json.loads((tmp_path / "ls/tasks.json").read_text())
    assert set(tasks[0]["data"]) == {"item", "query", "text"}
    from xml.etree import ElementTree
    choices = ElementTree.parse(tmp_path / "ls/config.xml").getroot().findall("Choices")
    assert [len(each) for each in choices] == [3] * 5
    import yaml
    config = yaml.safe_load((tmp_path / "potato/config.yaml").read_text())
    assert [scheme["size"] for scheme in config["annotation_schemes"]] == [3] * 5


@pytest.mark.parametrize("options, sentence", [
    (["--raters", ""], "--raters names nobody"), (["--raters", "A,A"], "names somebody twice"),
    (["--raters", "A", "--items", "99"], "--items 99: the run has 24 greetings to rate (2 policies)"),
    (["--raters", "A", "--per-item", "2"], "--per-item 2: there are 1 raters"),
    (["--raters", "A", "--repeats", "0.9"], "--repeats 0.9: give a share from 0 to 0.5")])
def test_designs_that_are_none(kit, creawrite, options, sentence):
    write_greetings()
    code, _, err = creawrite("study", "new", RUN, *options)
    assert code == 2 and sentence in err and err.count("\n") == 1 and not study.study_path(RUN).exists()


def test_a_study_is_not_overwritten_and_simulated_ones_stay_apart(fresh, creawrite):
    assert creawrite("study", "simulate", RUN)[0] == 0
    for command in (["new", RUN, "--raters", "A"], ["serve", RUN], ["simulate", RUN]):
        code, _, err = creawrite("study", *command)
        assert code == 1 and err.count("\n") == 1, err
    code, out, _ = creawrite("study", "close", RUN)
    assert code == 0 and "its links have stopped" in out and open_study(RUN).closed
    code, _, err = creawrite("study", "report", "nobody")
    assert code == 2 and "no run 'nobody'" in err
    assert oct(fresh.path.stat().st_mode)[-3:] == "600", "names are nobody else's to read"


# ---- numbers

def test_coefficients_are_those_of_their_libraries():
    "irrcac 0.4.4 gives AC1 0.45495 for these ratings; it cannot be installed beside pandas 3."
    import krippendorff, pingouin
    rng = np.random.default_rng(5)
    truth = rng.integers(1, 4, 30)
    matrix = np.stack([np.where(rng.random(30) < 0.3, rng.integers(1, 4, 30), truth) for _ in range(3)], axis=1)
    assert agreement.gwet_ac1(matrix) == pytest.approx(0.45495, abs=5e-6)
    ours = agreement.ordinal_alpha(matrix)
    assert ours == krippendorff.alpha(reliability_data=matrix.T, level_of_measurement="ordinal")
    wine = pingouin.read_dataset("icc").rename(columns={"Wine": "item", "Judge": "rater", "Scores": "weighted"})
    found = {row["coefficient"]: row["value"] for row in agreement.icc_rows(wine.assign(again=0))}
    assert found["ICC, one rater"] == pytest.approx(0.728, abs=5e-4), "pingouin's worked example"
    assert found["ICC, mean of all"] == pytest.approx(0.914, abs=5e-4)


def test_the_power_figure_by_simulation():
    rng = np.random.default_rng(1)
    for rate in (0.1, 0.5, 0.86):
        n = agreement.greetings_needed(rate, 0.03)
        drawn = rng.binomial(n, rate, 40_000) / n
        assert 0.94 < (abs(drawn - rate) <= 0.03).mean() < 0.965
        halves = [agreement.half_width(share, n) for share in drawn[:2000]]
        assert np.mean(halves) == pytest.approx(0.03, abs=0.001)


def test_the_alternative_annotator_test_by_hand():
    from scipy.stats import false_discovery_control, ttest_1samp
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, 60)
    hears = lambda error: np.where(rng.random(60) < error, 1 - truth, truth).astype(float)
    said, judge, items = {"a": hears(0.1), "b": hears(0.2), "c": hears(0.3)}, hears(0.15), [f"i{i}" for i in range(60)]
    table = agreement.table_alternative({"j": pd.Series(judge, items)}, pd.DataFrame(said, items), 0.2)
    p_values = []
    for name in said:
        gaps = []
        for i in range(60):
            others = [said[other][i] for other in said if other != name]
            judged, rated = (sum(value == one for one in others) for value in (judge[i], said[name][i]))
            gaps.append(int(rated >= judged) - int(judged >= rated))
        p_values.append(ttest_1samp(np.array(gaps, float), 0.2, alternative="less").pvalue)
    assert table.p.tolist() == pytest.approx(p_values)
    assert table.p_corrected.tolist() == pytest.approx(false_discovery_control(p_values, method="by").tolist())


def test_simulated_raters_agree_as_much_as_stated(kit):
    write_greetings(150)
    found = []
    for reliability in (0.2, 0.9):
        study.study_path(RUN).unlink(missing_ok=True)
        made = new_study(RUN, Design(["A", "B", "C"], items=300))
        simulate_ratings(made, reliability)
        matrix = agreement.rating_matrix(table_ratings(made).query("expected.isna()"), "Creativity")
        found.append(agreement.ordinal_alpha(matrix))
    assert 0.05 < found[0] < 0.3 and 0.7 < found[1] < 0.9, "rounding to three steps takes some of it"


# ---- the whole path

def test_without_ratings_the_human_columns_stay_empty_and_say_how_to_fill_them(smoke_run):
    human, paper = (run_dir(smoke_run) / name for name in ("human", "paper"))
    assert {path.name for path in human.iterdir()} == {"study.json", "report.md"}
    assert f"`creawrite study new {smoke_run} --raters" in (human / "report.md").read_text()
    assert "Empty until people have rated: `creawrite study new`" in (paper / "table5.md").read_text()
    assert "`creawrite study new` collects them" in (paper / "table2.md").read_text()


@pytest.fixture
def copied_run(smoke_run):
    "A finished run to rate, without its paper."
    folder = run_dir("test-human")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_dir(smoke_run), folder, ignore=shutil.ignore_patterns("paper", ".lock"))
    yield "test-human"
    shutil.rmtree(folder)


def test_a_simulated_study_fills_the_tables_and_is_marked_wherever_it_shows(copied_run, creawrite):
    from creawrite import paper
    names = "Anna Muster,Bo Beispiel,Chen Li"
    assert creawrite("study", "new", copied_run, "--raters", names, "--items", "100")[0] == 0
    assert "SIMULATED" in creawrite("study", "simulate", copied_run)[1]
    process = kit_command("study", "report", copied_run)
    told = process.communicate()[0]
    assert process.returncode == 0 and "These ratings are SIMULATED" in told and "may not stand in" in told, told
    tables = {table.name: table for table in paper.write_tables(copied_run, "all")}
    for name in ("table2", "table3"):
        cells = tables[name].cells
        assert (cells[cells.Ours != ""]["Human (simulated)"] != "").all() and "Human" not in cells
    fifth = tables["table5"].cells
    assert (fifth.drop(columns="Raters") != "").all(axis=None) and set(fifth.Raters) == {"3 simulated"}
    assert fifth.n.astype(int).between(16, 17).all()
    for name in ("table2", "table3", "table5", "evaluators", "raters", "power", "stand_in"):
        assert "SIMULATED" in tables[name].caption and "simulat" in tables[name].cells.to_markdown(), name
    judges = pd.read_csv(run_dir(copied_run) / "human/judges.csv")
    assert paper.about_figure_2(judges).endswith("with SIMULATED raters")
    figure = paper.figure_2(paper.read_results(copied_run).frameworks, "", judges)
    assert "SIMULATED" in figure.axes[0].get_xticklabels()[-1].get_text()
    written = [path for part in ("human", "paper") for path in (run_dir(copied_run) / part).glob("*.*")]
    texts = [path.read_text() for path in written if path.suffix in (".csv", ".md", ".json", ".tex")]
    assert len(texts) > 40 and not any(re.search("Anna|Muster|Beispiel|Chen", text) for text in texts), "no name leaves"


def test_no_reference_table_holds_simulated_ratings():
    files = [path for path in (REPOSITORY / "outputs/reference").rglob("*") if path.suffix in (".md", ".csv", ".tex")]
    assert files and not [path for path in files if re.search("SIMULATED|Human .simulated", path.read_text())]
    assert not list((REPOSITORY / "outputs/reference").rglob(study.STUDY_FILE))
