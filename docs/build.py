"""Build the site from the executed notebooks of a run: python docs/build.py [--run NAME] makes docs/_build/html/index.html.

The sources of the pages go to docs/_src, laid out like the repository, so that links between README, notebooks and files work as they are.
"""
import argparse, ast, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, papermill
from nbformat.v4 import new_markdown_cell, new_notebook
from sphinx.cmd.build import main as sphinx

from api import entries, public
from creawrite.runs import KitError, clean, duration, read_json, read_record, root, run_dir, stages

ROOT = root()
SRC, BUILD = ROOT / "docs" / "_src", ROOT / "docs" / "_build"
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
CELL_FILE = re.compile(r"[\w/.~-]*ipykernel_\d+/\d+\.py")  # what a warning calls the cell
FENCE = re.compile(r"^(```.*?^```)", re.M | re.S)
LINK = re.compile(r'(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)|src="(?P<source>[^":]+)"')
FOLDERS = {"nbs": "nbs/index.ipynb", "outputs/reference": "results.md", "creawrite": "api/index.md"}  # where a link to a folder leads


# The run

def ensure(run: str) -> dict:
    "The record of a finished run; where there is none yet, a smoke run is made. Raises KitError."
    finished = lambda record: all(record["stages"].get(stage.name, {}).get("status") == "done" for stage in stages())
    record = read_record(run)
    if finished(record): return record
    command = ["run", "--profile", record.get("profile", "smoke"), "--run", run]
    if command[2] != "smoke": raise KitError(f"run {run} is not finished: finish it with .venv/bin/creawrite {' '.join(command)}")
    print(f"run {run} is not finished, so it goes first (about 4 minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "creawrite.runs", *command], cwd=ROOT)
    record = read_record(run)
    if not finished(record): raise KitError(f"run {run} did not finish, so there is nothing to show: mend what it says above, then call this again")
    return record


def engines(record: dict) -> str:
    "What judged in a run, for captions."
    return ", ".join(sorted({stage["engine"] for stage in record["stages"].values() if stage.get("engine")}))


# Notebooks

def numbered() -> list[Path]:
    "The notebooks in stage order, the runner's own first."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def directives(source: str) -> tuple[set[str], str]:
    "nbdev's directives of a cell, and its source without them."
    lines = source.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return {line[2:].split()[0].rstrip(":") for line in lines[:end]}, "\n".join(lines[end:]).strip()


def clean_text(text: str) -> str:
    "Output without terminal codes, with progress bars in their last state."
    return CELL_FILE.sub("<cell>", "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in ANSI.sub("", text).split("\n")))


def clean_output(output):
    "An output of a cell, fit to show."
    if output.output_type == "stream": output.text = clean_text(output.text)
    return nbformat.from_dict(clean(output))


def shown(cell, module: str) -> list:
    "What a page shows of a cell: nothing, the cell itself, or API entries with the code folded below them."
    marks, cell.source = directives(cell.source)
    if marks & {"hide", "default_exp"} or not cell.source: return []
    if cell.cell_type == "markdown": return [new_markdown_cell(with_files(link_symbols(cell.source, module), "nbs"))]
    if "export" in marks and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body): return []
    api_entries = entries(cell.source, module, index=False) if "export" in marks else ""
    if "injected-parameters" in cell.metadata.get("tags", []): cell.source = cell.source.replace("# Parameters", "# as this run set them")
    cell.outputs = [clean_output(output) for output in cell.outputs]
    cell.metadata = {"tags": ["hide-input"] if api_entries or "code-fold" in marks else []}
    return [new_markdown_cell(api_entries), cell] if api_entries else [cell]


def outside_code(markdown: str, change) -> str:
    "Markdown with `change` applied to everything but fenced code."
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(markdown)))


