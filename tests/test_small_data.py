"Data of any size passes, or it is said what it lacks; of a parameter that cannot work it is said before any work."
import asyncio, json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from creawrite import fingerprint, grpo, multi_agent, policies, reward_model, rewards, sft, trainers
from creawrite.core import KitError, read_json, run_dir, write_json, write_jsonl
from creawrite.judge import DebateRecord
from creawrite.multi_agent import Group
from creawrite.parts import split_pairs
from creawrite.policies import check_model, policy_dir, save_model
from creawrite.settings import defaults, read_pattern
from creawrite.splits import PreferencePair

from conftest import REPOSITORY

RUN = "small"
STAGES = {name: defaults(name) for name in ("sft", "reward_model", "grpo")}
SIZES = dict(vocabulary=300, hidden=16, layers=1, heads=2, intermediate=32)
SHAPE = {name: SIZES[name] for name in ("hidden", "layers", "heads", "intermediate")}
FAST = dict(batch_size=32, max_length=192, precision="fp32", gradient_checkpointing=False)


def pair(i, query=None, chosen=None):
    texts = dict(chosen=chosen or f"愿你第{i}年花开满树，灯火可亲。", rejected=f"第{i}份快乐。")
    return {"id": f"p{i}", "query": query or f"给第{i}位邻居的生日祝福", **texts}


