"A kit of sixteen queries with real trainings of a few thousand weights, for every test that needs trained models."
import hashlib
from contextlib import contextmanager
from itertools import cycle, islice, product
from pathlib import Path

import pytest
import torch

from creawrite import reward_model, sft
from creawrite.core import run_dir, write_json, write_jsonl
from creawrite.rewards import RewardModel

RUN = "training"
SHAPE = dict(hidden=16, layers=1, heads=2, intermediate=32)
FAST = dict(batch_size=8, max_length=96, precision="fp32", gradient_checkpointing=False)
QUERIES = [f"给{who}的{what}祝福"
           for who, what in product(("爷爷", "同桌", "邻居", "教练"), ("生日", "乔迁", "新年", "送别八个字"))]


def good(query): return f"愿{query[1:3]}日日有晴，岁岁有花，所想都如愿。"


def weights(folder): return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def write_data():
    "Sixteen queries: twelve to learn from, four to test."
    data = run_dir(RUN) / "data"
    pairs = [{"id": f"p{i}", "query": q, "chosen": good(q), "rejected": f"祝{q[1:3]}快乐。"}
             for i, q in enumerate(QUERIES)]
    write_jsonl(data / "pairs_train.jsonl", pairs[:12])
    write_jsonl(data / "pairs_test.jsonl", pairs[12:])
    sft_rows = [{"id": f"s{i}", "query": q, "response": good(q)} for i, q in enumerate(QUERIES[:12])]
    write_jsonl(data / "sft.jsonl", sft_rows)
    write_jsonl(data / "prompts_train.jsonl", [{"id": f"g{i}", "query": q} for i, q in enumerate(QUERIES[:12])])
    write_jsonl(data / "prompts_test.jsonl", [{"id": f"t{i}", "query": q} for i, q in enumerate(QUERIES[12:])])
    write_json(run_dir(RUN) / "adversarial" / "judge.json", {"principles": ["跑题，判 Bad"]})


@contextmanager
def small_kit(folder):
    "A kit folder of our own with a trained base, SFT policy and reward model."
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        torch.set_num_threads(1)
        write_data()
        make_base()
        make_sft()
        make_reward_model()
        yield folder


def make_base(run=RUN, **changes):
    settings = dict(seed=1, model="", revision="", vocabulary=400, shape=SHAPE, learning_rate=3e-3, max_steps=3)
    sft.make_base(run, **settings | FAST | changes)


def make_sft(run=RUN, **changes):
    sft.make_sft(run, **dict(seed=1, n_rows=0, lora_rank=0, learning_rate=1e-3, max_steps=2) | FAST | changes)


def make_reward_model(run=RUN, pairs=None, **changes):
    settings = dict(seed=1, model="", debias="none", lora_rank=4, learning_rate=1e-2, max_steps=2)
    pairs = pairs or reward_model.training_pairs(run, "data")
    reward_model.make_reward_model(run, "model", pairs, **settings | FAST | changes)
    return RewardModel.load(run_dir(run) / "reward_model" / "model")


def again(make, card):
    "Train once more, for the card is gone."
    card.unlink()
    return make()


class Verdicts:
    "A judge that answers from a list."
    def __init__(self, *answers): self.answers = answers

    async def grades(self, queries, responses): return list(islice(cycle(self.answers), len(responses)))
