"A run as input for other engines: what goes out is complete, read as it is meant, and holds nothing that must stay."
import json
import shutil

import pytest
import torch
import yaml
from conftest import REPOSITORY, kit_command
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from creawrite.core import KitError, UsageError, read_json, run_dir, write_json
from creawrite.llamafactory import as_classifier, check_llamafactory, write_llamafactory
from creawrite.splits import load_split
from creawrite.task import TASK


@pytest.fixture
def exported(smoke_run, tmp_path):
    "LLaMA-Factory's folder of a smoke run."
    write_llamafactory(smoke_run, tmp_path / "lf")
    return tmp_path / "lf"


def test_every_row_goes_to_llamafactory(exported, smoke_run):
    info = read_json(exported / "dataset_info.json")
    assert (exported / "dataset_info.json").read_bytes().isascii()
    for split, name in (("sft", "creawrite_sft"), ("pairs_train", "creawrite_rm"), ("pairs_test", "creawrite_rm_test")):
        records, rows = read_json(exported / info[name]["file_name"]), load_split(smoke_run, split)
        assert len(records) == len(rows) > 0
        asked = records[0]["prompt"] if split == "sft" else records[0]["conversations"][0]["value"]
        assert asked == TASK.prefix + rows[0].query
    assert "CC0" in (exported / "README.md").read_text("utf-8")


def test_settings_are_the_papers_and_small_ones(exported):
    files = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in exported.glob("*.yaml")}
    assert set(files) == {"sft_paper", "sft_small", "rm_paper", "rm_small"}
    paper = files["rm_paper"]  # paper, training of the reward model
    assert [paper[name] for name in ("lora_rank", "learning_rate", "num_train_epochs")] == [16, 2e-4, 5]
    assert paper["per_device_train_batch_size"] * paper["gradient_accumulation_steps"] == 128
    assert files["rm_small"]["use_cpu"] and files["rm_small"]["max_steps"] == 2 and files["rm_small"]["stage"] == "rm"


def changed(folder, name, change):
    "A file of an export, edited."
    value = read_json(folder / name)
    change(value)
    write_json(folder / name, value)


@pytest.mark.parametrize("name, change, says", [
    ("creawrite_rm.json", lambda rows: rows[2]["conversations"][0].update({"from": "user"}), "row 3: roles .* are not"),
    ("creawrite_rm.json", lambda rows: rows[4]["rejected"].update({"from": "assistant"}), "row 5: rejected is no turn"),
    ("creawrite_rm.json", lambda rows: rows.pop(), "131 rows, not the 132 of the run"),
    ("dataset_info.json", lambda info: info["creawrite_rm"].pop("ranking"), 'no "ranking": true')])
def test_what_llamafactory_would_misread_is_told(exported, name, change, says):
    changed(exported, name, change)
    with pytest.raises(KitError, match=says): check_llamafactory(exported, {"creawrite_rm": 132})


def test_a_description_that_is_not_ascii_is_told(exported):
    path = exported / "dataset_info.json"
    path.write_text(path.read_text().replace("creawrite_sft", "祝福"), "utf-8")
    with pytest.raises(KitError, match="not ASCII"): check_llamafactory(exported)


def test_released_rows_stay_unless_asked_for(smoke_run, tmp_path, monkeypatch):
    shutil.copytree(run_dir(smoke_run) / "data", tmp_path / "outputs/a/data")
    for name in ("nbs", "settings.ini"): (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.setenv("CREAWRITE_ROOT", str(tmp_path))
    write_json(tmp_path / "outputs/a/data/source.json", {"source": "released"})
    assert write_llamafactory("a", tmp_path / "without") == {}
    assert not list((tmp_path / "without").glob("creawrite_*.json"))
    assert "--include-data" in (tmp_path / "without/README.md").read_text("utf-8")
    assert write_llamafactory("a", tmp_path / "with", include_data=True)["creawrite_sft"] == 132
    assert "states no licence" in (tmp_path / "with/README.md").read_text("utf-8")


def test_a_key_or_a_path_ends_an_export(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", TASK.prefix[:8])
    with pytest.raises(KitError, match="holds a key"): write_llamafactory(smoke_run, tmp_path / "lf")


def test_the_command_and_its_errors(smoke_run, tmp_path):
    command = kit_command("export", "llamafactory", smoke_run, str(tmp_path / "lf"))
    assert "creawrite_sft 132 rows" in command.communicate()[0] and command.returncode == 0
    command = kit_command("export", "llamafactory", smoke_run, str(tmp_path / "lf"))
    assert "not empty: name a new folder" in command.communicate()[0] and command.returncode == 2
    with pytest.raises(UsageError, match="has no data yet"): write_llamafactory("no-such-run", tmp_path / "none")


def test_a_value_head_becomes_a_score(smoke_run, tmp_path):
    base = run_dir(smoke_run) / "sft/base"
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    head = torch.nn.Linear(model.config.hidden_size, 1)
    tuned.save_pretrained(tmp_path / "rm")
    state = {f"v_head.summary.{name}": value.detach() for name, value in head.named_parameters()}
    save_file(state, tmp_path / "rm/value_head.safetensors")
    inputs = tokenizer("妈妈，生日快乐。<|im_end|>\n", return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        last = tuned(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
        scorer, _ = as_classifier(tmp_path / "rm", str(base))
        assert abs(float(head(last) - head.bias) - float(scorer(**inputs).logits)) < 0.01
    (tmp_path / "rm/value_head.safetensors").unlink()
    with pytest.raises(KitError, match="no value_head.safetensors"): as_classifier(tmp_path / "rm", str(base))


def test_an_export_can_be_read_as_json_by_anybody(exported):
    for path in exported.glob("*.json"): json.loads(path.read_bytes())