def write_data(pairs, run=RUN):
    "A folder of own data: the rows of every split made of these pairs."
    data = run_dir(run) / "data"
    write_jsonl(data / "pairs_train.jsonl", pairs)
    write_jsonl(data / "pairs_test.jsonl", pairs[:3])
    rows = [{"id": row["id"], "query": row["query"], "response": row["chosen"]} for row in pairs]
    write_jsonl(data / "sft.jsonl", rows)
    prompts = [{"id": row["id"], "query": row["query"]} for row in pairs]
    write_jsonl(data / "prompts_train.jsonl", prompts)
    write_jsonl(data / "prompts_test.jsonl", prompts[:2])


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A kit of its own with thirty pairs and two policies of random weights."
    folder = tmp_path_factory.mktemp("kit")
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[smoke]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREAWRITE_ROOT", str(folder))
        patch.setenv("HOME", str(folder / "home"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        torch.set_num_threads(1)
        write_data([pair(i) for i in range(30)])
        tokenizer = sft.base_tokenizer(policies_pairs(), 300)
        for name in ("base", "sft"):
            save_model(policy_dir(RUN, name), policies.new_model(tokenizer, seed=1, **SHAPE), tokenizer, name=name)
        shutil.copytree(policy_dir(RUN, "base"), folder / "home" / "model")
        yield folder


def policies_pairs(run=RUN): return sft.load_split(run, "pairs_train")


def values(stage, **changes): return STAGES[stage] | {"run": RUN} | (SIZES if stage == "sft" else {}) | changes


def start(stage, **changes):
    "What the stage checks before any work."
    given = values(stage, **changes)
    if stage == "sft": sft.check_sft(RUN, given)
    if stage == "reward_model": reward_model.check_reward_model(RUN, given)
    if stage == "grpo": grpo.check_grpo(grpo.pick_settings(given), given)


@pytest.mark.parametrize("stage", STAGES)
def test_thirty_rows_may_start(stage): start(stage)


REFUSED = [
    ("sft", dict(batch_size=0), "sft.batch_size = 0 must be above 0"),
    ("sft", dict(sft_learning_rate=-1e-3), "sft.sft_learning_rate = -0.001"),
    ("sft", dict(base_epochs=0), "sft.base_epochs = 0"), ("sft", dict(lora_rank=-1), "sft.lora_rank = -1"),
    ("sft", dict(max_length=float("nan")), "sft.max_length = nan"),
    ("sft", dict(max_length=5), "sft.max_length = 5 leaves nothing of any greeting: .* takes [0-9]+ tokens"),
    ("sft", dict(vocabulary=100), "259"), ("sft", dict(hidden=18, heads=4), "such as 16"),
    ("sft", dict(hidden=60, heads=5), "cannot be halved"), ("sft", dict(precision="half"), "precision = 'half'"),
    ("sft", dict(model="no/such"), "neither a folder nor in the hub's cache.*offline"),
    ("sft", dict(model="~/nowhere"), "~/nowhere is no folder"), ("sft", dict(model="./nowhere"), "is no folder"),
    ("sft", dict(model="no/such/folder/"), "is no folder"), ("sft", dict(model="settings.ini"), "hub's cache"),
    ("sft", dict(model="./settings.ini"), "is a file"), ("sft", dict(model="nbs"), "has no config.json"),
    ("sft", dict(model="~/model", max_length=4096), "more than the 2048 tokens"),
    ("reward_model", dict(learning_rate=0), "reward_model.learning_rate = 0"),
    ("reward_model", dict(max_length=3), "leaves none of 30 pairs: the shortest takes [0-9]+ tokens"),
    ("reward_model", dict(max_length=9999), "more than the 2048"),
    ("reward_model", dict(model="~/nowhere"), "reward_model.model = ~/nowhere is no folder"),
    ("reward_model", dict(debias="half"), "not one of none"),
    ("reward_model", dict(debias="matched", close=0), "raise it, or use"),
    ("reward_model", dict(compare_epochs=-1), "0 or more"),
    ("grpo", dict(runs=["sft-rm2"]), "grpo.runs names 'sft-rm2'.*nearest is 'sft-rm'"),
    ("grpo", dict(runs=["base"]), "grpo.runs names 'base'"), ("grpo", dict(runs=[]), "grpo.runs is empty"),
    ("grpo", dict(runs=["sft-rm", "sft-rm"]), "twice"), ("grpo", dict(seeded=["sft-rn"]), "nearest is 'sft-rm'"),
    ("grpo", dict(num_generations=1), "take 2 at least"), ("grpo", dict(temperature=0), "grpo.temperature = 0"),
    ("grpo", dict(workers=0), "grpo.workers = 0"), ("grpo", dict(gpus=0), "grpo.gpus = 0"),
    ("grpo", dict(gpus=64), "this machine has"), ("grpo", dict(micro_batch=7), "do not divide"),
    ("grpo", dict(max_prompt_length=2), "leaves 0 of 30 training prompts"),
    ("grpo", dict(max_completion_length=1), "the shortest of 30 SFT rows takes [0-9]+ tokens"),
    ("grpo", dict(max_prompt_length=2001), "more than the 2048"),
    ("grpo", dict(n_prompts=3), "3 training prompts are fewer than one rollout takes .4."),
    ("grpo", dict(max_steps=0, epochs=0), "grpo.epochs = 0"), ("grpo", dict(beta=-1), "grpo.beta = -1")]


@pytest.mark.parametrize("stage, changes, words", REFUSED)
def test_a_parameter_that_cannot_work_is_told_in_one_sentence(stage, changes, words):
    with pytest.raises(KitError, match=words) as told: start(stage, **changes)
    assert "\n" not in str(told.value) and not str(told.value).endswith(".")


def test_vllm_where_there_is_none(monkeypatch):
    monkeypatch.setattr(grpo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KitError, match="vLLM is not installed"): start("grpo", use_vllm=True)
    monkeypatch.setattr(grpo.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(grpo.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(KitError, match="no GPU"): start("grpo", use_vllm=True)


def test_bf16_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(KitError, match="take auto or fp32"): trainers.bf16("bf16")


@pytest.mark.parametrize("number, module, check", [
    ("05", "sft", "check_sft(run, globals())"), ("06", "reward_model", "check_reward_model(run, globals())"),
    ("07", "grpo", "check_grpo(settings, globals())")])
def test_a_stage_checks_before_it_works(number, module, check):
    notebook = read_json(REPOSITORY / "nbs" / f"{number}_{module}.ipynb")
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    called = [source for source in cells if "#| export" not in source]
    at = called.index(check)
    assert not [source for source in called[:at] if "fit_" in source or "make_" in source or "generate(" in source]
    assert any("make_" in source or "train_all" in source for source in called[at:])


def edited(**changes):
    def edit(folder):
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | changes)
    return edit


def without(*names):
    def edit(folder):
        for name in names: (folder / name).unlink()
    return edit


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def beside(name):
    "Only an adapter, or only a GGUF file."
    def edit(folder):
        for path in folder.iterdir(): path.unlink()
        (folder / name).write_text("{}")
    return edit


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"
INDEX = json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}).encode()
RAISING = b"{{ raise_exception('no user turns') }}"
FOLDERS = {
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("model.safetensors"), "has no weights .model.safetensors."),
    "a missing part": (written("model.safetensors.index.json", INDEX), "has no weights .model-00001"),
    "weights cut off": (written("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"), "model.safetensors is cut off"),
    "a pointer": (written("model.safetensors", POINTER), "only a pointer"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "has no tokenizer"),
    "half a tokenizer": (without("tokenizer.json"), "has no tokenizer"),
    "a broken tokenizer": (written("tokenizer.json", b"{"), "its tokenizer cannot be loaded"),
    "no chat template": (without("chat_template.jinja"), "has no chat template"),
    "a template that refuses": (written("chat_template.jinja", RAISING), "chat template refuses"),
    "no known model": (edited(model_type="nosuch"), "config.json cannot be loaded"),
    "a broken config": (written("config.json", b"{"), "config.json cannot be loaded"),
    "no writer": (edited(architectures=["Qwen2ForSequenceClassification"]), "writes no text"),
    "another's tokenizer": (edited(vocab_size=290), "not of one model"),
    "an adapter": (beside("adapter_config.json"), "only an adapter"),
    "GGUF alone": (beside("model.gguf"), "only GGUF files")}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_model_folder_that_cannot_be_trained_on(fault, tmp_path):
    edit, words = FOLDERS[fault]
    folder = Path(shutil.copytree(policy_dir(RUN, "base"), tmp_path / "m"))
    edit(folder)
    with pytest.raises(KitError, match=words) as told: check_model("sft.model = m", str(folder))
    assert "\n" not in str(told.value)


