"""Rollouts and training on one GPU: the kit's own settings beside TRL's defaults at the same batch, random weights.

Writes `bench/results/gpu.csv` (shape, setting, quantity, value, unit) and prints it. The shapes are those of
Qwen2.5-0.5B (all weights trained) and Qwen2.5-7B (LoRA of rank 16, gradient checkpointing), with its 151,936 logits;
the tokenizer is trained on our sample. Every 64th token ends a text, so completions differ in length; the reward is
that length. The kit's side is `sft.train_sft` and `grpo.train_grpo` themselves under profile gpu, without vLLM; a
third setting is TRL's defaults over weights held in bf16. No threshold: machines differ. Without a GPU it measures
nothing. Arguments: what to measure, by a shape's name and by how a setting's name begins; none means all.
"""
import csv
import gc
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from creawrite import grpo, sft
from creawrite.data import read_sample, sample_splits
from creawrite.policies import quiet, save_model, train_tokenizer
from creawrite.settings import find_stage, make_plan
from creawrite.trainers import lora_config, run_trainer

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.csv"
COLUMNS = ("shape", "setting", "quantity", "value", "unit")
UPDATES = {"GRPO": (2, 6), "SFT": (5, 25)}  # left out as warm-up, and all; one rollout serves two updates
BF16 = dict(model_init_kwargs=dict(dtype="bfloat16"))
END_EVERY = 64
SAMPLE, PLAN = sample_splits(read_sample()), make_plan("gpu")


@dataclass(frozen=True)
class Shape:
    "A model, and how it is trained."
    config: dict  # of Qwen2Config
    lora_rank: int
    gradient_checkpointing: bool
    smaller: dict = field(default_factory=dict)  # GRPO settings that differ from profile gpu


ROPE = dict(rope_type="default", rope_theta=1e6)
QWEN = dict(vocab_size=151_936, max_position_embeddings=32_768, rope_parameters=ROPE)
SHAPES = {
    "Qwen2.5-0.5B": Shape(QWEN | dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                                      num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True),
                          lora_rank=0, gradient_checkpointing=False),
    "Qwen2.5-7B": Shape(QWEN | dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
                                    num_key_value_heads=4, intermediate_size=18_944, tie_word_embeddings=False),
                        lora_rank=16, gradient_checkpointing=True)}


def values(stage): return PLAN.values(find_stage(stage, PLAN.stages))


def device(): return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    "Until the GPU has done what it was asked."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def length(completions, completion_ids, **kwargs):
    "The toy reward: tokens of a completion."
    return [float(len(ids)) for ids in completion_ids]


class Utilisation:
    "What nvidia-smi says of the first GPU, five times a second, in a thread."

    def __enter__(self):
        command = "nvidia-smi -i 0 --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 200".split()
        self.samples, self.process = [], subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout: self.samples.append((time.perf_counter(), float(line)))

    def __exit__(self, *error):
        self.process.terminate()
        self.thread.join()

    def within(self, spans, without=()):
        "Rows with the mean per cent over samples taken in these spans of time and not in those; none without samples."
        inside = lambda at, some: any(begin <= at <= end for begin, end, *_ in some)
        seen = [value for at, value in self.samples if inside(at, spans) and not inside(at, without)]
        return [(statistics.fmean(seen), "%")] if seen else []


