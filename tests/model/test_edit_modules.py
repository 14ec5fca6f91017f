"""Edit modules are found by name, and refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import mlp_modules, tiny_model
from torch import nn

from pyeditfast.errors import UnknownModuleError, UnsupportedWeightError
from pyeditfast.model.edit_modules import find_edit_modules


def test_linear_and_conv1d_show_the_same_layout():
    for family in ("llama", "gpt2"):
        model = tiny_model(family)
        (first, _) = find_edit_modules(model, mlp_modules(model, family))
        assert first.shape == (64, 32)
        assert first.weight.shape == (32, 64)
        first.weight[0, 1] = 42.0
        stored = first.module.weight
        assert (stored[0, 1] if family == "llama" else stored[1, 0]) == 42.0


def test_an_unknown_name_suggests_the_nearest():
    model = tiny_model("llama")
    with pytest.raises(UnknownModuleError, match="nearest are") as error:
        find_edit_modules(model, ["model.layers.1.mlp.down_porj"])
    assert "model.layers.1.mlp.down_proj" in str(error.value)
    with pytest.raises(UnknownModuleError, match=r"model\.layers\.2\.mlp\.up_proj"):
        find_edit_modules(model, ["language_model.model.layers.2.mlp.up_proj"])


def test_lists_that_make_no_sense():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="edit_modules is empty"):
        find_edit_modules(model, [])
    with pytest.raises(ValueError, match="more than once"):
        find_edit_modules(model, ["model.layers.1.mlp.up_proj"] * 2)


def test_weights_that_cannot_be_edited():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedWeightError, match="LlamaMLP"):
        find_edit_modules(model, ["model.layers.1.mlp"])
    quantized = model.model.layers[1].mlp.down_proj
    quantized.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedWeightError, match=r"torch\.int8 weight.*load the model in bfloat16"
    ):
        find_edit_modules(model, ["model.layers.1.mlp.down_proj"])
    model.model.layers[2].mlp.down_proj.to("meta")
    with pytest.raises(UnsupportedWeightError, match="offloaded"):
        find_edit_modules(model, ["model.layers.2.mlp.down_proj"])


def test_a_tensor_subclass_is_refused():
    class Quantized(torch.Tensor):
        pass

    model = tiny_model("llama")
    hidden = torch.zeros(32, 64).as_subclass(Quantized)
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(hidden, requires_grad=False)
    with pytest.raises(UnsupportedWeightError, match="Quantized weight"):
        find_edit_modules(model, ["model.layers.1.mlp.down_proj"])
