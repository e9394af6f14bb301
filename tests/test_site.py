"The site of a smoke run: built without a warning, complete, the same on any machine, and looked at in a browser."
import re
import shutil
import subprocess
import sys
from functools import partial
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import nbformat
import pandas as pd
import pytest

from creawrite.core import printable, root
from creawrite.kernels import executed_copies
from creawrite.report import greetings_html, report_page
from creawrite.runner import read_record
from creawrite.settings import stages

REPOSITORY = root()
sys.path.insert(0, str(REPOSITORY / "docs"))
import api
import build

STAGES = [path.stem for path in sorted((REPOSITORY / "nbs").glob("[0-9]*.ipynb"))]
LIBRARIES = [path.stem for path in sorted((REPOSITORY / "nbs/lib").glob("*.ipynb"))]
NOTEBOOKS = STAGES + [f"lib/{name}" for name in LIBRARIES]
MODULES = [name[3:] for name in STAGES] + LIBRARIES
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


@pytest.fixture(scope="session")
def site(smoke_run) -> Path:
    "Folder of the built pages."
    command = [sys.executable, "docs/build.py", "--run", smoke_run]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return REPOSITORY / "docs/_build/html"


@pytest.fixture(scope="session")
def pages(site) -> dict[str, str]:
    "Every page's HTML by its path."
    paths = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def note_of(page: str) -> str:
    "What stands below a notebook's title, without marks."
    return re.sub(r"<[^>]+>", "", re.search(r'<p class="kit-note">.*?</p>', page, re.S)[0])


# What the build makes

def test_the_map_lists_every_notebook(pages):
    "In two tables, stages and libraries, each name a link to its page."
    names = [re.findall(r'<td[^>]*>(?:<p>)?<a [^>]*href="([\w/]+)\.html">(?:<\w+[^>]*>)*(\w+)<', table)
             for table in re.findall(r"<table.*?</table>", pages["nbs/index.html"], re.S)]
    assert names[0] == [(name, name) for name in STAGES]
    assert names[1] == [(f"lib/{name}", name) for name in LIBRARIES]


def test_the_map_says_what_every_stage_reads(pages):
    table = re.search(r"<table.*?</table>", pages["nbs/index.html"], re.S)[0]
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", table, re.S)]
    reads = dict(zip(cells[::3], cells[2::3], strict=True))
    for stage in stages(): assert reads[stage.notebook.stem] == ", ".join(map(escape, stage.reads))


def test_every_page_is_there(pages):
    names = ["index", "results", "search", "api/index", "nbs/index"]
    names += [f"nbs/{name}" for name in NOTEBOOKS] + [f"api/{name}" for name in MODULES]
    assert {f"{name}.html" for name in names} <= set(pages)
    assert all(re.search(r"<h1>\S", pages[f"{name}.html"]) for name in names if name != "search")


def test_every_module_has_a_page():
    assert {path.stem for path in (REPOSITORY / "creawrite").glob("[a-z]*.py")} == set(MODULES)


def test_sidebar_is_in_stage_order(pages):
    sidebar = re.search(r'<nav class="bd-docs-nav.*?</nav>', pages["index.html"], re.S)[0]
    assert re.findall(r'href="nbs/([\w/]+)\.html"', sidebar) == ["index", *NOTEBOOKS]
    assert re.findall(r'caption-text">([^<]+)', sidebar) == ["Start here", "Stages", "Libraries", "Reference"]


def test_notebook_pages_say_what_they_show(pages, smoke_run):
    record = read_record(smoke_run)
    for name in STAGES:
        note, engine = note_of(pages[f"nbs/{name}.html"]), record["stages"][name[3:]]["engine"]
        assert f"run {smoke_run}, profile {record['profile']}" in note
        assert not engine or f"Judged by: {engine}." in note
    for name in LIBRARIES:
        note = note_of(pages[f"nbs/lib/{name}.html"])
        assert "shown without results" in note and f"Source: nbs/lib/{name}.ipynb" in note