class Meter(TrainerCallback):
    "Watches a trainer: when updates and rollouts begin and end, real tokens and positions, padding included."

    def __init__(self): self.updates, self.rollouts, self.batches = [], [], []

    def run(self, trainer, name):
        "In the place of `trainers.run_trainer`."
        trainer.add_callback(self)
        trainer.compute_loss = self.counting(trainer.compute_loss)
        if hasattr(trainer, "_generate"): trainer._generate = self.timing(trainer._generate)
        return run_trainer(trainer, name)

    def on_step_begin(self, *args, **kwargs):
        wait()
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        wait()
        self.updates.append((self.begun, time.perf_counter()))

    def timing(self, generate):
        "A rollout, timed."
        def timed(prompts):
            wait()
            begun, out = time.perf_counter(), generate(prompts)
            wait()
            lengths = [len(ids) for ids in out[1]]  # prompt ids, completion ids, ...
            self.rollouts.append((begun, time.perf_counter(), sum(lengths), len(lengths) * max(lengths)))
            return out
        return timed

    def counting(self, compute_loss):
        "A loss, with its tokens counted."
        def counted(model, inputs, *args, **kwargs):
            masks = [inputs[key] for key in ("attention_mask", "prompt_mask", "completion_mask") if key in inputs]
            self.batches.append((time.perf_counter(), sum(m.sum() for m in masks), sum(m.numel() for m in masks)))
            return compute_loss(model, inputs, *args, **kwargs)
        return counted

    def figures(self, used, warm_up):
        "Quantity, value and unit of what came after the warm-up."
        since = self.updates[warm_up][0]
        updates = self.updates[warm_up:]
        rollouts = [rollout for rollout in self.rollouts if rollout[0] >= since]
        batches = [(int(real), size) for at, real, size in self.batches if at >= since]
        whole = sum(end - begin for begin, end in updates)
        rolling = sum(end - begin for begin, end, *_ in rollouts)
        real, size = (sum(column) for column in zip(*batches))
        rows = [("seconds per update", whole / len(updates), "s"), ("updates measured", len(updates), "updates"),
                ("train tokens per second", real / (whole - rolling), "tokens/s"),
                ("padding in training", 1 - real / size, "share")]
        if rollouts: rows += self.rollout_figures(rollouts, rolling, whole)
        if torch.cuda.is_available(): rows += [("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")]
        rows += [("GPU utilisation in training", *row) for row in used.within(updates, rollouts)]
        return rows + [("GPU utilisation in rollouts", *row) for row in used.within(rollouts)]

    def rollout_figures(self, rollouts, rolling, whole):
        written, size = (sum(rollout[i] for rollout in rollouts) for i in (2, 3))
        return [("rollout tokens per second", written / rolling, "tokens/s"),
                ("padding in rollouts", 1 - written / size, "share"),
                ("rollouts' part of the time", rolling / whole, "share"),
                ("seconds per rollout", rolling / len(rollouts), "s")]


def write_base(folder, shape):
    "A policy folder with random weights in bf16, as Qwen2.5 is published."
    greetings = [[{"role": "user", "content": f"{row.query}\n{row.response}"}] for row in SAMPLE["sft"]]
    tokenizer = train_tokenizer(greetings, 1200)
    transformers.set_seed(0)
    config = Qwen2Config(**shape.config, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, dtype="bfloat16")
    with torch.device(device()): model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = list(range(END_EVERY - 1, config.vocab_size, END_EVERY))
    save_model(folder, model, tokenizer, name="base")


def grpo_settings(shape):
    "Profile gpu, but for vLLM and what the shape says."
    own = dict(run="bench", use_vllm=False, epochs=10, max_steps=UPDATES["GRPO"][1], lora_rank=shape.lora_rank,
               gradient_checkpointing=shape.gradient_checkpointing)
    return replace(grpo.pick_settings(values("grpo") | own), **shape.smaller)


def kit_grpo(folder, shape, meter):
    grpo.run_trainer = meter.run
    grpo.train_grpo(grpo_settings(shape), "kit", folder, SAMPLE["prompts_train"], [length], [1.0])


def trl_grpo(folder, shape, meter, **weights):
    "TRL's defaults; batches, number of tokens and adapter as the kit's."
    settings, tokenizer = grpo_settings(shape), AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = grpo.prompt_rows(SAMPLE["prompts_train"], settings, tokenizer)
    config = trl.GRPOConfig(
        **plain(folder, "GRPO"), **grpo.trl_batches(settings), max_completion_length=settings.max_completion_length,
        **weights)
    adapter = lora_config(shape.lora_rank, task_type="CAUSAL_LM")
    meter.run(trl.GRPOTrainer(str(folder), [length], config, datasets.Dataset.from_list(rows),
                              processing_class=tokenizer, peft_config=adapter), "TRL")


