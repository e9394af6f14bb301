"""Build the site from the executed notebooks of a run: python docs/build.py [--run NAME] makes docs/_build/html/index.html.

The sources of the pages go to docs/_src, laid out like the repository, so that links between README, notebooks and files work as they are.
"""
import argparse, ast, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, papermill
from nbformat.v4 import new_markdown_cell, new_notebook
from sphinx.cmd.build import main as sphinx

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
    "The record of a run, which is made first, or brought to its end, where it is not finished."
    record = read_record(run)
    if all(record["stages"].get(stage.name, {}).get("status") == "done" for stage in stages()): return record
    profile, overrides = record.get("profile", "smoke"), record.get("overrides", [])
    print(f"run {run} is not finished: running it first, profile {profile}", flush=True)
    command = ["run", "--profile", profile, "--run", run, *(word for override in overrides for word in ("-p", override))]
    if subprocess.run([sys.executable, "-m", "creawrite.runs", *command], cwd=ROOT).returncode:
        raise KitError(f"run {run} did not finish, so there is nothing to show: mend what it says above, then build the site again")
    return read_record(run)


def engines(record: dict) -> str:
    "What judged in a run, for captions."
    return ", ".join(sorted({stage["engine"] for stage in record["stages"].values() if stage.get("engine")}))


# Notebooks

def directives(source: str) -> tuple[set[str], str]:
    "nbdev's directives of a cell, and its source without them."
    lines = source.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return {line[2:].split()[0].rstrip(":") for line in lines[:end]}, "\n".join(lines[end:]).strip()


def public(source: str) -> list[ast.stmt]:
    "Functions and classes that a source defines for others."
    return [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def entry(module: str, node: ast.stmt):
    "A cell with the API entry of a function or class."
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    return new_markdown_cell(f"```{{eval-rst}}\n.. auto{kind}:: {module}.{node.name}\n   :no-index:\n```")


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
    nodes = public(cell.source) if "export" in marks else []
    imports = "export" in marks and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body)
    cell.outputs = [clean_output(output) for output in cell.outputs]
    cell.metadata = {"tags": ["hide-input"] if nodes or imports or "code-fold" in marks else []}
    return [*(entry(module, node) for node in nodes), cell]


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
    return nbformat.writes(new_notebook(cells=[title, about, *rest], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}))


def notebooks(run: str, record: dict) -> list[str]:
    "All notebook pages; their entries for the sidebar."
    entries = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        facts = record["stages"].get(path.stem[3:])
        note = f"Executed in run `{run}`, profile {record['profile']}, in {duration(facts['seconds'])}." if facts else "Not a stage of a run, so shown without results."
        if facts and facts["engine"]: note += f" Judged by: {facts['engine']}."
        write(f"nbs/{path.name}", page(run_dir(run) / path.name if facts else path, note + f" Source: `nbs/{path.name}`."))
        entries.append(f"{path.stem[:2]} {title_of(path)} <nbs/{path.stem}>")
    return entries


def title_of(notebook: Path) -> str:
    "First heading of a notebook."
    return nbformat.read(notebook, 4).cells[0].source.splitlines()[0].lstrip("# ")


def map_page(run: str, record: dict):
    "The index notebook, executed for this run."
    copy = BUILD / "index.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(ROOT / "nbs" / "index.ipynb", copy, {"run": run}, cwd=ROOT, progress_bar=False)
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


def toctree(caption: str, entries: list[str]) -> str:
    "A section of the sidebar."
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def home(entries: list[str]):
    "README.md, with the sidebar of the whole site."
    trees = toctree("Start here", ["Home <self>", "Map of the kit <nbs/index>"]) + toctree("Notebooks", entries)
    write("index.md", with_files((ROOT / "README.md").read_text(encoding="utf-8")) + trees + toctree("Reference", ["Results <results>", "API <api/index>"]))


def summary(record: dict) -> str:
    "What run.json says about a run, in a table."
    hardware, packages, git = record["hardware"], record["packages"], record["git"]
    times = {name: stage["seconds"] for name, stage in record["stages"].items() if "seconds" in stage}
    rows = {
        "Profile": record["profile"] + (f" with {', '.join(record['overrides'])}" if record["overrides"] else ""),
        "Judged by": engines(record),
        "Hardware": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB" + "".join(f"; {gpu}" for gpu in hardware["gpus"]),
        "Versions": ", ".join([f"Python {record['python']}", *(f"{name} {packages[name]}" for name in ("torch", "transformers", "trl", "peft", "vllm") if name in packages)]),
        "Kit": f"commit {git['commit'][:10]}{', with changes' if git['dirty'] else ''}" if git and git["commit"] else "no commit known",
        "Seeds": ", ".join(sorted({str(seed) for seed in record["seeds"].values()})),
        "Stages": ", ".join(f"{name} {duration(seconds)}" for name, seconds in times.items()),
        "In all": duration(sum(times.values()))}
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def reference(folder: Path) -> str:
    "A reference run: its record, its tables under their captions, its figures."
    parts = [f"## {folder.name}", summary(read_json(folder / "run.json")) if (folder / "run.json").is_file() else ""]
    for path in sorted(folder.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if named := re.match(r"(Table [^.]+)\.", text): parts += [f"### {named[1]}", text]
    for path in sorted(folder.rglob("*.svg")): parts += [f"### {path.stem.replace('_', ' ').capitalize()}", f"![{path.stem}]({path.relative_to(ROOT).as_posix()})"]
    return "\n\n".join(parts)


def results():
    "The committed tables and figures of our own reference runs."
    runs = sorted(path for path in (ROOT / "outputs" / "reference").glob("*") if path.is_dir())
    intro = "Tables and figures of our own runs, as committed under `outputs/reference/`. Each caption names the engine that judged."
    write("results.md", with_files("\n\n".join(["# Results", intro if runs else "No reference run has been committed yet.", *map(reference, runs)])))


def api():
    "One page per module: its docstring, then every public function and class."
    modules = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in sorted((ROOT / "creawrite").glob("[a-z]*.py"))}
    pages = {title: path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if (title := path.stem[3:]) in modules}
    for name, path in pages.items():
        text = f"# creawrite.{name}\n\n{with_files(modules[name], 'nbs')}\n\nDefined in [{path.name}](../nbs/{path.name}).\n\n"
        write(f"api/{name}.md", text + f"```{{eval-rst}}\n.. automodule:: creawrite.{name}\n```\n")
    rows = [f"| [creawrite.{name}]({name}.md) | {modules[name].partition(chr(10))[0]} |" for name in pages]
    write("api/index.md", "\n".join(["# API", "", "| module | |", "|---|---|", *rows, toctree("Modules", [f"creawrite.{name} <{name}>" for name in pages])]))


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
