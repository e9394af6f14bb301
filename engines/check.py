"""Gives the exports of a smoke run to the real engines: `make engines`.

Every engine has an environment of its own under .engines/, made from its file of pins and kept. What an engine made of
an export is read from its accepted.json and compared with what the kit itself makes of it."""
import argparse
import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
KIT = HERE.parent
ENVIRONMENTS = KIT / ".engines"
RUN = "engines"  # outputs/engines/, made from a smoke run and thrown away
JUDGE_KEY = "key-of-this-test"
sys.path.insert(0, str(KIT))


def told(*command, **options) -> str:
    "What a command prints. Ends the check with all of it where the command fails."
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          **options)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-6000:]}\nexit {done.returncode}")
    return done.stdout


def environment(name) -> Path:  # python
    "An engine's environment, made where it is not there or has other pins."
    pins, bare, place = HERE / f"{name}.txt", HERE / f"{name}-bare.txt", ENVIRONMENTS / name
    both = b"".join(file.read_bytes() for file in (pins, bare) if file.is_file())
    wanted, python = hashlib.sha256(both).hexdigest(), place / "bin/python"
    if (place / "ready").is_file() and (place / "ready").read_text() == wanted: return python
    began = time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    told(sys.executable, "-m", "venv", place)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    if torch: told(*pip, *torch)  # first and alone: else it may come with gigabytes of CUDA libraries
    if bare.is_file():  # without what they ask for: torchvision, torchaudio, vLLM, CUDA
        told(*pip, "--no-deps", "-r", pins)
        told(*pip, "--no-deps", "-r", bare)
        for library in place.glob("lib/*/site-packages/torchaudio/lib/*.so"): library.unlink()  # they want CUDA
    else: told(*pip, "-r", pins)
    (place / "ready").write_text(wanted)
    print(f"the environment {name} was made in {time.monotonic() - began:.0f} s", flush=True)
    return python


def at_home(**more) -> dict:
    "The environment of a process: no endpoint but the one given, one thread, no network."
    ours = {name: value for name, value in os.environ.items() if name not in
            ("OPENAI_BASE_URL", "OPENAI_API_KEY", "CREAWRITE_MODEL", "PYTHONPATH")}
    return ours | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | more


@contextmanager
def served(app):
    "An app behind a real address on 127.0.0.1."
    import threading

    import uvicorn
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.02)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
SMALL = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "16"]


@contextmanager
def vllm(words, key=""):
    "vLLM's own server on a free port of 127.0.0.1, up; ended with the block."
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    log = KIT / "outputs" / RUN / f"vllm-{port}.log"
    command = [environment("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port,
               *words, *SMALL]
    more = VLLM | ({"VLLM_API_KEY": key} if key else {})
    with log.open("w") as file:
        server = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=at_home(**more))
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        began = time.monotonic()
        while True:
            late = time.monotonic() - began > 300
            if late or server.poll() is not None: sys.exit(f"vLLM does not serve\n{log.read_text()[-4000:]}")
            try: urllib.request.urlopen(asked, timeout=5).close()
            except OSError: time.sleep(0.5)
            else: break
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


