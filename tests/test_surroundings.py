"A full disk, names that are too long, a locale without Chinese: one sentence, and nothing is lost."
import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENDPOINT, REPOSITORY, make_kit

from creawrite.core import (KitError, UsageError, atomic, read_json, read_jsonl, run_dir, stage_dir, system_error,
                            write_json, write_jsonl)

NO_ENDPOINT = {name: value for name, value in os.environ.items() if name not in ENDPOINT + ["CREAWRITE_ROOT"]}
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def command(kit: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    "The command line of a kit, in a process of its own."
    line = [sys.executable, "-m", "creawrite.cli", *arguments]
    return subprocess.run(line, cwd=kit, env=NO_ENDPOINT | environment, capture_output=True)


# ---- a full disk

LIMITED = """
import os, resource, signal
from pathlib import Path
from creawrite.core import KitError, atomic, write_json, write_jsonl
from creawrite.ledger import Ledger, key_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(os.environ["FOLDER"])
write_json(folder / "a.json", "whole")
ledger = Ledger(folder / "ledger.sqlite")
row = dict(engine="m", role="judge", request="{}", status="stop", tokens_in=1, tokens_out=1, seconds=1)
ledger.put(**row, key="first", reply="whole")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
def torch_like():
    import torch
    with atomic(folder / "a.json") as part: torch.save(torch.zeros(100_000), part)
for work in (lambda: write_json(folder / "a.json", "x" * 300_000),
             lambda: write_jsonl(folder / "b.jsonl", ({"text": "祝" * 1000} for _ in range(300))),
             lambda: ledger.put(**row, key="second", reply="x" * 300_000), torch_like):
    try: work()
    except KitError as error: print(error)
print(ledger.query("SELECT key, reply FROM calls"), sorted(path.name for path in folder.glob("*.json*")))
"""


def test_a_write_that_ends_halfway_is_one_sentence_and_leaves_what_was_there(kit):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "FOLDER": str(kit / "outputs/lab")}
    done = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *told, rest = done.stdout.splitlines()
    named = ["outputs/lab/a.json", "outputs/lab/b.jsonl", "outputs/lab/ledger.sqlite", "outputs/lab/a.json"]
    assert [line.split()[0] for line in told] == named
    for line in told:
        assert "cannot be written" in line and "MB free there" in line and "nothing written before is lost" in line
        assert "ulimit -f" in line
    assert rest == "[('first', 'whole')] ['a.json']", "no half file either"
    assert "(file too large, " in told[0] and "(input/output error, " in told[3], "torch's word for it is understood"
    assert read_json(kit / "outputs/lab/a.json") == "whole"


FULL_DISK = """
import os, shutil, sys
from pathlib import Path
sys.path[:0] = ["TESTS", str(Path("TESTS").parent)]
from conftest import make_kit
from test_surroundings import command
disk = Path(sys.argv[1])
kit = make_kit(disk / "kit")
(kit / "nbs/03_report.ipynb").unlink()
record = kit / "outputs/smoke/run.json"
assert command(kit, "run", "--only", "data").returncode == 0
for room in (0, 8192):
    whole = record.read_bytes(), (kit / "outputs/smoke/data/sum.json").read_bytes()
    filling = os.open(disk / "filling", os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(filling, bytes(4096)): pass
    except OSError: pass
    os.truncate(filling, os.fstat(filling).st_size - room)
    os.close(filling)
    done = command(kit, "run")
    err = done.stderr.decode()
    print(done.stdout.decode(), err)
    assert done.returncode == 1 and err.startswith("error: outputs/smoke/") and "Traceback" not in err
    assert "cannot be written (no space left on device" in err and "make room, then run again" in err
    assert room or whole[0] == record.read_bytes()
    assert whole[1] == (kit / "outputs/smoke/data/sum.json").read_bytes()
    assert not list((kit / "outputs").rglob(".*.part"))
    os.remove(disk / "filling")
done = command(kit, "run")
assert done.returncode == 0 and "data … unchanged, skipped" in done.stdout.decode(), done
"""


def test_a_run_on_a_full_disk_stops_with_one_sentence_and_goes_on(tmp_path):
    "On a disk of 8 MB of its own, seen by this test's process alone."
    mount = f'mount -t tmpfs -o size=8m tmpfs "{tmp_path}" && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    program = [sys.executable, "-c", FULL_DISK.replace("TESTS", str(REPOSITORY / "tests")), str(tmp_path)]
    environment = NO_ENDPOINT | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", *program], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("error, number", [
    (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT), (OSError(errno.ENOENT, "no such file"), None),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "..." })'), errno.ENOSPC),
    (ValueError("a bug"), None), (KitError("no space left on device"), None)])
def test_what_libraries_say_of_a_full_disk_is_understood(error, number): assert system_error(error) == number


def test_a_file_that_cannot_be_read_is_no_matter_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x") as part:
        part.write_text((tmp_path / "elsewhere").read_text(encoding="utf-8"), encoding="utf-8")
    other = tmp_path.parent / "never"
    with pytest.raises(PermissionError), atomic(tmp_path / "x"): raise PermissionError(errno.EACCES, "", str(other))
    with pytest.raises(KitError, match="allow yourself to write there"), atomic(tmp_path / "x") as part:
        raise PermissionError(errno.EACCES, "Permission denied", str(part))


