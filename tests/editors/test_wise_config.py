"""Settings of WISE: what is refused, presets, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_models import tiny_model

from pyeditfast.editors.presets import WISE_SETTINGS, default_wise_module
from pyeditfast.editors.wise_config import WiseConfig

REFUSED = [
    ({"n_iter": 0}, "n_iter is 0"),
    ({"n_iter": 1.5}, "n_iter is 1.5"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"save_freq": 3, "merge_freq": 10}, "merge_freq 10 is not a multiple of save_freq 3"),
    ({"batch_size": 3}, "save_freq 500 is not a multiple of batch_size 3"),
    ({"edit_lr": 0.0}, "edit_lr is 0.0"),
    ({"edit_lr": float("nan")}, "edit_lr is nan"),
    ({"act_ratio": -1.0}, "act_ratio is -1.0"),
    ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
    ({"mask_ratio": 1.1}, "mask_ratio is 1.1"),
    ({"density": 2.0}, "density is 2.0"),
    ({"norm_constraint": 0.0}, "norm_constraint is 0.0"),
    ({"seed": -1}, "seed is -1"),
    ({"act_margin": (1.0, 2.0)}, "three finite numbers"),
    ({"act_margin": (1.0, 2.0, float("inf"))}, "three finite numbers"),
    ({"merge_alg": "mean"}, "merge_alg is 'mean'; choose one of ties"),
    ({"reduction": "sum"}, "reduction is 'sum'"),
    ({"quirks": "all"}, "quirks is 'all'"),
    ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"templates": []}, "templates is \\[\\]"),
    ({"templates": "{}"}, "templates is '{}'; pass a list"),
    ({"templates": ["no slot"]}, "'no slot' does not hold {} exactly once"),
    ({"templates": ["{} and {}"]}, "does not hold {} exactly once"),
    ({"locality_prompts": ()}, "locality_prompts is \\(\\)"),
    ({"templates": [1]}, "templates is \\[1\\]"),
    ({"locality_prompts": [3]}, "locality_prompts is \\[3\\]"),
    ({"seed": 0.5}, "seed is 0.5"),
    ({"seed": True}, "seed is True"),
    ({"n_iter": True}, "n_iter is True"),
    ({"edit_lr": "1"}, "edit_lr is '1'"),
    ({"mask_ratio": "half"}, "mask_ratio is 'half'"),
    ({"norm_constraint": "x"}, "norm_constraint is 'x'"),
    ({"act_margin": 5}, "act_margin is 5; three finite numbers"),
    ({"act_margin": "abc"}, "act_margin is 'abc'; three finite numbers"),
    ({"retrieve": "no"}, "retrieve is 'no'"),
    ({"edit_module": ["a"]}, "edit_module is \\['a'\\]"),
    ({"edit_module": ""}, "edit_module is ''"),
    ({"locality_prompts": ["The sky is", " "]}, "one of them is empty"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refuses_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        WiseConfig(**changes)


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError, match="edit_rate"):
        WiseConfig(edit_rate=1.0)


def test_defaults_are_the_published_ones():
    config = WiseConfig()
    assert (config.n_iter, config.edit_lr, config.mask_ratio) == (70, 1.0, 0.2)
    assert config.act_margin == (5.0, 20.0, 10.0)
    assert (config.act_ratio, config.norm_constraint) == (0.88, 1.0)
    assert (config.save_freq, config.merge_freq) == (500, 1000)
    assert (config.merge_alg, config.density, config.retrieve) == ("ties", 0.53, True)
    assert (config.quirks, config.reduction, config.activation) == ("none", "auto", "model")


@pytest.mark.parametrize("name", WISE_SETTINGS)
def test_presets(name):
    config = WiseConfig.preset(name, seed=3)
    assert config.seed == 3
    assert config.edit_module == WISE_SETTINGS[name]["edit_module"]


def test_a_preset_that_differs_from_the_defaults():
    config = WiseConfig.preset("gpt-j-6b")
    assert config.edit_module == "transformer.h.21.mlp.fc_out"
    assert config.act_margin == (15.0, 40.0, 20.0)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'llama-1'; choose one of gpt-j-6b, gpt2-xl"):
        WiseConfig.preset("llama-1")


def test_settings_survive_json():
    config = WiseConfig(templates=["{}", "Well, {}"], locality_prompts=["The sky is"], seed=5)
    assert WiseConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WiseConfig().seed = 1


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("llama", 4, "model.layers.3.mlp.down_proj"),
        ("llama", 2, "model.layers.1.mlp.down_proj"),
        ("gpt2", 3, "transformer.h.2.mlp.c_proj"),
        ("gptj", 8, "transformer.h.6.mlp.fc_out"),
    ],
)
def test_without_a_preset_the_module_lies_as_deep_as_llamas(family, layers, expected):
    assert default_wise_module(tiny_model(family, layers=layers)) == expected