def test_a_model_is_found_by_home_kit_and_absolute_path(home):
    shutil.copytree(home / "home" / "model", home / "models" / "one")
    names = ("~/model", "models/one", "./models/one/", str(home / "models" / "one"))
    for name in names: start("sft", model=name)
    places = [Path(policies.model_start(name)[0]) for name in names]
    assert places == [home / "home" / "model"] + [home / "models" / "one"] * 3
    assert [Path(read_pattern("./{model}/", {"model": name}, RUN)) for name in names] == places


def test_a_pointer_from_the_home_folder_is_a_policy(home):
    write_data([pair(i) for i in range(4)], "pointer")
    sft.make_base("pointer", 1, "~/model", "", 300, SHAPE)
    assert policies.check_policy("pointer", "base")[1] == 2048
    assert len(policies.generate(policy_dir("pointer", "base"), ["生日"], max_new_tokens=2)) == 1
    assert policies.model_inputs(policy_dir("pointer", "base"))["folder"] == home / "home" / "model"
    before = read_json(policy_dir("pointer", "base") / "policy.json")["content"]
    written("README.md", b"other")(home / "home" / "model")
    sft.make_base("pointer", 1, "~/model", "", 300, SHAPE)
    assert read_json(policy_dir("pointer", "base") / "policy.json")["content"] != before
    shutil.move(home / "home" / "model", home / "home" / "gone")
    with pytest.raises(KitError, match="is no folder"): policies.check_policy("pointer", "base")
    shutil.move(home / "home" / "gone", home / "home" / "model")