def test_notebook_pages_show_idea_and_code(pages):
    for name in NOTEBOOKS:
        page = pages[f"nbs/{name}.html"]
        directive = re.search(r'(?:^|<p>|class="c1?">)#\|', page, re.M)  # a string may speak of one
        assert not directive, f"{name} shows nbdev's directives"
        assert page.count('class="sig sig-object py"') >= 1 and "Show the code" in page


def test_stage_pages_show_results(pages, smoke_run):
    for name in STAGES:
        cells = nbformat.read(executed_copies(smoke_run, name[3:])[-1], 4).cells
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        results = sum(output.output_type != "stream" for output in outputs)
        assert results == 0 or "cell_output" in pages[f"nbs/{name}.html"]


def test_results_page_shows_the_run_asked_for_and_the_reference_runs(pages, smoke_run):
    runs = [path for path in (REPOSITORY / "outputs/reference").glob("*") if path.is_dir()]
    assert ("No reference run has been committed yet" in pages["results.html"]) == (not runs)
    assert all(f"<h2>{name}" in pages["results.html"] for name in [smoke_run, *(path.name for path in runs)])


def test_no_path_of_this_machine(site):
    folders = [str(path) for path in (REPOSITORY, Path.home()) if len(path.parts) > 1]
    machine = "|".join(["ipykernel_", *(rf"{re.escape(folder)}(?![\w-])" for folder in folders)])
    for path in site.rglob("*"):
        if path.suffix not in (".html", ".js", ".svg", ".css", ".txt"): continue
        assert not re.search(machine, path.read_text(encoding="utf-8")), path.relative_to(site)


def test_nothing_is_loaded_from_another_host(site, pages):
    tag = r"<(?:script|img|iframe|source|video|audio|embed|object|link)\b"
    loads = tag + r'[^>]*?\b(?:src|srcset|href|data)="(?:https?:)?//[^"]*"'
    for name, page in pages.items(): assert re.findall(loads, page) == [], name
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", text), path.name


def test_links_between_pages_lead_somewhere(site, pages):
    for name, page in pages.items():
        for link in re.findall(r'<a\b[^>]*?href="([^"#:?]+)["#?]', page):
            assert (site / name).parent.joinpath(link).exists(), f"{name}: {link}"


# Its parts

def test_an_unfinished_run_of_a_large_profile_is_not_started(monkeypatch):
    monkeypatch.setattr(build, "read_record", lambda run: {"profile": "paper", "stages": {}})
    with pytest.raises(build.KitError, match="--profile paper --run big"): build.ensure("big")


def test_progress_bars_and_colours_are_collapsed():
    assert build.clean_text("  0%|   |\r 50%|## |\r100%|###|\n\x1b[31mdone\x1b[0m\r\n") == "100%|###|\ndone\n"


@pytest.mark.parametrize("source, marks, rest", [
    ("#| export\n#| hide\nx = 1", {"export", "hide"}, "x = 1"), ("#|code-fold: true\nx", {"code-fold"}, "x"),
    ("x\n#| export", set(), "x\n#| export"), ("", set(), "")])
def test_directives(source, marks, rest): assert build.directives(source) == (marks, rest)


@pytest.mark.parametrize("before, after", [
    ("[map](nbs/index.ipynb)", "[map](nbs/index.ipynb)"), ("[notebooks](nbs/)", "[notebooks](nbs/index.ipynb)"),
    ("[tests](tests)", "tests"), ("[core](nbs/lib/core.ipynb)", "[core](nbs/lib/core.ipynb)"),
    ("[paper](https://arxiv.org/abs/2508.21476)", "[paper](https://arxiv.org/abs/2508.21476)"),
    ("```\n[tests](tests)\n```", "```\n[tests](tests)\n```"),
    ("[settings](settings.ini)", "[settings](settings.ini)"), ("[below](#below)", "[below](#below)")])
