"""Sphinx settings of the site; docs/build.py writes the sources and calls Sphinx."""
import inspect, re

from fastcore.docments import docments
from sphinx.search.en import SearchEnglish

project = author = "creawrite"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["jupyter_execute"]
templates_path = ["templates"]

nb_execution_mode = "off"  # pages show executed notebooks
nb_merge_streams = True
nb_ipywidgets_js = {}  # they would come from another host
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["attrs_block", "colon_fence", "html_image"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "model_config"}
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = "creawrite"
html_static_path, html_css_files, html_js_files = ["static"], ["kit.css"], ["kit.js"]
html_copy_source = html_show_sourcelink = False
html_search_language = "bigram"
html_sidebars = {"**": ["kit-nav"]}
html_theme_options = dict(
    navbar_center=[], navbar_persistent=["search-button"], navigation_with_keys=False, secondary_sidebar_items=["page-toc"], show_toc_level=2,
    pygments_light_style="tango", pygments_dark_style="monokai", footer_start=["kit-run"], footer_end=[])

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


class Bigram(SearchEnglish):
    "English stems and Chinese bigrams, cut the same way in the index and in the browser. (Sphinx 9.0.4's own `zh` hangs every query.)"
    lang = "bigram"
    js_splitter_code = r"""
var splitQuery = (query) => (query.match(/[HAN]+|(?:(?![HAN])[\p{Letter}\p{Number}_])+/gu) || []).flatMap((word) =>
  /^[HAN]{3}/u.test(word) ? Array.from({length: word.length - 1}, (_, i) => word.slice(i, i + 2)) : [word]);
""".replace("HAN", HAN)

    def split(self, text):
        "Words of other scripts whole; of Chinese each character and each two neighbours."
        words = re.findall(rf"[{HAN}]+|[^\W{HAN}]+", text)
        return [piece for word in words for piece in ([*word, *map("".join, zip(word, word[1:]))] if re.match(f"[{HAN}]", word) else [word])]


def markdown_to_rst(line):
    "Docstrings are Markdown: code becomes literal, and what only reStructuredText would read as markup is escaped."
    parts = re.split(r"`+([^`]+)`+", line)
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([*|_\\])", r"\\\1", part) for i, part in enumerate(parts))


def restore_docments(app, what, name, obj, options, lines):
    "The comment beside each parameter becomes its description; a module's docstring stands on its page already."
    lines[:] = [] if what == "module" else map(markdown_to_rst, lines)
    if what not in ("function", "method", "class"): return
    described = {key: text for key, text in docments(obj, full=False).items() if text and key not in ("self", "cls")}
    described |= {key: field.description for key, field in getattr(obj, "model_fields", {}).items() if field.description}
    if described: lines.append("")
    lines += [f":{'returns' if key == 'return' else f'param {key}'}: {markdown_to_rst(text)}" for key, text in described.items()]


def skip_constants(app, what, name, obj, skip, options):
    "Constants are shown with their code in the notebooks."
    return skip or (what == "module" and not (inspect.isroutine(obj) or inspect.isclass(obj)))


def setup(app):
    app.add_search_language(Bigram)
    app.connect("autodoc-process-docstring", restore_docments)
    app.connect("autodoc-skip-member", skip_constants)
