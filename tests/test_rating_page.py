"The rating page in headless Chromium: by keyboard and mouse, on phone and desktop, through every loss of connection."
import re

import pytest
from conftest import make_kit
from test_study import CHROMIUM, MARKUP, NAMES, Server, browser, write_greetings

from creawrite.rating_server import rater_links
from creawrite.study import Design, new_study, open_study, study_path, table_ratings
from creawrite.task import TASK

pytestmark = [browser, pytest.mark.browser]
SAVED = re.compile("^(Saved|已保存)$")
SIZES = {390: 844, 1300: 900}


@pytest.fixture(scope="module")
def chromium():
    "A headless browser."
    from playwright.sync_api import sync_playwright
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update"]
    with sync_playwright() as playwright:
        browsing = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browsing
        browsing.close()


class Rater:
    "Somebody at the page."

    def __init__(self, running, link, width=1300, language="en-US"):
        size = {"width": width, "height": SIZES[width]}
        self.context = running.new_context(viewport=size, locale=language, has_touch=width < 500)
        self.link, self.asked = link, []
        self.page = self.tab()
        self.page.keyboard.press("Enter")  # begin
        self.page.locator("#guide").wait_for(state="hidden")

    def tab(self):
        page = self.context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: pytest.fail(str(error)))
        page.goto(self.link)
        page.locator("#rate").wait_for()
        return page

    def keys(self, keys):
        for key in keys: self.page.keyboard.press(key)

    def click(self, what):
        "Where it is seen: the page brings the next question into view by itself."
        box = self.page.locator(what).bounding_box()
        self.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def choose(self, dimension, value): self.click(f".dimension:nth-child({dimension + 1}) button[value='{value}']")

    def saved(self):
        from playwright.sync_api import expect
        expect(self.page.locator("#saved")).to_have_text(SAVED, timeout=15_000)


def drawn():
    "A study of two raters and 24 greetings, as if nobody had rated yet."
    study_path("rated").unlink(missing_ok=True)
    return new_study("rated", Design(NAMES, items=24, repeats=0, checks=0))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    "One server for all; it reads the study anew at each request."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(make_kit(tmp_path_factory.mktemp("page") / "kit")))
        write_greetings()
        drawn()
        with Server() as server: yield server


@pytest.fixture
def fresh(running): return drawn()


@pytest.fixture
def server(running, fresh):
    running.links = list(rater_links(fresh, running.base).values())
    fresh.note("port", running.base.rpartition(":")[2])
    return running


def test_12_by_keyboard_12_by_mouse_reloaded_and_undone(server, fresh, chromium):
    "By one rater on a phone in Chinese, by the other on a desktop in English."
    said = {(place, dimension): 1 + (place * 7 + dimension) % 3 for place in range(24) for dimension in range(5)}
    for number, width in enumerate(SIZES):
        rater = Rater(chromium, server.links[number], width, ["zh-CN", "en-US"][number])
        for place in range(12): rater.keys([*(str(said[place, dimension]) for dimension in range(5)), "ArrowRight"])
        rater.saved()
        rater.page.reload()
        counts = rater.page.locator("#count")
        counts.filter(has_text=["已评 12 / 24", "12 of 24 rated"][number]).wait_for(timeout=20_000)  # goes on there
        for place in range(12, 24):
            for dimension in range(5): rater.choose(dimension, said[place, dimension])
            rater.click("#next")
        assert rater.page.locator("#end-title").inner_text() == ["全部评完，谢谢您！", "All rated. Thank you!"][number]
        rater.keys(["u"])
        rater.saved()
        assert counts.inner_text() == ["已评 23 / 24", "23 of 24 rated"][number]
        fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert rater.page.evaluate(fits) and all(url.startswith((server.base, "data:")) for url in rater.asked)
        rater.context.close()
    table = table_ratings(fresh)
    assert table.groupby("rater").place.agg(list).map(sorted).tolist() == [list(range(23))] * 2
    for row in table.itertuples():
        assert list(row[7:12]) == [said[row.place, dimension] for dimension in range(5)]
    assert len(fresh.rows("SELECT * FROM ratings WHERE value IS NOT NULL")) == 2 * (24 * 5 - 1)