def test_links_of_text_pages(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SRC", tmp_path)
    assert build.with_files(before) == after
    assert (tmp_path / "settings.ini").exists() == ("settings" in before)


def test_names_of_own_imported_and_foreign_things():
    "Own and imported functions, and modules, lead to their entries; code and words do not."
    text = "`Judge.load`, `LLM`, `no_such_name`, [`Judge`](x)\n```\n`Judge`\n```"
    own, imported = "{py:obj}`Judge.load <creawrite.judge.Judge.load>`", "{py:obj}`LLM <creawrite.llm.LLM>`"
    linked = text.replace("`Judge.load`", own).replace("`LLM`", imported)
    assert build.link_symbols(text, "creawrite.judge") == linked
    assert build.link_symbols(text, "creawrite.no_such_module") == text
    words = "`creawrite.task`, `creawrite.judge.Judge`, `creawrite.tusk`, `creawrite`"
    assert build.link_symbols(words, "") == "{py:mod}`creawrite.task`, {py:obj}" + words.partition(", ")[2]


def test_api_entries_keep_docments():
    text = api.entries('''
async def score(
    texts: list[str],  # greetings
    *, n: int = 1,  # of each
) -> list[float]:  # in outputs/<run>/
    "Scores of `<x>` and <y>."

class Row(BaseModel):
    "A row."
    query: str = Field(description="问题")
    label: int = 0  # 0 or 1
    @classmethod
    def load(cls, path): "Read it."
    def _hidden(self): pass

def _private(): pass
''', "creawrite.data", index=False)
    for part in ("```{py:function} score(texts: list[str], *, n: int=1) -> list[float]", ":async:",
                 ":module: creawrite.data", ":no-index:", ":param texts: greetings", ":param n: of each",
                 r":returns: in outputs/\<run>/", r"Scores of `<x>` and \<y>.",
                 "````{py:class} Row(query: str, label: int = 0)", ":param query: 问题", ":param label: 0 or 1",
                 "```{py:method} load(path)", ":classmethod:"):
        assert part in text
    assert "hidden" not in text and "private" not in text


# In a browser, from disk

@pytest.fixture(scope="module")
def chromium():
    "A headless browser."
    from playwright.sync_api import sync_playwright
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield running
        running.close()


@pytest.fixture
def tab(chromium, site):
    "An empty tab; at the end, whatever it asked for must have come from the disk."
    page, asked, errors = chromium.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.address = f"file://{quote(str(site))}"
    yield page
    page.close()
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:"))] and not errors


CUT_TABLES = """[...document.querySelectorAll("article table")].filter(table => {
  const box = table.closest(".output, .pst-scrollable-table-container") || table.parentElement;
  return box.scrollWidth > box.clientWidth + 1;
}).map(table => table.textContent.slice(0, 60))"""


@browser
@pytest.mark.browser
def test_no_page_overflows(tab, pages):
    broken_images = "[...document.images].filter((image) => !image.naturalWidth).map((image) => image.src)"
    page_fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    plain = [name for name in pages if name.startswith(("api/", "nbs/lib/"))]
    for name in [name for name in pages if name not in plain or name in plain[::8]]:  # those are all of one make
        tab.goto(f"{tab.address}/{name}")
        assert tab.evaluate(broken_images) == [], name
        shown = name == "results.html" or re.match(r"nbs/\d", name)  # pages with tables of a run
        for width in (1920, 1300, 390) if shown else (1300, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate(page_fits), f"{name} at {width}"
            assert width == 390 or not shown or tab.evaluate(CUT_TABLES) == [], f"{name} at {width}"


@browser
@pytest.mark.browser
def test_the_map_leads_to_a_stage_and_a_library(tab):
    for name, heading in ((STAGES[0], "Data"), ("core", "Core")):
        tab.goto(f"{tab.address}/nbs/index.html")
        tab.locator("table").get_by_role("link", name=name, exact=True).click()
        tab.locator("h1").filter(has_text=heading).wait_for(state="visible")


@browser
@pytest.mark.browser
def test_a_wide_table_scrolls_in_its_own_box(tab):
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.goto(f"{tab.address}/nbs/index.html")
    box = tab.locator("table").first.locator("xpath=..")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX == 'auto'")


@browser
@pytest.mark.browser
@pytest.mark.parametrize("words, hits", [
    ("祝福语", True), ("生日", True), ("祝", True), ("preference pairs", True), ("wilson", True), ("GRPO 祝福", True),
    ("鼯鼠滑翔", False)])
def test_search(tab, words, hits):
    tab.goto(f"{tab.address}/search.html?q={quote(words)}")
    tab.wait_for_function("/^Search Results$/.test(document.querySelector('#search-results h2')?.innerText)")
    assert (tab.locator("#search-results li a").count() > 0) == hits


@browser
@pytest.mark.browser
@pytest.mark.parametrize("over", ["file", "http"])
@pytest.mark.parametrize("words", ["祝福语", "preference pairs"])
def test_search_shows_where_a_phrase_stands(chromium, site, over, words):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}" if over == "http" else f"file://{quote(str(site))}"
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{here}/search.html?q={quote(words)}")
    page.wait_for_function("/^Search Results$/.test(document.querySelector('#search-results h2')?.innerText)")
    first = page.locator("#search-results li").first
    first.locator("p.context, .context").first.wait_for(state="visible", timeout=10_000)
    assert words.split()[0] in first.inner_text().lower()
    assert all(url.startswith((here, "data:", "file:")) for url in asked)
    page.close()
    server.shutdown()


@browser
@pytest.mark.browser
def test_search_button_leads_to_a_page(tab):
    tab.goto(f"{tab.address}/nbs/02_audit.html")
    tab.locator("button.search-button__button:visible").first.click()
    tab.locator("input[name=q]:visible").first.fill("length_matched")
    tab.keyboard.press("Enter")
    tab.locator("#search-results li a").first.click()
    tab.wait_for_url(lambda url: "/search.html" not in url)
    tab.locator("h1").first.wait_for(state="visible")


@browser
@pytest.mark.browser
def test_dark_mode(tab):
    background = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.goto(f"{tab.address}/index.html")
    light = background()
    tab.locator("button.theme-switch-button:visible").first.click()
    tab.locator("[data-mode=dark]:visible").last.click()
    tab.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert background() != light
    tab.goto(f"{tab.address}/nbs/{STAGES[0]}.html")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


@browser
@pytest.mark.browser
@pytest.mark.parametrize("name, begins", [("02_audit", "def table_overlap"), ("lib/stats", "def wilson")])
def test_folded_code_opens(tab, name, begins):
    tab.goto(f"{tab.address}/nbs/{name}.html")
    code = tab.locator("details.hide pre").first
    assert not code.is_visible()
    tab.locator("details.hide summary").first.click()
    code.wait_for(state="visible")
    assert begins in code.inner_text()


@browser
@pytest.mark.parametrize("name", ["report", "further"])
def test_report_fits_every_screen(chromium, smoke_run, name):
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((REPOSITORY / "outputs" / smoke_run / "paper" / f"{name}.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    cut = "[...document.querySelectorAll('.wide')].filter(part => part.scrollWidth > part.clientWidth + 1).length"
    for width in (1300, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(cut) == 0, f"a table is cut at {width} pixels"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert len(asked) == 1, asked
    page.close()


@browser
def test_texts_do_nothing_to_the_report(chromium, tmp_path):
    bad = ["<img src=x onerror=alert(1)>", "\u202e倒着写\x1b[31m", "</td></table><h1>大</h1>", "$\\input{x}$ & _%"]
    said = {"policy": "sft", "sample": 0, "signal1": 1, "signal2": 0, "reward_model": 0.0}
    rows = [said | {"prompt_id": f"p{i}", "query": text, "text": text} for i, text in enumerate(bad)]
    path = tmp_path / "report.html"
    path.write_text(report_page("bad", "nobody", greetings_html(pd.DataFrame(rows), True)), encoding="utf-8")
    page = chromium.new_page()
    page.on("dialog", lambda dialog: pytest.fail("a greeting was run"))
    page.goto(path.as_uri())
    cells = page.locator("bdi").all_text_contents()
    assert cells == [printable(text) for text in bad for _ in range(2)]
    assert page.locator("h1").count() == 1 and page.locator("img").count() == 0
    page.close()
