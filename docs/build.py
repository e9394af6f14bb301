"""Build the site from a run's executed notebooks: python docs/build.py [--run NAME] makes docs/_build/html/index.html.

The sources of the pages go to docs/_src, laid out like the repository, so that links between README, notebooks and
files work as they are.
"""
import argparse, ast, os, re, shutil, subprocess, sys
from functools import cache
from pathlib import Path

import nbformat, pandas as pd, papermill
from nbformat.v4 import new_markdown_cell, new_notebook
from sphinx.cmd.build import main as sphinx

from api import entries, public
from creawrite.core import KitError, duration, read_json, root
from creawrite.kernels import clean, executed_copies
from creawrite.runner import read_record
from creawrite.settings import stages

ROOT = root()
SRC, BUILD = ROOT / "docs" / "_src", ROOT / "docs" / "_build"
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
CELL_FILE = re.compile(r"[\w/.~-]*ipykernel_\d+/\d+\.py")  # what a warning calls the cell
FENCE = re.compile(r"^(```.*?^```)", re.M | re.S)
LINK = re.compile(r'(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)'
                  r'|src="(?P<source>[^":]+)"')
# where a link to a folder leads
FOLDERS = {"nbs": "nbs/index.ipynb", "outputs/reference": "results.md", "creawrite": "api/index.md"}


# The run

def ensure(run: str) -> dict:
    "The record of a finished run; where there is none yet, a smoke run is made. Raises KitError."
    record = read_record(run)
    if finished(record): return record
    command = ["run", "--profile", record.get("profile", "smoke"), "--run", run]
    if command[2] != "smoke":
        raise KitError(f"run {run} is not finished: finish it with .venv/bin/creawrite {' '.join(command)}")
    print(f"run {run} is not finished, so it goes first (about 4 minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "creawrite.cli", *command], cwd=ROOT)
    record = read_record(run)
    if not finished(record):
        raise KitError(f"run {run} did not finish, so there is nothing to show: "
                       "mend what it says above, then call this again")
    return record


def finished(record: dict) -> bool:
    "Whether every stage of today's kit is done."
    return all(record["stages"].get(stage.name, {}).get("status") == "done" for stage in stages())


def engines(record: dict) -> str:
    "What judged in a run, for captions."
    return ", ".join(sorted({stage["engine"] for stage in record["stages"].values() if stage.get("engine")}))


# Notebooks

def numbered() -> list[Path]:
    "The stages' notebooks in order."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def libraries() -> list[Path]:
    "The libraries' notebooks."
    return sorted((ROOT / "nbs" / "lib").glob("*.ipynb"))


def title_of(path: Path) -> str:
    "The first line of a notebook."
    return nbformat.read(path, 4).cells[0].source.splitlines()[0].lstrip("# ")


def directives(source: str) -> tuple[set[str], str]:
    "nbdev's directives of a cell, and its source without them."
    lines = source.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return {line[2:].split()[0].rstrip(":") for line in lines[:end]}, "\n".join(lines[end:]).strip()


def clean_text(text: str) -> str:
    "Output without terminal codes, with progress bars in their last state."
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in ANSI.sub("", text).split("\n")]
    return CELL_FILE.sub("<cell>", "\n".join(lines))


def clean_output(output):
    "An output of a cell, fit to show."
    if output.output_type == "stream": output.text = clean_text(output.text)
    return nbformat.from_dict(clean(output))


def shown(cell, module: str, folder: str) -> list:
    "What a page shows of a cell: nothing, the cell itself, or API entries with the code folded below them."
    marks, cell.source = directives(cell.source)
    if marks & {"hide", "default_exp"} or not cell.source: return []
    if cell.cell_type == "markdown": return [new_markdown_cell(with_files(link_symbols(cell.source, module), folder))]
    if "export" in marks and only_imports(cell.source): return []
    api_entries = entries(cell.source, module, index=False) if "export" in marks else ""
    if "injected-parameters" in cell.metadata.get("tags", []):
        cell.source = cell.source.replace("# Parameters", "# as this run set them")
    cell.outputs = [clean_output(output) for output in cell.outputs]
    cell.metadata = {"tags": ["hide-input"] if api_entries or "code-fold" in marks else []}
    return [new_markdown_cell(api_entries), cell] if api_entries else [cell]


def only_imports(source: str) -> bool:
    "Whether a cell does nothing but import."
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def outside_code(markdown: str, change) -> str:
    "Markdown with `change` applied to everything but fenced code."
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(markdown)))


@cache
def module_source(module: str) -> str:  # "" for none
    "The source of creawrite.data or another module."
    package, _, name = module.partition(".")
    path = ROOT / package / f"{name}.py"
    return path.read_text(encoding="utf-8") if package == "creawrite" and path.is_file() else ""


