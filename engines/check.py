"""Gives the exports of a smoke run to the real engines: `make engines`.

Every engine has an environment of its own under .engines/, made from its file of pins and kept. What an engine made of
an export is read from its accepted.json and compared with what the kit itself makes of it."""
import argparse
import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
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
    pins, place = HERE / f"{name}.txt", ENVIRONMENTS / name
    wanted, python = hashlib.sha256(pins.read_bytes()).hexdigest(), place / "bin/python"
    if (place / "ready").is_file() and (place / "ready").read_text() == wanted: return python
    print(f"making the environment {name}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    told(sys.executable, "-m", "venv", place)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    if torch: told(*pip, *torch)  # first and alone: else it may come with gigabytes of CUDA libraries
    if (HERE / f"{name}-bare.txt").is_file():  # without what they ask for: torchvision, torchaudio, vLLM, CUDA
        told(*pip, "-r", pins)
        told(*pip, "--no-deps", "-r", HERE / f"{name}-bare.txt")
        for library in place.glob("lib/*/site-packages/torchaudio/lib/*.so"): library.unlink()  # they want CUDA
    else: told(*pip, "-r", pins)
    (place / "ready").write_text(wanted)
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


def classify_app(scorer):
    "A reward model behind the address that vLLM gives one: the raw score of a text, without an activation."
    import torch
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def classify(request):
        asked = await request.json()
        assert asked["use_activation"] is False, asked
        inputs = scorer.tokenizer(asked["input"], return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode(): score = float(scorer.model(**inputs).logits[0, 0])
        return JSONResponse({"data": [{"probs": [score]}]})
    return Starlette(routes=[Route("/classify", classify, methods=["POST"])])


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
    for name, split in (("sft", "sft"), ("rm", "pairs_train")):
        same(f"LLaMA-Factory, rows of {name}", [accepted["rows"][name]], [len(load_split(RUN, split))])
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


def check_verl(folder: Path):
    "Overrides, parquet, and both rewards through verl's own worker."
    from creawrite.core import read_json, run_dir
    from creawrite.judge import Judge
    from creawrite.llm import open_llm
    from creawrite.offline import app
    from creawrite.rewards import RewardModel
    from creawrite.splits import load_split
    scorer, policy = RewardModel.load(run_dir(RUN) / "reward_model/model"), run_dir(RUN) / "sft/sft"
    queries, texts = written(folder)
    with served(app) as judge, served(classify_app(scorer)) as rewards:
        told(environment("train"), HERE / "accept_verl.py", folder, policy, run_dir(RUN) / "reward_model/model",
             rewards, env=at_home(OPENAI_BASE_URL=f"http://{judge}/v1", OPENAI_API_KEY=JUDGE_KEY, CREAWRITE_MODEL="m"))
    accepted = json.loads((folder / "accepted.json").read_text("utf-8"))
    for name, split in (("train", "prompts_train"), ("validation", "prompts_test")):
        same(f"verl, rows of {name}", [accepted["rows"][name]], [len(load_split(RUN, split))])
    same("verl, Signal-1", accepted["rm"], scorer.score(queries, texts).tolist(), within=1e-4)
    judge = Judge(open_llm(RUN, "offline"), read_json(folder / "judge.json")["principles"])
    same("verl, Signal-2", accepted["judge"], asyncio.run(judge.verdicts(queries, texts)))
    assert "OPENAI_API_KEY is not set" in accepted["unset"], accepted["unset"]


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
    creawrite("run", "--profile", "smoke", "--run", source)
    shutil.rmtree(outputs / RUN, ignore_errors=True)
    shutil.copytree(outputs / source, outputs / RUN)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", default=["llamafactory", "verl", "verifiers", "openjudge"])
    parser.add_argument("--run", default="smoke", help="a smoke run to copy")
    wanted = parser.parse_args()
    os.chdir(KIT)
    prepare(wanted.run)
    for name in wanted.engines:
        began = time.monotonic()
        print(name, flush=True)
        folder = KIT / "outputs" / RUN / "export" / name
        if name == "llamafactory": check_llamafactory(folder)
        elif name == "verl": check_verl(folder)
        else: check_grader(name, folder)
        print(f"  accepted, {time.monotonic() - began:.0f} s", flush=True)
    shutil.rmtree(KIT / "outputs" / RUN)


if __name__ == "__main__": main()
