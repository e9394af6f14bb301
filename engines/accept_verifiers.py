"""verifiers finds the exported environment by its name, and its reward is what the served judge says.

python accept_verifiers.py OUT, with the package installed and the judge's variables set; writes OUT."""
import asyncio
import json
import os
import sys
from pathlib import Path

import verifiers.v1 as vf
from verifiers.v1.utils import loaders

TEXTS = ["妈妈，生日快乐，今天的碗我来洗。", "祝好"]


def traced(task, text) -> vf.Trace:
    "A rollout of one reply."
    return vf.Trace(task=vf.TraceTask(type=type(task).__name__, data=task.data),
                    agent=vf.AgentInfo(config=vf.AgentConfig()), root_reply=text)


def main(out):
    loaders.import_taskset("creawrite-greetings")
    from creawrite_greetings import GreetingConfig, GreetingTaskset
    tasks = list(GreetingTaskset(GreetingConfig(split="validation")))
    scores = []
    for text in TEXTS:
        trace = traced(tasks[0], text)
        asyncio.run(tasks[0].score(trace))
        scores.append(trace.rewards["good"].value)
    del os.environ["OPENAI_API_KEY"]
    try: unset = str(asyncio.run(tasks[0].score(traced(tasks[0], TEXTS[0]))))
    except Exception as error: unset = str(error)
    told = {"rows": len(tasks), "query": tasks[0].data.query, "texts": TEXTS, "scores": scores, "unset": unset}
    Path(out).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