def test_arrows_undo_and_a_changed_mind(server, fresh, chromium):
    rater = Rater(chromium, server.links[0])
    rater.keys(["3", "3", "ArrowUp", "ArrowUp", "1", "ArrowDown", "ArrowRight", "2", "ArrowLeft"])
    rater.saved()
    shown = lambda: {(row["place"], row["dimension"]): row["value"] for row in fresh.rows("SELECT * FROM ratings")}
    first, second, *_ = TASK.dimensions
    assert shown() == {(0, first): 1, (0, second): 3, (1, first): 2}
    rater.keys(["u", "Backspace"])
    rater.saved()
    assert shown() == {(0, first): 3, (0, second): 3, (1, first): None}, "undo gives back what stood before"
    rater.context.close()


def test_markup_is_shown_and_not_run(server, fresh, chromium):
    rater = Rater(chromium, server.links[0])
    for _ in range(24):
        if rater.page.locator("#text").inner_text() == MARKUP: break
        rater.keys(["ArrowRight"])
    else: pytest.fail("the greeting with markup never came")
    assert rater.page.locator("#text *").count() == 0 and "run" not in rater.page.title()
    assert "<i>" in rater.page.locator("#query").inner_text()
    rater.context.close()


FORM = """<form id=form action="{}" method=post enctype="text/plain">
<input name='{{"now": 1, "events": [{{"key": "12345678", "place": 0, "dimension": "Creativity", "value": 3, "at": 1,
"x": "' value='"}}]}}'></form>"""


def test_another_site_cannot_post(server, fresh, chromium):
    page, address = chromium.new_page(), f"{server.links[0]}/answers"
    page.goto("data:text/html,<title>elsewhere</title>")
    for how in ("mode: 'no-cors'", "headers: {'Content-Type': 'application/json'}"):
        send = f"(url) => fetch(url, {{method: 'POST', body: '{{}}', {how}}}).then((answer) => answer.ok, () => false)"
        assert page.evaluate(send, address) is False
    page.set_content(FORM.format(address))
    with page.expect_response(address) as answer: page.evaluate("document.getElementById('form').submit()")
    assert answer.value.status == 403 and "own page" in answer.value.text()
    assert not fresh.rows("SELECT * FROM answers")
    page.close()


def test_lost_connection_kill_9_and_two_windows(server, fresh, chromium):
    rater = Rater(chromium, server.links[0])
    rater.keys("12")
    rater.saved()
    rater.context.set_offline(True)
    rater.keys("3")
    rater.page.get_by_text("1 answers are kept on this device").wait_for()
    rater.context.set_offline(False)
    rater.saved()
    server.kill()
    rater.keys("21")
    rater.page.get_by_text("2 answers are kept on this device").wait_for()
    assert len(table_ratings(fresh)) == 0
    with Server():
        rater.saved()
        assert table_ratings(fresh)[list(TASK.dimensions)].values.tolist() == [[1, 2, 3, 2, 1]]
        other = rater.tab()
        rater.page.bring_to_front()
        rater.keys(["ArrowRight", "3"])
        rater.saved()
        other.get_by_text("Also open in another window").wait_for()
        other.keyboard.press("ArrowRight")
        chosen = "button[value='3'][aria-checked=true]"
        if other.locator(chosen).count() == 0: other.keyboard.press("ArrowLeft")
        assert other.locator(chosen).count() == 1
        other.close()
        assert len(fresh.rows("SELECT * FROM answers")) == 6, "nothing is counted twice"
        open_study("rated").note("closed", "yes")
        rater.keys("3")
        rater.page.get_by_text("The study is closed, thank you!").wait_for()
        assert len(fresh.rows("SELECT * FROM answers")) == 6
    rater.context.close()