def link_symbols(markdown: str, module: str) -> str:
    "Names of the notebook's own functions and classes lead to their API entries."
    path = ROOT / (module.replace(".", "/") + ".py")
    names = "|".join(node.name for node in public(path.read_text(encoding="utf-8"))) if path.is_file() else ""
    return outside_code(markdown, lambda text: re.sub(rf"(?<!\[)`({names})`", rf"{{py:obj}}`\1 <{module}.\1>`", text)) if names else markdown


def page(notebook: Path, note: str) -> str:
    "A notebook as a page, with a note below its title that says where its results come from."
    cells = nbformat.read(notebook, 4).cells
    name = next((cell.source.split()[-1] for cell in cells if cell.source.startswith("#| default_exp")), "")
    title, *rest = [piece for cell in cells for piece in shown(cell, f"creawrite.{name}")]
    about = new_markdown_cell(f"{{.kit-note}}\n{note}")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.writes(new_notebook(cells=[title, about, *rest], metadata={"kernelspec": kernel}))


def notebooks(run: str, record: dict) -> list[str]:
    "All notebook pages; their entries for the sidebar."
    sidebar = []
    for path in numbered():
        facts, note = record["stages"].get(path.stem[3:]), "Not a stage of a run, so shown without results."
        if facts: note = f"Executed in run `{run}`, profile {record['profile']}, in {duration(facts['seconds'])}."
        if facts and facts["engine"]: note += f" Judged by: {facts['engine']}."
        write(f"nbs/{path.name}", page(run_dir(run) / path.name if facts else path, note + f" Source: `nbs/{path.name}`."))
        title = nbformat.read(path, 4).cells[0].source.splitlines()[0].lstrip("# ")
        sidebar.append(f"{path.stem[:2]} {title} <nbs/{path.stem}>")
    return sidebar


def map_page(run: str, record: dict):
    "The index notebook, executed for this run."
    copy = BUILD / "index.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(ROOT / "nbs" / "index.ipynb", copy, {"run": run}, cwd=ROOT, progress_bar=False, extra_arguments=["--log-level=50"])
    write("nbs/index.ipynb", page(copy, f"Shows run `{run}`, profile {record['profile']}. Judged by: {engines(record)}. Source: `nbs/index.ipynb`."))


# Pages of text

def write(path: str, content: str | bytes):
    "A source file of the site."
    (SRC / path).parent.mkdir(parents=True, exist_ok=True)
    (SRC / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def copy_file(path: str):
    "A file of the repository, at the same place in docs/_src; Markdown becomes a page."
    if (SRC / path).exists(): return
    write(path, (ROOT / path).read_bytes())
    if path.endswith(".md"): write(path, "---\norphan: true\n---\n" + with_files((SRC / path).read_text(encoding="utf-8"), os.path.dirname(path)))


def with_files(markdown: str, folder: str = "") -> str:
    "Markdown whose relative links work in docs/_src: linked files are copied there, a link to a folder leads to the page that shows it."
    def mend(link):
        path = os.path.normpath(os.path.join(folder, link["target"] or link["source"]))
        if (ROOT / path).is_file() and not path.endswith(".ipynb"): copy_file(path)
        if not (ROOT / path).is_dir(): return link[0]
        if (ROOT / path / "README.md").is_file(): copy_file(f"{path}/README.md")
        elif path not in FOLDERS: return link["text"]
        return f"[{link['text']}]({os.path.relpath(FOLDERS.get(path, f'{path}/README.md'), folder or '.')})"
    return outside_code(markdown, lambda text: LINK.sub(mend, text))


def toctree(caption: str, pages: list[str]) -> str:
    "A section of the sidebar."
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def home(sidebar: list[str]):
    "README.md, with the sidebar of the whole site."
    parts = {"Start here": ["Home <self>", "Map of the kit <nbs/index>"], "Notebooks": sidebar, "Reference": ["Results <results>", "API <api/index>"]}
    readme = with_files((ROOT / "README.md").read_text(encoding="utf-8"))
    write("index.md", readme + "".join(toctree(caption, pages) for caption, pages in parts.items()))


def summary(record: dict) -> str:
    "What run.json says about a run, in a table."
    hardware, packages, git = record["hardware"], record["packages"], record["git"] or {"commit": None}
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "trl", "peft", "vllm") if name in packages]
    times = {name: stage["seconds"] for name, stage in record["stages"].items() if "seconds" in stage}
    rows = {
        "Profile": record["profile"],
        "Judged by": engines(record),
        "Hardware": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB" + "".join(f"; {gpu}" for gpu in hardware["gpus"]),
        "Versions": ", ".join([f"Python {record['python']}", *versions]),
        "Kit": f"commit {git['commit'][:10]}{', with changes' if git['dirty'] else ''}" if git["commit"] else "no commit known",
        "Seeds": ", ".join(sorted({str(seed) for seed in record["seeds"].values()})),
        "Stages": ", ".join(f"{name} {duration(seconds)}" for name, seconds in times.items()),
        "In all": duration(sum(times.values()))}
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def reference(folder: Path) -> str:
    "A reference run: its record, and its report in the paper's order."
    place = (folder / "paper").relative_to(ROOT).as_posix()
    report = re.sub(r"!\[([^\]]*)\]\(([^)]+)\)", lambda found: f"![{found[1]}]({os.path.normpath(os.path.join(place, found[2]))})", (ROOT / place / "report.md").read_text(encoding="utf-8"))
    story = re.sub(r"^## ", "### ", report.partition("\n")[2], flags=re.M).replace("\n\n|", "\n\n{.kit-wide}\n|")
    return "\n\n".join([f"## {folder.name}", summary(read_json(folder / "run.json")), story])