@cache
def symbols(module: str) -> dict[str, str]:
    "Functions and classes that a module defines or takes from another one of ours: name -> module that defines it."
    homes = {}
    for node in ast.parse(module_source(module)).body:
        if not isinstance(node, ast.ImportFrom): continue
        home = f"creawrite.{node.module}" if node.level else node.module
        names = {each.name for each in public(module_source(home))}
        homes |= {alias.name: home for alias in node.names if alias.name in names}
    return homes | {node.name: module for node in public(module_source(module))}


def link_symbols(markdown: str, module: str) -> str:
    "Modules, and functions and classes that the notebook defines or imports, lead to their API entries."
    homes = symbols(module)

    def link(match) -> str:
        name, home = match[1], homes.get(match[1].partition(".")[0])
        if module_source(name): return f"{{py:mod}}`{name}`"
        if module_source(name.rpartition(".")[0]): return f"{{py:obj}}`{name}`"
        return f"{{py:obj}}`{name} <{home}.{name}>`" if home else match[0]
    return outside_code(markdown, lambda text: re.sub(r"(?<!\[)`([\w.]+)`", link, text))


def page(notebook: Path, note: str, folder: str = "nbs") -> str:
    "A notebook as a page, with a note below its title that says where its results come from."
    cells = nbformat.read(notebook, 4).cells
    name = next((cell.source.split()[-1] for cell in cells if cell.source.startswith("#| default_exp")), "")
    title, *rest = [piece for cell in cells for piece in shown(cell, f"creawrite.{name}", folder)]
    about = new_markdown_cell(f"{{.kit-note}}\n{note}")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.writes(new_notebook(cells=[title, about, *rest], metadata={"kernelspec": kernel}))


def stage_pages(run: str, record: dict) -> list[str]:
    "The stages' pages; their entries for the sidebar."
    sidebar = []
    for path in numbered():
        name = path.stem[3:]
        facts = record["stages"][name]
        note = f"Executed in run `{run}`, profile {record['profile']}, in {duration(facts['seconds'])}."
        if facts["engine"]: note += f" Judged by: {facts['engine']}."
        write(f"nbs/{path.name}", page(executed_copies(run, name)[-1], note + f" Source: `nbs/{path.name}`."))
        sidebar.append(f"{path.stem[:2]} {title_of(path)} <nbs/{path.stem}>")
    return sidebar


def library_pages() -> list[str]:
    "The libraries' pages; their entries for the sidebar."
    sidebar = []
    for path in libraries():
        note = f"A library that stages stand on, shown without results. Source: `nbs/lib/{path.name}`."
        write(f"nbs/lib/{path.name}", page(path, note, "nbs/lib"))
        sidebar.append(f"{path.stem} <nbs/lib/{path.stem}>")
    return sidebar


def map_page(run: str, record: dict):
    "The index notebook, executed for this run."
    copy = BUILD / "index.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(ROOT / "nbs" / "index.ipynb", copy, {"run": run}, cwd=ROOT, progress_bar=False,
                               extra_arguments=["--log-level=50"])
    about = f"Shows run `{run}`, profile {record['profile']}. Judged by: {engines(record)}."
    copy_file("docs/static/map.svg")
    write("nbs/index.ipynb", page(copy, f"{about} Source: `nbs/index.ipynb`."))


# Pages of text