def test_a_reward_model_stands_on_the_content_of_its_folder(home, monkeypatch):
    keys, folder = [], Path(shutil.copytree(home / "home" / "model", home / "counted"))
    note = lambda *arguments: keys.append(fingerprint.fingerprint(*arguments)) or keys[-1]
    monkeypatch.setattr(reward_model, "fingerprint", note)
    monkeypatch.setattr(reward_model, "trained_before", lambda *_: True)
    make = lambda: reward_model.make_reward_model(RUN, "model", policies_pairs()[:2], 1, "counted", "none")
    make()
    make()
    written("model.safetensors", b"others")(folder)
    make()
    assert keys[0] == keys[1] != keys[2]


def test_a_tokenizer_of_nothing_is_none():
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), chat_template=policies.CHATML)
    with pytest.raises(KitError, match="has no tokenizer"): policies.check_chat(empty, "m")


ODD = {
    "one row": [pair(1)], "eight rows": [pair(i) for i in range(8)],
    "one query": [pair(i, "给妈妈的生日祝福") for i in range(8)],
    "one length": [pair(i, chosen=f"愿{i}年好") for i in range(8)],
    "long texts": [pair(i, chosen="愿山海" * (60 + i) + "好") for i in range(8)],
    "emoji": [pair(i, "🎂" * (i + 1), "🎉🌸" * (i + 2)) for i in range(8)],
    "English": [pair(i, f"a wish for number {i}", f"May year {i} be bright.") for i in range(8)]}


def loss_cell():
    "The self-check of stage 05, as its notebook has it."
    notebook = read_json(REPOSITORY / "nbs" / "05_sft.ipynb")
    return next("".join(cell["source"]) for cell in notebook["cells"] if "the loss did not fall" in str(cell["source"]))


def check_loss(kind, **changes):
    "Train both policies in a few steps, then run that cell."
    write_data(ODD[kind], run := kind.replace(" ", "-"))
    common, rates = FAST | {"max_steps": 2}, dict(base_learning_rate=3e-3, sft_learning_rate=1e-3) | changes
    sft.make_base(run, 42, "", "", 300, SHAPE, learning_rate=rates["base_learning_rate"], **common)
    sft.make_sft(run, 42, 0, lora_rank=0, learning_rate=rates["sft_learning_rate"], **common)
    scope = vars(sft) | dict(run=run, model="", seed=42, n_rows=0, vocabulary=300, shape=SHAPE, max_length=192,
                             folder=run_dir(run) / "sft", read_json=read_json)
    exec(compile(loss_cell(), "05_sft", "exec"), scope)


@pytest.mark.parametrize("kind", ODD)
def test_the_loss_check_passes_at_any_size(kind): check_loss(kind)


@pytest.mark.parametrize("changes, words", [
    (dict(sft_learning_rate=1e-12), "sft: the loss did not fall"),
    (dict(sft_learning_rate=3.0), "sft: the loss did not fall"),
    (dict(base_learning_rate=1e-12), "base: the loss did not fall")])
def test_the_loss_check_fails_at_any_size(changes, words):
    with pytest.raises(AssertionError, match=words): check_loss("eight rows", **changes)


def test_rows_that_are_cut_are_counted(capsys):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir(RUN, "base"))
    rows = [sft.SFTRow(id=str(i), query="生日" * 40 * i or "生日", response="愿你平安" * 9) for i in range(2)]
    sft.check_lengths(tokenizer, rows, 60)
    told = capsys.readouterr().out
    assert "2 of 2 SFT rows are longer than max_length = 60 tokens and are cut, 1 of them before" in told
    pairs = [PreferencePair(**pair(i, chosen="山" * 400 if i else None)) for i in range(2)]
    reward_model.check_pair_lengths(tokenizer, pairs, 100)
    assert "1 of 2 pairs are longer" in capsys.readouterr().out


@pytest.mark.parametrize("source, lines, words", [
    ("multi_agent", 0, "gives 0 pairs.*raise multi_agent.n_queries"), ("multi_agent", 1, "gives 1 pairs.*at least 2"),
    ("data", 1, "gives 1 pairs.*add rows to pairs_train")])
