"""WISE on disk: every bit comes back, on the right base model only."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from wise_worlds import EDITS, editor

import pyeditfast
from pyeditfast import WiseEditor

FAMILIES = ("llama", "gpt2")
SHARDS = {"save_freq": 2, "merge_freq": 4}


def answer(model, prompt="The capital of the island is"):
    inputs = tiny_tokenizer()(prompt, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_memory_comes_back(family, tmp_path):
    wise = editor(family, **SHARDS)
    wise.edit([*EDITS, EDITS[0]])
    wise.save(tmp_path)
    loaded = WiseEditor.load(tmp_path, tiny_model(family, layers=4))
    kept, found = wise.memories.all(), loaded.memories.all()
    assert [len(memory.edits) for memory in found] == [4, 2, 1]
    for one, other in zip(kept, found, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert (one.threshold, one.smallest_gap) == (other.threshold, other.smallest_gap)
        assert one.edits == other.edits
    assert torch.equal(answer(wise.model), answer(loaded.model))
    assert (loaded.edits, loaded.records) == (wise.edits, wise.records)


def test_editing_goes_on_where_it_stopped(tmp_path):
    whole, first = editor(**SHARDS), editor(**SHARDS)
    whole.edit(EDITS)
    first.edit(EDITS[:3])
    first.save(tmp_path)
    second = WiseEditor.load(tmp_path, tiny_model("llama", layers=4))
    second.edit(EDITS[3:])
    for one, other in zip(whole.memories.all(), second.memories.all(), strict=True):
        assert torch.equal(one.weight, other.weight)
    assert second.memories.mask_seed == whole.memories.mask_seed


def test_sampled_templates_are_kept(tmp_path):
    wise = editor(templates=None)
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    assert WiseEditor.load(tmp_path, tiny_model("llama", layers=4)).templates == wise.templates


def test_loads_on_its_own_from_the_base_model_it_names(tmp_path):
    tiny_model("llama", layers=4).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = pyeditfast.load_model(tmp_path / "base")
    wise = WiseEditor(model, tokenizer, editor().config)
    wise.edit(EDITS[:2])
    wise.save(tmp_path / "edited")
    loaded, _ = pyeditfast.load_model(tmp_path / "edited")
    assert torch.equal(answer(loaded), answer(wise.model))


def test_a_model_without_a_name_has_to_be_passed(tmp_path):
    wise = editor()
    wise.model.config.name_or_path = ""
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    with pytest.raises(ValueError, match="names no base model"):
        WiseEditor.load(tmp_path)


@pytest.mark.parametrize("changed", ["lm_head.weight", "model.layers.3.mlp.down_proj.weight"])
def test_refuses_another_base_model(changed, tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    other = tiny_model("llama", layers=4)
    with torch.no_grad():
        other.get_parameter(changed)[0, 0] += 1.0
    with pytest.raises(ValueError, match="base model with other weights"):
        WiseEditor.load(tmp_path, other)


def test_an_editor_without_edits_can_be_saved(tmp_path):
    editor().save(tmp_path)
    assert WiseEditor.load(tmp_path, tiny_model("llama", layers=4)).memories.all() == []


def test_only_the_difference_is_written(tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" not in names and "pyeditfast.safetensors" in names
    assert json.loads((tmp_path / "pyeditfast.json").read_text())["method"] == "wise"


def test_refuses_a_folder_of_another_method(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pyeditfast\.json"):
        WiseEditor.load(tmp_path)
    (tmp_path / "pyeditfast.json").write_text('{"format": 1, "method": "ultraedit"}')
    with pytest.raises(ValueError, match="'ultraedit'"):
        WiseEditor.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_a_plain_model_with_the_side_memory_in_place(family, tmp_path, caplog):
    wise = editor(family)
    wise.edit(EDITS[:2])
    before = wise.memories.main.clone()
    wise.export(tmp_path)
    assert "side memories" not in caplog.text
    assert torch.equal(wise.memories.main, before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = plain.get_parameter(f"{wise.config.edit_module}.weight").data
    side = wise.memories.current.weight
    assert torch.equal(weight, side.T if family == "gpt2" else side)


def test_export_takes_exactly_one_side_memory(tmp_path):
    wise = editor(save_freq=1, merge_freq=2)
    with pytest.raises(ValueError, match="there are 0 side memories"):
        wise.export(tmp_path)
    wise.edit(EDITS[:3])
    with pytest.raises(ValueError, match="there are 2 side memories"):
        wise.export(tmp_path)


def saved_base(folder):
    tiny_model("llama", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_model_named_by_a_relative_path_is_found_from_anywhere(tmp_path, monkeypatch):
    saved_base(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    wise = WiseEditor(*pyeditfast.load_model("base"), editor().config)
    wise.edit(EDITS[:1])
    wise.save("edited")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded, _ = pyeditfast.load_model("../edited")
    assert torch.equal(answer(loaded), answer(wise.model))


def test_comes_back_in_the_dtype_it_was_edited_in(tmp_path):
    model, tokenizer = pyeditfast.load_model(saved_base(tmp_path / "base"), dtype=torch.bfloat16)
    wise = WiseEditor(model, tokenizer, editor().config)
    wise.edit(EDITS[:1])
    wise.save(tmp_path / "edited")
    loaded = WiseEditor.load(tmp_path / "edited")
    assert loaded.layer.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.memories.all()[0].weight, wise.memories.all()[0].weight)


def test_says_which_dtype_the_base_model_must_have(tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    model = tiny_model("llama", dtype=torch.bfloat16, layers=4)
    with pytest.raises(ValueError, match=r"load the base model in torch\.float32"):
        WiseEditor.load(tmp_path, model)


def test_refuses_a_model_that_has_side_memories(tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    with pytest.raises(ValueError, match="has side memories already"):
        WiseEditor.load(tmp_path, wise.model)


@pytest.mark.parametrize("name", ["pyeditfast.json", "pyeditfast.safetensors"])
def test_a_damaged_file_is_named(name, tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match="holds a damaged save"):
        WiseEditor.load(tmp_path, tiny_model("llama", layers=4))


def test_export_leaves_a_saved_editor_alone(tmp_path):
    wise = editor()
    wise.edit(EDITS[:1])
    wise.save(tmp_path)
    with pytest.raises(ValueError, match="holds a saved editor; export to another directory"):
        wise.export(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_base_model_that_is_gone_is_named(tmp_path):
    wise = WiseEditor(*pyeditfast.load_model(saved_base(tmp_path / "base")), editor().config)
    wise.save(tmp_path / "edited")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"is no longer at .*base; load it and pass it"):
        pyeditfast.load_model(tmp_path / "edited")
    moved, _ = pyeditfast.load_model(tmp_path / "moved")
    assert WiseEditor.load(tmp_path / "edited", moved).edits == 0
