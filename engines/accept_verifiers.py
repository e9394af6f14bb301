"""verifiers finds the exported environment by its name, and its reward is what the served judge says.

python accept_verifiers.py EXPORT, with the package installed and the judge's variables set. EXPORT/texts.json holds
texts for the first validation prompts. Writes EXPORT/accepted.json."""
import asyncio
import json
import os
import sys
from pathlib import Path

import verifiers.v1 as vf
from verifiers.v1.utils import loaders

def traced(task, text) -> vf.Trace:
    "A rollout of one reply."
    return vf.Trace(task=vf.TraceTask(type=type(task).__name__, data=task.data),
                    agent=vf.AgentInfo(config=vf.AgentConfig()), root_reply=text)


def main(export):
    texts = json.loads((Path(export) / "texts.json").read_text(encoding="utf-8"))
    loaders.import_taskset("creawrite-greetings")
    from creawrite_greetings import GreetingConfig, GreetingTaskset
    tasks = list(GreetingTaskset(GreetingConfig(split="validation")))
    scores = []
    for task, text in zip(tasks, texts):
        trace = traced(task, text)
        asyncio.run(task.score(trace))
        scores.append(trace.rewards["good"].value)
    del os.environ["OPENAI_API_KEY"]
    try: unset = str(asyncio.run(tasks[0].score(traced(tasks[0], texts[0]))))
    except Exception as error: unset = str(error)
    told = {"rows": len(tasks), "scores": scores, "unset": unset}
    (Path(export) / "accepted.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
