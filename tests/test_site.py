"The site of a smoke run: built without a warning, complete, the same on any machine, and looked at in a browser."
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest

from creawrite.runs import read_record, root, run_dir

REPOSITORY = root()
sys.path.insert(0, str(REPOSITORY / "docs"))
import api
import build

NOTEBOOKS = [path.stem for path in sorted((REPOSITORY / "nbs").glob("[0-9]*.ipynb"))]
STAGES = [name for name in NOTEBOOKS if not name.startswith("00_")]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


@pytest.fixture(scope="session")
def site(smoke_run) -> Path:
    "Folder of the built pages."
    done = subprocess.run([sys.executable, "docs/build.py", "--run", smoke_run], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return REPOSITORY / "docs/_build/html"


@pytest.fixture(scope="session")
def pages(site) -> dict[str, str]:
    "Every page's HTML by its path."
    found = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in found}


# What the build makes

def test_the_map_lists_every_notebook():
    text = "".join(cell.source for cell in nbformat.read(REPOSITORY / "nbs/index.ipynb", 4).cells)
    assert re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", text, re.M) == NOTEBOOKS


def test_every_page_is_there(pages):
    modules = [name[3:] for name in NOTEBOOKS if (REPOSITORY / "creawrite" / f"{name[3:]}.py").is_file()]
    wanted = ["index", "results", "search", "api/index", "nbs/index", *(f"nbs/{name}" for name in NOTEBOOKS), *(f"api/{name}" for name in modules)]
    assert {f"{name}.html" for name in wanted} <= set(pages)
    assert all(re.search(r"<h1>\S", pages[f"{name}.html"]) for name in wanted if name != "search")


def test_sidebar_is_in_stage_order(pages):
    sidebar = re.search(r'<nav class="bd-docs-nav.*?</nav>', pages["index.html"], re.S)[0]
    assert re.findall(r'href="nbs/(\w+)\.html"', sidebar) == ["index", *NOTEBOOKS]
    assert re.findall(r'caption-text">([^<]+)', sidebar) == ["Start here", "Notebooks", "Reference"]


def test_notebook_pages_say_what_they_show(pages, smoke_run):
    record = read_record(smoke_run)
    for name in STAGES:
        note = re.sub(r"<[^>]+>", "", re.search(r'<p class="kit-note">.*?</p>', pages[f"nbs/{name}.html"], re.S)[0])
        engine = record["stages"][name[3:]]["engine"]
        assert f"run {smoke_run}, profile {record['profile']}" in note and (not engine or f"Judged by: {engine}." in note)


def test_notebook_pages_show_idea_code_and_result(pages, smoke_run):
    for name in STAGES:
        page, cells = pages[f"nbs/{name}.html"], nbformat.read(run_dir(smoke_run) / f"{name}.ipynb", 4).cells
        assert "default_exp" not in page and "#|" not in page
        assert page.count('class="sig sig-object py"') >= 1 and "Show the code" in page
        results = sum(output.output_type != "stream" for cell in cells if cell.cell_type == "code" for output in cell.outputs)
        assert results == 0 or "cell_output" in page


def test_results_page_shows_reference_runs_or_says_there_are_none(pages):
    runs = [path for path in (REPOSITORY / "outputs/reference").glob("*") if path.is_dir()]
    assert ("No reference run has been committed yet" in pages["results.html"]) == (not runs)
    assert all(f"<h2>{path.name}" in pages["results.html"] for path in runs)


def test_no_path_of_this_machine(site):
    folders = [str(path) for path in (REPOSITORY, Path.home()) if len(path.parts) > 1]
    for path in site.rglob("*"):
        if path.suffix not in (".html", ".js", ".svg", ".css", ".txt"): continue
        text = path.read_text(encoding="utf-8")
        assert not re.search("ipykernel_|" + "|".join(rf"{re.escape(folder)}(?![\w-])" for folder in folders), text), path.relative_to(site)


def test_nothing_is_loaded_from_another_host(site, pages):
    loaded = r'<(?:script|img|iframe|source|video|audio|embed|object|link)\b[^>]*?\b(?:src|srcset|href|data)="(?:https?:)?//[^"]*"'
    assert {name: found for name, page in pages.items() if (found := re.findall(loaded, page))} == {}
    for path in site.rglob("*.css"): assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_links_between_pages_lead_somewhere(site, pages):
    for name, page in pages.items():
        for link in re.findall(r'<a\b[^>]*?href="([^"#:?]+)["#?]', page): assert (site / name).parent.joinpath(link).exists(), f"{name}: {link}"


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
    ("[map](nbs/index.ipynb)", "[map](nbs/index.ipynb)"), ("[notebooks](nbs/)", "[notebooks](nbs/index.ipynb)"), ("[tests](tests)", "tests"),
    ("[paper](https://arxiv.org/abs/2508.21476)", "[paper](https://arxiv.org/abs/2508.21476)"),
    ("```\n[tests](tests)\n```", "```\n[tests](tests)\n```"),
    ("[settings](settings.ini)", "[settings](settings.ini)"), ("[below](#below)", "[below](#below)")])
def test_links_of_text_pages(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SRC", tmp_path)
    assert build.with_files(before) == after
    assert (tmp_path / "settings.ini").exists() == ("settings" in before)


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
    for part in ("```{py:function} score(texts: list[str], *, n: int=1) -> list[float]", ":async:", ":module: creawrite.data", ":no-index:",
                 ":param texts: greetings", ":param n: of each", r":returns: in outputs/\<run>/", r"Scores of `<x>` and \<y>.",
                 "````{py:class} Row(query: str, label: int = 0)", ":param query: 问题", ":param label: 0 or 1",
                 "```{py:method} load(path)", ":classmethod:"):
        assert part in text
    assert "hidden" not in text and "private" not in text


# In a browser, from disk

@pytest.fixture(scope="module")
def chromium():
    "A headless browser."
    from playwright.sync_api import sync_playwright
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
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


@browser
@pytest.mark.browser
def test_no_page_overflows(tab, pages):
    for name in pages:
        tab.goto(f"{tab.address}/{name}")
        assert tab.evaluate("[...document.images].filter((image) => !image.naturalWidth).map((image) => image.src)") == [], name
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), f"{name} at {width}"


@browser
@pytest.mark.browser
@pytest.mark.parametrize("words, hits", [
    ("祝福语", True), ("生日", True), ("祝", True), ("preference pairs", True), ("wilson", True), ("GRPO 祝福", True), ("鼯鼠滑翔", False)])
def test_search(tab, words, hits):
    tab.goto(f"{tab.address}/search.html?q={quote(words)}")
    tab.wait_for_function("/^Search Results$/.test(document.querySelector('#search-results h2')?.innerText)")
    assert (tab.locator("#search-results li a").count() > 0) == hits


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
def test_folded_code_opens(tab):
    tab.goto(f"{tab.address}/nbs/02_audit.html")
    code = tab.locator("details.hide pre").first
    assert not code.is_visible()
    tab.locator("details.hide summary").first.click()
    code.wait_for(state="visible")
    assert "def wilson" in code.inner_text()
