"Every example and assertion below a library's cells holds."
import os
import subprocess
import sys

from conftest import ENDPOINT, REPOSITORY

RUN_ALL = """
import os, sys
from pathlib import Path
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
for path in map(Path, sys.argv[1:]):
    os.chdir(path.parent)
    shell = CaptureShell(path=path.parent)
    try: shell.run_all(read_nb(path), exc_stop=True)
    except BaseException as error: print(f"{path.name}: {type(error).__name__}: {error}")
"""


def test_library_notebooks_run_from_top_to_bottom():
    environment = {name: value for name, value in os.environ.items() if name not in ENDPOINT}
    command = [sys.executable, "-c", RUN_ALL, *sorted((REPOSITORY / "nbs/lib").glob("*.ipynb"))]
    before = set((REPOSITORY / "outputs").iterdir())
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout == "", told.stdout + told.stderr
    left = {path for path in set((REPOSITORY / "outputs").iterdir()) - before if "test-" not in path.name}
    assert not left, "an example leaves nothing behind"