def test_too_few_pairs_for_a_reward_model(source, lines, words):
    run = f"few-{source}-{lines}"
    write_data([pair(1)], run)
    write_jsonl(run_dir(run) / "multi_agent" / "pairs.jsonl", [pair(2)] * lines)
    with pytest.raises(KitError, match=words): reward_model.training_pairs(run, source)


def test_no_pair_from_multi_agent_is_said_aloud(capsys):
    records = [DebateRecord(query="生日", response=text, final=1) for text in ("愿你平安", "愿你常乐")]
    write_jsonl(run_dir("agreed") / "multi_agent" / "records.jsonl", [Group(query="生日", records=records)])
    assert multi_agent.write_pairs("agreed", 42, 0, True) == ([], 0)
    assert "raise multi_agent.n_candidates" in capsys.readouterr().out
    facts = multi_agent.record_facts([Group(query="生日", records=records)])
    assert (multi_agent.table_report(facts, [], 1).n >= 0).all()


@pytest.mark.parametrize("number", ["n_candidates", "n_votes", "max_new_tokens"])
def test_counts_of_multi_agent(number):
    counts = dict(n_candidates=1, n_votes=1, max_new_tokens=1) | {number: 0}
    with pytest.raises(KitError, match=f"multi_agent.{number} = 0 must be above 0"):
        asyncio.run(multi_agent.label_candidates(RUN, None, [], [], "llm", seed=1, **counts))
    with pytest.raises(KitError, match="n_queries = 0"): multi_agent.choose_queries(RUN, 0, 1)


@pytest.mark.parametrize("rows, words", [
    ([pair(i) for i in range(3)], "3 training pairs .* add 1 with other queries"),
    ([pair(i, "给妈妈的生日祝福") for i in range(9)], "9 training pairs in 1 unlike groups .* add 2 with other")])
def test_too_few_pairs_for_the_game_say_how_many_more(rows, words):
    pairs = [PreferencePair(**row) for row in rows]
    with pytest.raises(KitError, match=words): split_pairs(pairs, 40, 60, 42)


def test_two_small_groups_are_enough_to_hold_out():
    texts = ("山高水长", "灯火可亲", "月色照亮归家的路")
    rows = [pair(i, "给妈妈的生日祝福") for i in range(10)]
    rows += [dict(id=text, query=text, chosen=f"{text}，愿君珍重", rejected=f"{text * 2}！") for text in texts[:2]]
    for seed in range(5):
        parts = split_pairs([PreferencePair(**row) for row in rows], 40, 60, seed)
        assert [len(parts.teaching), len(parts.validation), parts.test.n] == [20, 2, 2]


def test_one_test_pair_and_none_of_equal_length_are_drawn():
    log = reward_model.pd.DataFrame([(1, "accuracy", 0.5)], columns=["step", "metric", "value"])
    for margin in (np.array([0.3]), np.zeros(4)):
        assert len(reward_model.figure_margins(log, margin, margin[:0]).axes) == 2
    one = [PreferencePair(**pair(1))]
    table = reward_model.table_calibration({"x": np.array([0.3])}, one, {"all": ["p1"], "length_matched": []})
    assert len(reward_model.figure_calibration(table).axes) == 2


@pytest.mark.filterwarnings("error")
def test_no_held_out_prompt_gives_no_gain(capsys):
    "Every test prompt stands in training: the stage says so, and its table has rows without numbers."
    settings = grpo.pick_settings(values("grpo"))

    class Never:
        __name__ = "reward_model"
        async def __call__(self, prompts, completions, query, **kwargs): return [1.0 for _ in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "reward_of", lambda *_: Never())
        patch.setattr(grpo, "generate", lambda *_, **__: [])
        table = asyncio.run(grpo.table_gains(settings, ["base-rm"], 12))
    assert table.n.tolist() == [0] and table.gain.isna().all() and rewards.REWARD_MAKERS
    assert "every test prompt stands in a training split" in capsys.readouterr().out