def results():
    "The committed tables and figures of our own reference runs."
    runs = sorted(path for path in (ROOT / "outputs" / "reference").glob("*") if path.is_dir())
    intro = "Tables and figures of our own runs, as committed under `outputs/reference/`, in the paper's order. Each caption names the engine that judged."
    write("results.md", with_files("\n\n".join(["# Results", intro if runs else "No reference run has been committed yet.", *map(reference, runs)])))


def api():
    "One page per module: its docstring, then every public function and class."
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "creawrite").glob("[a-z]*.py")}
    modules = {name: ast.get_docstring(ast.parse(source)) or "" for name, source in sources.items()}
    pages = {path.stem[3:]: path for path in numbered() if path.stem[3:] in modules}
    for name, path in pages.items():
        text = f"# creawrite.{name}\n\n{with_files(modules[name], 'nbs')}\n\nDefined in [{path.name}](../nbs/{path.name}).\n\n"
        write(f"api/{name}.md", text + entries(sources[name], f"creawrite.{name}", index=True) + "\n")
    rows = [f"| [creawrite.{name}]({name}.md) | {modules[name].partition(chr(10))[0]} |" for name in pages]
    tree = toctree("Modules", [f"creawrite.{name} <{name}>" for name in pages])
    write("api/index.md", "\n".join(["# API", "", "| module | |", "|---|---|", *rows, tree]))


def build(run: str) -> int:
    "The whole site; the exit status of Sphinx, for which a warning is an error."
    record = ensure(run)
    for folder in (SRC, BUILD): shutil.rmtree(folder, ignore_errors=True)
    home(notebooks(run, record))
    map_page(run, record)
    results()
    api()
    shown_run = f"The notebook pages show run {run}, profile {record['profile']}. Judged by: {engines(record)}."
    places = ["-c", str(ROOT / "docs"), "-d", str(BUILD / "doctrees"), str(SRC), str(BUILD / "html")]
    status = sphinx(["-q", "-W", "--keep-going", "-A", f"shown_run={shown_run}", *places])
    if not status: print(f"the site of run {run} is at docs/_build/html/index.html")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="smoke", help="name of the run to show, outputs/NAME/; made as a smoke run where it is missing")
    try: sys.exit(build(parser.parse_args().run))
    except KitError as error: sys.exit(f"error: {error}")
