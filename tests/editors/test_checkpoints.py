"""Saving, opening and going on: bit for bit, without pickle."""

from __future__ import annotations

import json

import pytest
import torch
from facts import facts
from safetensors.torch import load_file, save_file
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pyeditfast import UltraEditConfig, UltraEditor, load_model
from pyeditfast.checkpoints import STATE_FILE, TENSOR_FILE


def make_editor(family="llama", dtype=torch.float32, **settings):
    model = tiny_model(family, dtype)
    settings = {"lr": 1e-4, "turn_size": 10, **settings}
    return UltraEditor(
        model, tiny_tokenizer(), UltraEditConfig(mlp_modules(model, family), **settings)
    )


@pytest.mark.parametrize(
    ("family", "dtype", "rounding"),
    [
        ("llama", torch.float32, "nearest"),
        ("gpt2", torch.float32, "nearest"),
        ("llama", torch.bfloat16, "compensated"),
        ("gptj", torch.bfloat16, "stochastic"),
    ],
)
def test_a_run_in_two_parts_equals_one_run(tmp_path, family, dtype, rounding):
    edits = facts(45)
    whole = make_editor(family, dtype, rounding=rounding)
    whole.edit(edits)
    first = make_editor(family, dtype, rounding=rounding)
    first.edit(edits[:20])
    first.save(tmp_path / "half")
    second = UltraEditor.load(tmp_path / "half")
    assert (second.edits, second.turns, second.records) == (20, 2, 20)
    assert second.config == first.config
    # The size of a pass goes along, for other passes would round otherwise.
    assert second.runner.tokens_per_pass == first.runner.tokens_per_pass is not None
    second.edit(edits[second.records :])
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    for name, remainder in whole.remainders.items():
        assert torch.equal(second.remainders[name], remainder)


def test_the_edited_model_opens_with_transformers_alone(tmp_path):
    editor = make_editor()
    editor.edit(facts(10))
    editor.save(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in editor.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor)
    model, tokenizer = load_model(tmp_path)
    assert model.dtype == torch.float32
    assert tokenizer("Oslo")["input_ids"] == editor.tokenizer("Oslo")["input_ids"]


def test_no_pickle_and_nothing_left_behind(tmp_path):
    editor = make_editor()
    editor.edit(facts(3))
    editor.save(tmp_path)
    editor.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {STATE_FILE, TENSOR_FILE, "model.safetensors", "config.json"} <= names
    assert all(path.suffix in {".json", ".safetensors", ".jinja"} for path in tmp_path.iterdir())
    state = json.loads((tmp_path / STATE_FILE).read_text())
    assert state["edits"] == 3
    assert set(load_file(tmp_path / TENSOR_FILE)) == {
        f"moments.64x32.{name}" for name in ("count", "mean", "squares")
    }


def test_a_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    editor = make_editor()
    editor.edit(facts(10))
    editor.save(tmp_path)
    editor.edit(facts(20)[10:])
    monkeypatch.setattr("pyeditfast.checkpoints.save_file", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.save(tmp_path)
    assert UltraEditor.load(tmp_path).edits == 10
    assert not list(tmp_path.glob(".saving-*"))


def test_weights_of_another_state_are_refused(tmp_path):
    editor = make_editor()
    editor.edit(facts(10))
    editor.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # One element that no sample of a grid of columns would see.
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those that pyeditfast\.json was saved with"):
        UltraEditor.load(tmp_path)


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no pyeditfast\.json"):
        UltraEditor.load(tmp_path)
    (tmp_path / STATE_FILE).write_text('{"format": 1, "method": "wise"}')
    with pytest.raises(ValueError, match="method 'wise'"):
        UltraEditor.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        make_editor().save(tmp_path / "file")


def test_folders_of_the_tokenizer_are_written_over(tmp_path):
    editor = make_editor()
    editor.tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    for _ in range(2):
        editor.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_save_left_is_cleared(tmp_path):
    (tmp_path / ".saving-abandoned").mkdir()
    (tmp_path / ".saving-abandoned" / "model.safetensors").write_text("half")
    make_editor().save(tmp_path)
    assert not list(tmp_path.glob(".saving-*"))


def test_no_remote_code_even_if_the_files_ask_for_it(tmp_path, monkeypatch):
    make_editor().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "unheard_of"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path)