def write(path: str, content: str | bytes):
    "A source file of the site."
    (SRC / path).parent.mkdir(parents=True, exist_ok=True)
    (SRC / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def copy_file(path: str):
    "A file of the repository, at the same place in docs/_src; Markdown becomes a page."
    if (SRC / path).exists(): return
    write(path, (ROOT / path).read_bytes())
    if not path.endswith(".md"): return
    text = with_files((SRC / path).read_text(encoding="utf-8"), os.path.dirname(path))
    write(path, f"---\norphan: true\n---\n{text}")


def with_files(markdown: str, folder: str = "") -> str:
    "Markdown whose relative links work in docs/_src: linked files go there; a folder's link leads to the page for it."
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


def home(of_stages: list[str], of_libraries: list[str]):
    "README.md, with the sidebar of the whole site."
    parts = {"Start here": ["Home <self>", "Map of the kit <nbs/index>"], "Stages": of_stages,
             "Libraries": of_libraries, "Reference": ["Results <results>", "API <api/index>"]}
    readme = with_files((ROOT / "README.md").read_text(encoding="utf-8"))
    write("index.md", readme + "".join(toctree(caption, pages) for caption, pages in parts.items()))


def summary(record: dict) -> str:
    "What run.json says about a run, in a table."
    hardware, packages, git = record["hardware"], record["packages"], record["git"] or {"commit": None}
    shown_packages = [name for name in ("torch", "transformers", "trl", "peft", "vllm") if name in packages]
    versions = [f"{name} {packages[name]}" for name in shown_packages]
    times = {name: stage["seconds"] for name, stage in record["stages"].items() if "seconds" in stage}
    rows = {
        "Profile": record["profile"],
        "Judged by": engines(record),
        "Hardware": "; ".join([f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB",
                               *hardware["gpus"]]),
        "Versions": ", ".join([f"Python {record['python']}", *versions]),
        "Kit": f"commit {git['commit'][:10]}{', with changes' * git['dirty']}" if git["commit"] else "no commit known",
        "Seeds": ", ".join(sorted({str(seed) for seed in record["seeds"].values()})),
        "Stages": ", ".join(f"{name} {duration(seconds)}" for name, seconds in times.items()),
        "In all": duration(sum(times.values()))}
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def laboratory(folder: Path) -> str:
    "What the hacking report found of the planted faults."
    counts, place = read_json(folder / "laboratory.json"), folder.relative_to(ROOT).as_posix()
    table = pd.read_csv(folder / "laboratory.csv").drop(columns=["finding", "rank"]).astype(object)
    shown = table.map(lambda cell: "" if pd.isna(cell) else f"{cell:.3g}" if isinstance(cell, float) else str(cell))
    told = (f"{counts['found']} of {counts['biased']} planted faults are found, {counts['within']} within 3 updates of "
            f"gold's fall; of {counts['clean']} trainings without a fault {counts['alarms']} raise an alarm.")
    rows = [shown.columns, ["---"] * len(shown.columns), *shown.to_numpy()]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{told}\n\n![figure_laboratory]({place}/figure_laboratory.png)\n\n{{.kit-wide}}\n{lines}"


def reference(folder: Path) -> str:
    "A reference run: its record, and its report in the paper's order, or what the laboratory shows."
    return "\n\n".join([f"## {folder.name}", summary(read_json(folder / "run.json")), story(folder)])


def story(folder: Path) -> str:
    "What a reference run shows."
    if not (folder / "paper").is_dir(): return laboratory(folder / "laboratory")
    place = (folder / "paper").relative_to(ROOT).as_posix()
    moved = lambda image: f"![{image[1]}]({os.path.normpath(os.path.join(place, image[2]))})"
    report = (ROOT / place / "report.md").read_text(encoding="utf-8")
    report = re.sub(r"!\[([^\]]*)\]\(([^)]+)\)", moved, report)
    return re.sub(r"^## ", "### ", report.partition("\n")[2], flags=re.M).replace("\n\n|", "\n\n{.kit-wide}\n|")


def results(asked: str):
    "The run that was asked for, and the committed tables and figures of our own reference runs."
    runs = sorted(path for path in (ROOT / "outputs" / "reference").glob("*") if path.is_dir())
    intro = ("Tables and figures of our own runs, as committed under `outputs/reference/`, in the paper's order. "
             "Each caption names the engine that judged.")
    if not runs: intro = "No reference run has been committed yet."
    own = ROOT / "outputs" / asked
    shown = [own, *runs] if asked and ((own / "paper").is_dir() or (own / "laboratory").is_dir()) else runs
    write("results.md", with_files("\n\n".join(["# Results", intro, *map(reference, shown)])))


def api():
    "One page per module: its docstring, then every public function and class."
    pages = {path.stem[3:]: path for path in numbered()} | {path.stem: path for path in libraries()}
    docs = {name: ast.get_docstring(ast.parse(module_source(f"creawrite.{name}"))) or "" for name in pages}
    for name, path in pages.items(): write(f"api/{name}.md", api_page(f"creawrite.{name}", docs[name], path))
    rows = [f"| [creawrite.{name}]({name}.md) | {doc.partition(chr(10))[0]} |" for name, doc in docs.items()]
    tree = toctree("Modules", [f"creawrite.{name} <{name}>" for name in pages])
    write("api/index.md", "\n".join(["# API", "", "| module | |", "|---|---|", *rows, tree]))


def api_page(module: str, doc: str, notebook: Path) -> str:
    "A module's page."
    place = notebook.relative_to(ROOT)
    doc = with_files(link_symbols(doc, module), place.parent.as_posix())
    head = [f"# {module}", f"```{{py:module}} {module}\n```", doc, f"Defined in [{place.name}](../{place.as_posix()})."]
    return "\n\n".join([*head, entries(module_source(module), module, index=True)]) + "\n"


def build(asked: str) -> int:
    "The whole site; the exit status of Sphinx, for which a warning is an error."
    run = asked or "smoke"
    record = ensure(run)
    for folder in (SRC, BUILD): shutil.rmtree(folder, ignore_errors=True)
    home(stage_pages(run, record), library_pages())
    map_page(run, record)
    results(asked)
    api()
    shown_run = f"The notebook pages show run {run}, profile {record['profile']}. Judged by: {engines(record)}."
    places = ["-c", str(ROOT / "docs"), "-d", str(BUILD / "doctrees"), str(SRC), str(BUILD / "html")]
    status = sphinx(["-q", "-W", "--keep-going", "-A", f"shown_run={shown_run}", *places])
    if not status: print(f"the site of run {run} is at docs/_build/html/index.html")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="", help="run to show; without it the reference runs, and the notebooks of a "
                                                  "smoke run, which is made where it is missing")
    try: sys.exit(build(parser.parse_args().run))
    except KitError as error: sys.exit(f"error: {error}")