# ---- names

@pytest.mark.parametrize("name", ["x" * 256, "祝" * 86, "a" * 5000])
@pytest.mark.parametrize("arguments", [["run", "--run"], ["status"], ["ledger", "stats"], ["ledger", "import"]])
def test_a_run_name_that_no_file_system_takes(kit, creawrite, name, arguments):
    rest = ["none.jsonl.xz"] if "import" in arguments else []
    if rest: (kit / rest[0]).write_bytes(b"")
    code, _, err = creawrite(*arguments, name, *rest)
    if rest: assert code == 1  # the file is looked at first
    else: assert code == 2 and "bytes long" in err and err.count("\n") == 1
    with pytest.raises(UsageError, match=f"is {len(name.encode())} bytes long"): run_dir(name)
    assert not list((kit / "outputs").iterdir())


def test_a_name_of_the_full_length_is_written_whole(kit):
    name = "x" * 251 + ".txt"
    write_json(kit / name, 1)
    assert read_json(kit / name) == 1 and not [path for path in kit.iterdir() if path.name.endswith(".part")]
    with pytest.raises(KitError, match="file name too long.*255 bytes"): write_json(kit / f"x{name}", 1)
    assert stage_dir("r" * 255, "data").is_dir()


def test_a_file_where_a_folder_should_be(kit, creawrite):
    shutil.rmtree(kit / "outputs")
    (kit / "outputs").write_text("not to be lost", encoding="utf-8")
    with pytest.raises(KitError, match="outputs is a file"): stage_dir("lab", "data")
    with pytest.raises(KitError, match="outputs is a file"): write_json(kit / "outputs/lab/x.json", 1)
    assert (kit / "outputs").read_text(encoding="utf-8") == "not to be lost"


# ---- locale

def test_run_status_and_audit_in_the_c_locale(tmp_path):
    kit = make_kit(tmp_path / "论文")
    shutil.copy(REPOSITORY / "nbs/02_audit.ipynb", kit / "nbs/04_audit.ipynb")
    rows = [{"text": f"生日快乐，{number}年平安" + "！" * (number % 3), "label": number % 2} for number in range(40)]
    write_jsonl(kit / "祝福.jsonl", rows)
    first, second = kit / "nbs/01_data.ipynb", json.loads((kit / "nbs/01_data.ipynb").read_text(encoding="utf-8"))
    second["cells"][-1]["source"] += "\nprint('… 祝 ±')"
    first.write_text(json.dumps(second), encoding="utf-8")
    done = command(kit, "run", "--only", "data", **PLAIN)
    out = done.stdout.decode("ascii")
    assert done.returncode == 0 and "data ... time unknown" in out and r"... \u795d +-" in out, done
    assert not [path for path in kit.rglob("*") if "\udce8" in path.name]
    done = command(kit, "status", **PLAIN)
    assert done.returncode == 0 and b"done" in done.stdout.splitlines()[1], done
    told = command(kit, "run", "--only", "data").stdout.decode()
    assert "unchanged, skipped" in told, "nothing becomes stale with the locale"
    done = command(kit, "audit", "祝福.jsonl", "--run", "audit", **PLAIN)
    assert done.returncode == 0 and done.stdout.decode("ascii"), done
    assert "evaluation,all,20" in (kit / "outputs/audit/audit/table_a1.csv").read_text(encoding="utf-8")
    done = command(kit, "ledger", "check", "没有", **PLAIN)
    assert done.returncode == 2 and rb"run '\u6ca1\u6709' has no ledger" in done.stderr


def test_lone_surrogates_and_latin_terminals(kit):
    for coding in ("latin-1", "gb18030", "utf-8"):
        done = command(kit, "run", "--profile", "祝\udcff", LC_ALL="C.UTF-8", PYTHONIOENCODING=coding)
        assert done.returncode == 2 and done.stderr.startswith(b"error: run name '") and done.stderr.count(b"\n") == 1


def unsaid_encodings(path: Path):
    "Text files and processes of a module that would follow the locale."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call): continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {word.arg: word.value for word in node.keywords}
        texts = [value.value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        modes = [text for text in texts if set(text) <= set("rwaxbt+") and text]
        binary = any("b" in text for text in modes) or not (node.args or node.keywords) and name == "open"
        opens = isinstance(node.func, ast.Name) and name == "open" or name == "open" and modes
        reads = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
        decodes = name in ("run", "Popen", "check_output") and ("text" in words or "universal_newlines" in words)
        if (opens and not binary or reads or decodes) and "encoding" not in words: yield f"{path.name}:{node.lineno}"


def test_files_and_processes_are_utf8_whatever_the_locale():
    assert [place for path in sorted((REPOSITORY / "creawrite").glob("*.py")) for place in unsaid_encodings(path)] == []


def test_a_file_in_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('{"query": "生日"}\n'.encode("gb18030"))
    for read in (read_json, read_jsonl):
        with pytest.raises(KitError, match="x.jsonl is no UTF-8 text"): read(tmp_path / "x.jsonl")
        with pytest.raises(KitError, match="cannot be read"): read(tmp_path)
