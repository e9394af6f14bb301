"""Sphinx settings of the site; docs/build.py writes the sources and calls Sphinx."""
import json, re
from pathlib import Path

from bs4 import BeautifulSoup
from sphinx.search.en import SearchEnglish

project = author = "creawrite"
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["jupyter_execute"]
templates_path = ["templates"]
highlight_language = "none"  # of README's unmarked blocks

nb_execution_mode = "off"  # pages show executed notebooks
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables and links of what a cell displays
nb_ipywidgets_js = {}  # they would come from another host
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["attrs_block", "colon_fence", "fieldlist", "html_image"]
myst_heading_anchors = 4

python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = "creawrite"
html_static_path, html_css_files, html_js_files = ["static"], ["kit.css"], ["kit.js"]
html_copy_source = html_show_sourcelink = html_domain_indices = False
html_search_language = "bigram"
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["kit-nav"]}
html_theme_options = dict(
    navbar_center=[], navbar_persistent=["search-button"], navigation_with_keys=False,
    secondary_sidebar_items=["page-toc"], show_toc_level=2,
    pygments_light_style="tango", pygments_dark_style="monokai", footer_start=["kit-run"], footer_end=[])

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


class Bigram(SearchEnglish):
    """English stems and Chinese bigrams, cut the same way in the index and in the browser.
    (Sphinx 9.0.4's own `zh` hangs every query.)"""
    lang = "bigram"
    js_splitter_code = r"""
var wordsOf = (query) => query.match(/[HAN]+|(?:(?![HAN])[\p{Letter}\p{Number}_])+/gu) || [];
var bigramsOf = (word) => Array.from({length: word.length - 1}, (_, i) => word.slice(i, i + 2));
var splitQuery = (query) => wordsOf(query).flatMap((word) => /^[HAN]{3}/u.test(word) ? bigramsOf(word) : [word]);
""".replace("HAN", HAN)

    def split(self, text):
        "Words of other scripts whole; of Chinese each character and each two neighbours."
        pieces = []
        for word in re.findall(rf"[{HAN}]+|[^\W{HAN}]+", text):
            chinese = re.match(f"[{HAN}]", word)
            pieces += [*word, *map("".join, zip(word, word[1:]))] if chinese else [word]
        return pieces


def write_texts(app, error):
    "The text of every page, for search excerpts where the site is opened from disk (static/kit.js)."
    if error: return
    out, texts = Path(app.outdir), {}
    for path in sorted(out.rglob("*.html")):
        main = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").find("article")
        if main: texts[path.relative_to(out).as_posix()] = " ".join(main.get_text(" ").split())
    (out / "_static" / "texts.js").write_text(f"window.pageTexts = {json.dumps(texts, ensure_ascii=False)};\n", "utf-8")


def setup(app):
    app.add_search_language(Bigram)
    app.connect("build-finished", write_texts)