def sft_batch(shape):
    "Rows, and the settings that both sides share."
    stage, accumulation = values("sft"), values("sft")["gradient_accumulation"]
    updates = UPDATES["SFT"][1]
    rows = SAMPLE["sft"] * -(-updates * stage["batch_size"] * accumulation // len(SAMPLE["sft"]))
    return rows, dict(gradient_accumulation_steps=accumulation, max_length=stage["max_length"], max_steps=updates)


def kit_sft(folder, shape, meter):
    sft.run_trainer, (rows, common), stage = meter.run, sft_batch(shape), values("sft")
    sft.train_sft(folder, rows, stage["seed"], precision=stage["precision"], batch_size=stage["batch_size"],
                  lora_rank=shape.lora_rank, gradient_checkpointing=shape.gradient_checkpointing,
                  learning_rate=stage["sft_learning_rate"], **common)


def trl_sft(folder, shape, meter, **weights):
    "TRL's defaults; batches, length and adapter as the kit's."
    (rows, common), batch_size = sft_batch(shape), values("sft")["batch_size"]
    config = trl.SFTConfig(**plain(folder, "SFT") | common, per_device_train_batch_size=batch_size, **weights)
    meter.run(trl.SFTTrainer(str(folder), config, train_dataset=datasets.Dataset.from_list(sft.sft_rows(rows)),
                             processing_class=AutoTokenizer.from_pretrained(folder),
                             peft_config=lora_config(shape.lora_rank)), "TRL")


def plain(folder, stage):
    "What keeps a trainer from writing, and from training longer than is measured."
    return dict(output_dir=str(folder.parent / "trainer"), report_to="none", save_strategy="no", disable_tqdm=True,
                max_steps=UPDATES[stage][1])


SETTINGS = {"GRPO kit": kit_grpo, "GRPO TRL": trl_grpo, "GRPO TRL bf16 weights": partial(trl_grpo, **BF16),
            "SFT kit": kit_sft, "SFT TRL": trl_sft, "SFT TRL bf16 weights": partial(trl_sft, **BF16)}


def measured(folder, shape, setting):
    "Quantity, value and unit of one training."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    meter = Meter()
    with Utilisation() as used: SETTINGS[setting](folder, shape, meter)
    return meter.figures(used, UPDATES[setting.split()[0]][0])


def measure(name, shape, settings):
    "Rows of one shape; a training that fails is said and left out."
    rows = []
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        write_base(Path(place) / "base", shape)
        print(f"{name}: random weights in {time.perf_counter() - begun:.0f} s", flush=True)
        for setting in settings:
            begun = time.perf_counter()
            try: found = measured(Path(place) / "base", shape, setting)
            except (RuntimeError, ValueError, TypeError) as error: found = print(f"{name}, {setting}: {error!r}") or []
            rows += [(name, setting, *row) for row in found]
            for row in found: print(f"{name}  {setting:22s} {row[0]:28s} {row[1]:12,.3f} {row[2]}", flush=True)
            print(f"{name}, {setting}: {time.perf_counter() - begun:.0f} s in all", flush=True)
    return rows


def write(rows, path):
    "The rows, and those that are there of other shapes and settings."
    old = list(csv.reader(path.open(encoding="utf-8")))[1:] if path.exists() else []
    new = {tuple(row[:2]) for row in rows}
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(COLUMNS)
        lines.writerows(row for row in old if tuple(row[:2]) not in new)
        lines.writerows((*row[:3], f"{row[3]:.5g}", row[4]) for row in rows)


def ratios(rows):
    "Every figure over that of TRL's defaults."
    found = {tuple(row[:3]): row[3] for row in rows}
    for (shape, setting, quantity), value in found.items():
        default = setting.split()[0] + " TRL"
        other = found.get((shape, default, quantity))
        if setting != default and other and quantity != "updates measured":
            print(f"{shape}  {quantity:28s} {setting} / {default}: {value / other:.2f}")


def main(names):
    if not torch.cuda.is_available(): return print("bench_gpu: no GPU here, nothing measured")
    quiet()
    versions = " ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl, peft))
    print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, {versions}", flush=True)
    rows = []
    settings = [name for name in SETTINGS if any(map(name.startswith, names))] or list(SETTINGS)
    for shape in [name for name in SHAPES if name in names] or SHAPES:
        rows += measure(shape, SHAPES[shape], settings)
        if rows: write(rows, RESULTS)
    ratios(rows)


if __name__ == "__main__": main(sys.argv[1:])