class ServedScorer:
    "A reward model behind vLLM's /classify, with the face of `RewardModel`."

    def __init__(self, address, model, tokenizer): self.address, self.model, self.tokenizer = address, model, tokenizer

    def score(self, queries, responses):
        import numpy as np

        from creawrite.policies import policy_answer, policy_messages
        texts = [self.tokenizer.apply_chat_template(policy_messages(query) + policy_answer(text), tokenize=False)
                 for query, text in zip(queries, responses)]
        body = json.dumps({"model": self.model, "input": texts}).encode()
        asked = urllib.request.Request(f"http://{self.address}/classify", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as reply: rows = json.load(reply)["data"]
        return np.array([row["probs"][0] for row in sorted(rows, key=lambda row: row["index"])])


def same(name, theirs, ours, within=0.0):
    "Ends the check where two lists differ."
    apart = len(theirs) != len(ours) or any(abs(a - b) > within for a, b in zip(theirs, ours))
    if apart: sys.exit(f"{name}: the engine says {theirs}, the kit {ours}")
    print(f"  {name}: {theirs}, as the kit", flush=True)


def written(folder: Path) -> tuple[list[str], list[str]]:  # queries, texts
    "Good and weak greetings of our sample for the first validation prompts, beside an export."
    from creawrite.core import read_jsonl, write_json
    from creawrite.splits import load_split
    known = {row["query"]: row for row in read_jsonl(KIT / "data/sample/greetings.jsonl")}
    queries = [row.query for row in load_split(RUN, "prompts_test")[:8]]
    texts = [known[query]["weak" if number % 2 else "good"] for number, query in enumerate(queries)]
    for name, value in (("queries", queries), ("texts", texts)): write_json(folder / f"{name}.json", value)
    return queries, texts


def creawrite(*words) -> str:
    "A command of the kit, as a user types it."
    return told(sys.executable, "-m", "creawrite.cli", *words, cwd=KIT, env=at_home(PYTHONPATH=str(KIT)))


def check_llamafactory(folder: Path):
    "Rows, two steps of SFT and RM, and both models back in the run, the policy up to Table 2."
    import pandas as pd

    from creawrite.core import read_json, run_dir
    from creawrite.policies import generate, policy_dir
    from creawrite.rewards import RewardModel
    from creawrite.splits import load_split
    base = run_dir(RUN) / "sft/base"
    told(environment("train"), HERE / "accept_llamafactory.py", folder, base, env=at_home())
    accepted = json.loads((folder / "accepted.json").read_text("utf-8"))
    assert accepted["silently"] == 3, "LLaMA-Factory no longer drops rows of a wrong role: check_llamafactory may rest"
    for name, split in (("sft", "sft"), ("rm", "pairs_train"), ("rm_test", "pairs_test")):
        same(f"LLaMA-Factory, rows of {name}", [accepted["rows"][name]], [len(load_split(RUN, split))])
    check_released(base)
    creawrite("import", RUN, folder / "saves/rm", "--as", "reward_model", "--replace")
    query = load_split(RUN, "pairs_test")[0].query
    scorer = RewardModel.load(run_dir(RUN) / "reward_model/model")
    ours = scorer.score([query] * len(accepted["texts"]), accepted["texts"])
    level = lambda scores: [round(score - scores[0], 4) for score in scores]  # the bias moves all alike
    same("LLaMA-Factory, reward model", level(accepted["scores"]), level(ours.tolist()), within=0.01)
    creawrite("import", RUN, folder / "saves/sft", "--as", "sft-judge", "--replace")
    for stage in ("evaluate", "paper"): creawrite("run", "--run", RUN, "--only", stage)
    [texts] = generate(policy_dir(RUN, "sft-judge"), [query], max_new_tokens=16)
    rows = pd.read_csv(run_dir(RUN) / "paper/table2.csv").query("policy == 'sft-judge'")
    if "imported" not in read_json(policy_dir(RUN, "sft-judge") / "policy.json") or rows.empty:
        sys.exit("the policy that LLaMA-Factory trained does not stand in Table 2")
    print(f"  the policy is back, writes {texts} and has {len(rows)} rows in Table 2", flush=True)


def check_released(base: Path):
    "The row counts of the released data, where it lies beside the kit; nothing of it stays."
    from creawrite.core import run_dir, write_json
    from creawrite.data import released_splits
    from creawrite.llamafactory import write_llamafactory
    from creawrite.splits import write_splits
    found = [place for place in (KIT / "data/released", KIT.parent / "shared/released") if (place / "sft").is_dir()]
    if not found: return
    name = f"{RUN}-released"
    folder = run_dir(name) / "export"
    try:
        write_splits(name, released_splits(found[0]))
        write_json(run_dir(name) / "data/source.json", {"source": "released"})
        write_llamafactory(name, folder, include_data=True)
        told(environment("train"), HERE / "accept_llamafactory.py", folder, base, "rows", env=at_home())
        rows = json.loads((folder / "accepted.json").read_text("utf-8"))["rows"]
        same("LLaMA-Factory, released rows", [rows[name] for name in ("sft", "rm", "rm_test")], [4000, 6310, 1586])
    finally: shutil.rmtree(run_dir(name))


def check_verl(folder: Path):
    "Overrides, parquet, and both rewards through verl's own worker; vLLM serves the reward model."
    from creawrite.core import read_json, run_dir
    from creawrite.judge import Judge
    from creawrite.llm import open_llm
    from creawrite.offline import app
    from creawrite.rewards import RewardModel, RewardModelReward
    from creawrite.splits import load_split
    place, policy = run_dir(RUN) / "reward_model/model", run_dir(RUN) / "sft/sft"
    loaded, (queries, texts) = RewardModel.load(place), written(folder)
    scorer = RewardModel(loaded.model, loaded.tokenizer)  # the engines know nothing of a correction for length
    raw = ["--model", place, "--served-model-name", place, "--runner", "pooling", "--pooler-config",
           '{"use_activation": false}']
    with served(app) as judge, vllm(raw) as rewards:
        ours, theirs = (asyncio.run(RewardModelReward(each)(None, texts, queries))
                        for each in (scorer, ServedScorer(rewards, str(place), scorer.tokenizer)))
        same("vLLM, Signal-1", theirs, ours, within=1e-5)
        told(environment("train"), HERE / "accept_verl.py", folder, policy, place, rewards,
             env=at_home(OPENAI_BASE_URL=f"http://{judge}/v1", OPENAI_API_KEY=JUDGE_KEY, CREAWRITE_MODEL="m"))
    accepted = json.loads((folder / "accepted.json").read_text("utf-8"))
    for name, split in (("train", "prompts_train"), ("validation", "prompts_test")):
        same(f"verl, rows of {name}", [accepted["rows"][name]], [len(load_split(RUN, split))])
    same("verl, Signal-1", accepted["rm"], scorer.score(queries, texts).tolist(), within=1e-4)
    judge = Judge(open_llm(RUN, "offline"), read_json(folder / "judge.json")["principles"])
    same("verl, Signal-2", accepted["judge"], asyncio.run(judge.verdicts(queries, texts)))
    assert "OPENAI_API_KEY is not set" in accepted["unset"], accepted["unset"]


def check_vllm(folder: Path):
    "A policy behind vLLM writes what transformers write; as a judge it gives Signal-2 through the kit's client."
    from openai import OpenAI

    from creawrite.judge import Judge
    from creawrite.llm import open_llm
    from creawrite.policies import generate, policy_dir
    from creawrite.rewards import JudgeReward
    from creawrite.serve import vllm_command
    from creawrite.splits import load_split
    from creawrite.task import TASK
    queries, name = [row.query for row in load_split(RUN, "prompts_test")[:8]], f"{RUN}/sft"
    words = vllm_command(RUN, "sft", 0)
    model = words[words.index("--model") + 1]
    schema = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    with vllm(["--model", model, "--served-model-name", name, *schema], JUDGE_KEY) as address:
        client = OpenAI(base_url=f"http://{address}/v1", api_key=JUDGE_KEY)
        theirs = [client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": TASK.prefix + query}], temperature=0,
            max_tokens=24).choices[0].message.content.strip() for query in queries]
        ours = [texts[0] for texts in generate(policy_dir(RUN, "sft"), queries, max_new_tokens=24, temperature=0)]
        equal = sum(one == other for one, other in zip(theirs, ours))
        if equal < len(ours) - 1: sys.exit(f"vLLM writes {theirs}, transformers {ours}")  # a tie may fall either way
        os.environ.update(OPENAI_BASE_URL=f"http://{address}/v1", OPENAI_API_KEY=JUDGE_KEY, CREAWRITE_MODEL=name)
        judge = Judge(open_llm(RUN, "endpoint", "live", stage="engines"), ["跑题，判 Bad"])
        grades = asyncio.run(JudgeReward(judge)(None, ours, queries))
    if set(grades) == {None} or not all(grade in (0, 1, None) for grade in grades): sys.exit(f"grades {grades}")
    print(f"  vLLM, {equal} of {len(ours)} greedy texts as transformers; as a judge {grades}", flush=True)


