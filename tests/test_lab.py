"JupyterLab of this repository: what is saved is what git holds."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from conftest import REPOSITORY


@pytest.fixture
def lab(tmp_path):
    "A running server on a copy of two notebooks: an address for its files, and the folder."
    for name in ("02_audit", "index"): shutil.copy(REPOSITORY / f"nbs/{name}.ipynb", tmp_path)
    config = REPOSITORY / "docs/lab/jupyter_server_config.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--config", config, "--no-browser", f"--port={port}",
               "--ip=127.0.0.1", "--IdentityProvider.token=secret", "--ServerApp.root_dir", tmp_path]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}/api/contents/"
    for _ in range(300):
        try: ask(address)
        except urllib.error.URLError: time.sleep(0.2)
        else: break
        assert server.poll() is None, (tmp_path / "lab.log").read_text()
    yield address, tmp_path
    server.terminate()
    server.wait(30)


def ask(address, body=None):
    "A file of the server, or what it says to a changed one."
    head = {"Authorization": "token secret", "Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None, head)
    if body: request.method = "PUT"
    with urllib.request.urlopen(request, timeout=60) as reply: return json.load(reply)


@pytest.mark.parametrize("name", ["02_audit.ipynb", "index.ipynb"])
def test_run_all_and_save_changes_nothing(lab, name):
    address, folder = lab
    before = (folder / name).read_bytes()
    model = ask(address + name)
    for count, cell in enumerate(model["content"]["cells"]):
        if cell["cell_type"] != "code": continue
        cell["execution_count"] = count
        cell["outputs"] = [nbformat.v4.new_output("stream", text="done\n")]
        cell["metadata"] |= {"execution": {"iopub.status.busy": "2026-11-27T00:00:00"}, "collapsed": True}
    model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.12.1"}
    model["content"]["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    ask(address + name, {"type": "notebook", "content": model["content"]})
    assert (folder / name).read_bytes() == before
