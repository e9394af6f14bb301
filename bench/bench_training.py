"""SFT, reward-model and GRPO steps of the kit beside a bare PyTorch loop that does the same arithmetic without padding.

The model of profile cpu (hidden 256, 4 layers, vocabulary 4,000) from scratch, one thread, rows of our own sample. The
bare loop gets the same numbers of rows and of tokens per step, in batches that need no padding: a forward and a
backward pass, clipped gradients, AdamW. Both take turns; CPU seconds of this process, so that a busy machine matters
less. No threshold: machines differ.
"""
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

KIT, TURNS, STEPS, FIRST = Path(__file__).resolve().parents[1], 3, 24, 4
SHAPE = dict(hidden=256, layers=4, heads=4, intermediate=768)
FAST = dict(seed=1, batch_size=16, learning_rate=1e-3, max_steps=STEPS, max_length=192, precision="fp32",
            gradient_checkpointing=False)


class Clock:
    "CPU seconds and tokens of every step of a trainer."

    def __init__(self): self.steps, self.tokens = [], 0

    def watch(self, trainer):
        from transformers import TrainerCallback
        clock, loss = self, trainer.compute_loss

        class Watch(TrainerCallback):
            def on_step_begin(self, *args, **kwargs): clock.tokens = 0

            def on_step_end(self, *args, **kwargs): clock.steps.append((time.process_time(), clock.tokens))

        def compute_loss(model, inputs, **kwargs):
            clock.tokens += sum(int(mask.sum()) for name, mask in inputs.items() if name.endswith("_mask"))
            return loss(model, inputs, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.add_callback(Watch())

    def measured(self) -> list[tuple[float, int]]:
        "Seconds and tokens of each step but the first few."
        times = [moment for moment, _ in self.steps]
        return [(end - begin, tokens) for begin, end, (_, tokens)
                in zip(times[FIRST:], times[FIRST + 1:], self.steps[FIRST + 1:])]


def of_kit(module, train) -> tuple[list[tuple[float, int]], object]:
    "Seconds and tokens of each step of one of the kit's trainings, and the log."
    clock, run_trainer = Clock(), module.run_trainer

    def watched(trainer, *args, **kwargs):
        clock.watch(trainer)
        return run_trainer(trainer, *args, **kwargs)

    module.run_trainer = watched
    try:
        with contextlib.redirect_stdout(io.StringIO()): log = train()[-1]
    finally: module.run_trainer = run_trainer
    return clock.measured(), log


def of_loop(model, loss_of, sizes, rows) -> list[tuple[float, int]]:
    "Seconds and tokens of each step of a bare loop."
    import torch
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, measured = torch.optim.AdamW(weights, lr=1e-3, fused=True), []
    model.train()
    for size in sizes:
        ids = torch.randint(3, model.config.vocab_size, (rows, max(2, round(size / rows))))
        begin = time.process_time()
        loss_of(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured.append((time.process_time() - begin, ids.numel()))
    return measured


def language_loss(model, ids):
    "Of the next token, everywhere."
    from torch.nn.functional import cross_entropy
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))


def pair_loss(model, ids):
    "Bradley-Terry."
    from torch.nn.functional import logsigmoid
    chosen, rejected = model(input_ids=ids, use_cache=False).logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def measure_sft(splits, base, tokenizer):
    "The base's training: queries and greetings."
    from creawrite import sft
    from creawrite.policies import new_model
    fresh = lambda: new_model(tokenizer, seed=1, **SHAPE)
    rows = sft.base_rows(splits["pairs_train"])
    kit = lambda: of_kit(sft, lambda: sft.fit_sft(fresh(), tokenizer, rows, "base", lora_rank=0, **FAST))
    return kit, lambda sizes: of_loop(fresh(), language_loss, sizes, 16)


def measure_rm(splits, base, tokenizer):
    "The reward model, LoRA of rank 16."
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from creawrite import reward_model
    from creawrite.trainers import lora_config

    def fresh():
        plain = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        return get_peft_model(plain, lora_config(16, task_type="SEQ_CLS", modules_to_save=["score"]))

    train = lambda: reward_model.train_reward_model((str(base), {}), splits["pairs_train"], lora_rank=16, **FAST)
    return lambda: of_kit(reward_model, train), lambda sizes: of_loop(fresh(), pair_loss, sizes, 32)


def grpo_settings(**changes):
    "A step of profile cpu: 16 prompts, 8 completions each, of 48 tokens at most, in two micro-batches."
    from creawrite.rl import pick_settings
    from creawrite.settings import defaults
    cpu = dict(run="bench", precision="fp32", prompts_per_rollout=16, num_generations=8, prompts_per_update=16,
               micro_batch=64, learning_rate=1e-5, max_steps=STEPS // 3, max_prompt_length=96, max_completion_length=48,
               n_watch=0, checkpoint_every=0, stop_on_collapse=False)
    return pick_settings(defaults("grpo") | cpu | changes)


def short_texts(prompts, completions, **columns):
    "A reward that costs nothing."
    return [-float(len(text[-1]["content"])) for text in completions]


def trained_policy(splits, base, tokenizer):
    "A policy that ends its texts, so that they differ in length."
    from creawrite import policies, sft
    rows = sft.base_rows(splits["pairs_train"])
    with contextlib.redirect_stdout(io.StringIO()):
        model = sft.fit_sft(policies.new_model(tokenizer, seed=1, **SHAPE), tokenizer, rows, "base", lora_rank=0,
                            **FAST | dict(max_steps=60))[0]
    policies.save_model(base.with_name("policy"), model, tokenizer, name="base")
    return base.with_name("policy")


