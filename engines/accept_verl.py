"""verl composes and validates the exported overrides, loads the parquet, and its reward worker scores a batch.

python accept_verl.py EXPORT POLICY REWARD_MODEL ADDRESS; the judge's endpoint comes from the environment, ADDRESS
(host:port) serves the reward model. EXPORT/texts.json holds texts for the first validation prompts. Writes
EXPORT/accepted.json."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import verl
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

def overrides(script) -> list[str]:
    "The words that a launch script hands to verl, as bash makes them."
    words = Path(script).read_text(encoding="utf-8").partition("exec python -m verl.trainer.main_ppo")[2]
    told = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True)
    return [word for word in told.stdout.split("\0") if word]


def composed(script, *more):
    "verl's configuration."
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return compose("ppo_trainer", overrides=overrides(script) + list(more))


def batch(tokenizer, rows, texts) -> DataProto:
    "A rollout of a text for each row, as verl hands it to its reward worker."
    answers = [tokenizer(text + tokenizer.eos_token, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, answers))
    pad = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in answers]
    seen = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in answers]
    columns = {"data_source": "data_source", "reward_model": "reward_model", "extra_info": "extra_info",
               "raw_prompt": "prompt"}
    others = {name: np.array([None] * len(texts), dtype=object) for name in columns}
    for name, column in columns.items():
        for number in range(len(texts)):
            value = rows[column][number]
            others[name][number] = list(value) if name == "raw_prompt" else value
    prompts = torch.zeros(len(texts), 1, dtype=torch.long)
    mask = torch.tensor([[1] + each for each in seen])
    return DataProto.from_dict({"prompts": prompts, "responses": torch.tensor(pad), "attention_mask": mask},
                               non_tensors=others)


def scored(config, data, address=None) -> list[float]:
    "What verl's own reward worker makes of a batch."
    worker = RewardLoopWorker(config, address)
    return [float(each["reward_score"]) for each in worker.loop.run_until_complete(worker.compute_score_batch(data))]


def main(export, policy, reward_model, address):
    os.chdir(export)
    named = [f"actor_rollout_ref.model.path={policy}"]
    judge = composed("launch_judge.sh", *named)
    scorer = composed("launch_rm.sh", *named, f"reward.reward_model.model_path={reward_model}")
    for config in (judge, scorer): validate_config(config, use_reference_policy=True, use_critic=False)
    old = composed("launch_judge.sh", *named, "reward_model.reward_manager=dapo")
    assert old.reward.reward_manager.name == "naive", "verl obeys the old keys again: allow them"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    loaded = {name: len(RLHFDataset(f"{name}.parquet", tokenizer, judge.data)) for name in ("train", "validation")}
    texts = json.loads(Path("texts.json").read_text(encoding="utf-8"))
    data = batch(tokenizer, pd.read_parquet("validation.parquet"), texts)
    accepted = {"rows": loaded, "judge": scored(judge, data), "rm": scored(scorer, data, address)}
    key = os.environ.pop("OPENAI_API_KEY")
    try: accepted["unset"] = str(scored(judge, data))
    except RuntimeError as error: accepted["unset"] = str(error)
    os.environ["OPENAI_API_KEY"] = key
    Path("accepted.json").write_text(json.dumps(accepted, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