def check_grader(name: str, folder: Path):
    "verifiers or OpenJudge against a served judge."
    from creawrite.judge import Judge
    from creawrite.llm import open_llm
    from creawrite.serve import judge_app
    from creawrite.splits import load_split
    judge, (queries, texts) = Judge.load(RUN, open_llm(RUN, "offline")), written(folder)
    python = environment(name)
    if name == "verifiers":
        told(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall", folder)
    with served(judge_app(judge, "m", JUDGE_KEY)) as address:
        told(python, HERE / f"accept_{name}.py", folder,
             env=at_home(OPENAI_BASE_URL=f"http://{address}/v1", OPENAI_API_KEY=JUDGE_KEY, CREAWRITE_MODEL="m"))
    accepted = json.loads((folder / "accepted.json").read_text("utf-8"))
    same(f"{name}, scores", accepted["scores"], asyncio.run(judge.verdicts(queries, texts)))
    assert "OPENAI_API_KEY is not set" in accepted["unset"], accepted["unset"]
    if name == "verifiers": same("verifiers, rows", [accepted["rows"]], [len(load_split(RUN, "prompts_test"))])


def prepare(source: str):
    "A copy of a finished smoke run, its exports new."
    outputs = KIT / "outputs"
    creawrite("run", "--profile", "smoke", "--run", source, "-p", "sft.heads=2")  # vLLM on a CPU wants 32 to a head
    shutil.rmtree(outputs / RUN, ignore_errors=True)
    shutil.copytree(outputs / source, outputs / RUN)


CHECKS = {  # engine -> what it must pass, the environments for that
    "llamafactory": (check_llamafactory, ["train"]), "verl": (check_verl, ["train", "vllm"]),
    "vllm": (check_vllm, ["vllm"]), "verifiers": (partial(check_grader, "verifiers"), ["verifiers"]),
    "openjudge": (partial(check_grader, "openjudge"), ["openjudge"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", default=list(CHECKS), metavar=" | ".join(CHECKS))
    parser.add_argument("--run", default=f"{RUN}-smoke", help="a smoke run of two-headed models, made if missing")
    wanted, began = parser.parse_args(), time.monotonic()
    os.chdir(KIT)
    needed = list(dict.fromkeys(place for name in wanted.engines for place in CHECKS[name][1]))
    with ThreadPoolExecutor(1) as beside:  # packages are unpacked while the smoke run computes
        made = [beside.submit(environment, name) for name in needed]
        prepare(wanted.run)
        for each in made: each.result()
    print(f"a smoke run and {len(needed)} environments: {time.monotonic() - began:.0f} s", flush=True)
    for name in wanted.engines:
        since = time.monotonic()
        print(name, flush=True)
        CHECKS[name][0](KIT / "outputs" / RUN / "export" / name)
        print(f"  accepted, {time.monotonic() - since:.0f} s", flush=True)
    shutil.rmtree(KIT / "outputs" / RUN)
    print(f"every engine accepts its export; {time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__": main()