def step_of_loop(model, reference, optimizer, prompts, size, settings):
    "Rollout, reference, policy, update: bare, on as many tokens, with no pad among them."
    import torch
    from torch.nn.functional import cross_entropy
    rows = settings.prompts_per_rollout * settings.num_generations

    def logps(of, ids):
        logits = of(input_ids=ids, use_cache=False).logits[:, :-1]
        return -cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")

    with torch.no_grad():
        ids = torch.randint(3, model.config.vocab_size, (rows, prompts))
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0, top_k=0,
                       max_new_tokens=settings.max_completion_length, min_new_tokens=settings.max_completion_length)
    batch = torch.randint(3, model.config.vocab_size, (rows, round(size / rows)))
    with torch.no_grad(): before = [logps(reference, ids) for ids in batch.split(settings.micro_batch)]
    for ids, old in zip(batch.split(settings.micro_batch), before):
        now = logps(model, ids)
        ratio = torch.exp(now - now.detach())
        loss = torch.min(ratio, ratio.clamp(0.8, 1.2)) * torch.randn(len(ids), 1)
        (settings.beta * (torch.exp(old - now) - (old - now) - 1) - loss).sum().div(size).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure_grpo(splits, base, tokenizer):
    "Rollouts, reference and update; a step's tokens are those of its prompts and completions."
    import torch

    from creawrite import rl
    from creawrite.policies import load_policy, policy_messages, token_counts
    policy, settings, prompts = trained_policy(splits, base, tokenizer), grpo_settings(), splits["prompts_train"]
    lengths = token_counts(tokenizer, [policy_messages(row.query) for row in prompts], answers=True)
    train = lambda: (rl.train_grpo(settings, "bench", policy, prompts, [short_texts], [1.0]).log,)

    def loop(sizes):
        model, reference, measured = load_policy(policy)[0].train(), load_policy(policy)[0], []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for size in sizes:
            begin = time.process_time()
            step_of_loop(model, reference, optimizer, round(sum(lengths) / len(lengths)), size, settings)
            measured.append((time.process_time() - begin, size))
        return measured
    return lambda: of_kit(rl, train), loop


class AskedReward:
    "A judge on loopback, asked through the kit's client."
    __name__ = "judge"

    def __init__(self, url, folder):
        from creawrite.budget import Limits
        from creawrite.engines import Endpoint, remote_client
        from creawrite.ledger import Ledger
        from creawrite.llm import LLM
        endpoint = remote_client(Endpoint(base_url=url, model="m"))
        self.llm, self.asked = LLM(Ledger(folder / "ledger.sqlite"), "m @ bench", endpoint, "m", "auto", Limits()), 0

    async def __call__(self, prompts, completions, query, **columns):
        from asker import Verdict

        from creawrite.llm import gather
        from creawrite.messages import chat
        jobs = []
        for text in completions:
            self.asked += 1
            turns = chat("判断。", {"id": self.asked, "text": text[-1]["content"]}, Verdict)
            jobs.append(self.llm.ask("judge", turns, Verdict, max_tokens=64))
        return [None if answer is None else answer.judge / 6 for answer in await gather(jobs)]


def measure_latency(splits, base, tokenizer):
    "Seconds on the clock of a GRPO step whose judge answers at once, and whose judge takes 100 ms."
    sys.path.insert(0, str(KIT / "tests"))
    from faults import Served

    from creawrite import rl
    os.environ["OPENAI_API_KEY"] = "none"
    policy, seconds = trained_policy(splits, base, tokenizer), {0.0: [], 0.1: []}
    for _ in range(TURNS):
        for latency, steps in seconds.items():
            with Served(latency=latency, spread=False) as server, tempfile.TemporaryDirectory() as folder:
                reward = AskedReward(server.url, Path(folder))
                with contextlib.redirect_stdout(io.StringIO()):
                    log = rl.train_grpo(grpo_settings(), "bench", policy, splits["prompts_train"], [reward], [1.0]).log
                steps += log[log.metric == "step_time"].value.tolist()[1:]
    at_once, late = (statistics.median(steps) for steps in seconds.values())
    print(f"a judge that takes 100 ms: {late:.3f} s a step, {at_once:.3f} s at once: {late / at_once - 1:+.1%}")


MEASURES = {"SFT": measure_sft, "reward model": measure_rm, "GRPO": measure_grpo}


def rate(measured) -> float:
    "Microseconds of CPU per token."
    return statistics.median(seconds / tokens * 1e6 for seconds, tokens in measured)


def compare(name, splits, base, tokenizer):
    "Kit and loop in turns; one line of the table."
    kit, loop = MEASURES[name](splits, base, tokenizer)
    ours, bare = [], []
    for _ in range(TURNS):
        now, log = kit()
        ours += now
        bare += loop([tokens for _, tokens in now])
    padding = log[log.metric == "padding"].value.mean()
    seconds = statistics.median(seconds for seconds, _ in ours)
    ratio = f"{rate(ours):13.1f} {rate(bare):14.1f} {rate(ours) / rate(bare):6.2f} {padding:9.1%}"
    print(f"{name:14s} {seconds:7.3f} {ratio}", flush=True)


def main(names):
    "All measures, or those that are named."
    import torch
    import transformers

    from creawrite import policies, sft
    from creawrite.data import read_sample, sample_splits
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        splits = sample_splits(read_sample())
        tokenizer = sft.base_tokenizer(splits["pairs_train"], 4000)
        base = Path(folder) / "base"
        policies.save_model(base, policies.new_model(tokenizer, seed=1, **SHAPE), tokenizer, name="base")
        print("training        s/step  kit us/token  loop us/token  ratio   padding")
        for name in names or [*MEASURES, "latency"]:
            if name == "latency": measure_latency(splits, base, tokenizer)
            else: compare(name, splits, base, tokenizer)


if __name__ == "__main__":
    os.environ["CREAWRITE_ROOT"] = str(KIT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
