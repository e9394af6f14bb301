"""LLaMA-Factory's own loaders and trainer on an export: row counts, two steps of SFT and RM, and the RM's scores.

python accept_llamafactory.py EXPORT MODEL [rows]; writes EXPORT/saves/ and EXPORT/accepted.json."""
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.tuner import run_exp

TEXTS = ["妈妈，生日快乐，今天的碗我来洗。", "祝好", "愿你平安，愿你笑着过每一天。"]


def settings(name, model) -> dict:
    "A YAML file of the export, for a model."
    return yaml.safe_load(Path(name).read_text(encoding="utf-8")) | {"model_name_or_path": model}


def rows(name, model, **changes) -> int:
    "Rows that LLaMA-Factory reads."
    model_args, data_args, training_args, tuning_args, _ = get_train_args(settings(name, model) | changes)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    return len(get_dataset(template, model_args, data_args, training_args, stage=tuning_args.stage,
                           **loaded)["train_dataset"])


def scores(model) -> list[float]:
    "What LLaMA-Factory's reward model says of a query with each text: its value at the last token."
    trained = settings("rm_small.yaml", model) | {"adapter_name_or_path": "saves/rm"}
    model_args, _, _, tuning_args, _ = get_train_args(trained)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    scorer = load_model(tokenizer, model_args, tuning_args, is_trainable=False, add_valuehead=True).eval()
    found = []
    for text in TEXTS:
        asked = json.loads(Path("creawrite_rm_test.json").read_text(encoding="utf-8"))[0]["conversations"][0]["value"]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        inputs = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt",
                           add_special_tokens=False)
        with torch.inference_mode(): found.append(float(scorer(**inputs)[-1][0, -1]))
    return found


def dropped(model) -> int:
    "Rows that go missing without a word when three have a role that LLaMA-Factory does not know."
    path = Path("creawrite_rm.json")
    kept = path.read_text(encoding="utf-8")
    wrong = json.loads(kept)
    for row in wrong[:3]: row["conversations"][0]["from"] = "user"
    path.write_text(json.dumps(wrong, ensure_ascii=False), encoding="utf-8")
    try: return len(wrong) - rows("rm_small.yaml", model)
    finally: path.write_text(kept, encoding="utf-8")


def main(export, model, only=""):
    os.chdir(export)
    counted = {name: rows(f"{name}_small.yaml", model) for name in ("sft", "rm")}
    counted["rm_test"] = rows("rm_small.yaml", model, dataset="creawrite_rm_test")
    if only: return Path("accepted.json").write_text(json.dumps({"rows": counted}), encoding="utf-8")
    silently = dropped(model)
    for name in ("sft", "rm"): run_exp(settings(f"{name}_small.yaml", model))
    accepted = {"rows": counted, "silently": silently, "texts": TEXTS, "scores": scores(model)}
    Path("accepted.json").write_text(json.dumps(accepted, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
