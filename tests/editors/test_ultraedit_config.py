"""Settings: published defaults, presets that fit their models, and refusals."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from pyeditfast import UltraEditConfig
from pyeditfast.editors.presets import ULTRAEDIT_MODULES, default_modules

WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
MODELS = {
    "mistral-7b": MistralConfig(**WIDE, num_hidden_layers=32, vocab_size=32768),
    "llama-3-8b": LlamaConfig(**WIDE, num_hidden_layers=32, vocab_size=128256),
    "llama-2-7b": LlamaConfig(**{**WIDE, "intermediate_size": 11008}, num_hidden_layers=32),
    "gpt-j-6b": GPTJConfig(),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "phi-4": Phi3Config(
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        vocab_size=100352,
        pad_token_id=0,
    ),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "gemma-3-27b": Gemma3Config(
        text_config={
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
        }
    ),
}


def test_published_defaults():
    config = UltraEditConfig()
    assert (config.lr, config.turn_size, config.micro_batch, config.ridge) == (1e-6, 100, 10, 1.0)
    assert (config.variance, config.form, config.rounding) == ("unbiased", "auto", "nearest")
    assert config.tokens_per_pass is None


@pytest.mark.parametrize("name", sorted(ULTRAEDIT_MODULES))
def test_presets_name_modules_of_their_model_and_are_recognised(name):
    with torch.device("meta"):
        if name == "gemma-3-27b":
            model = Gemma3ForConditionalGeneration(MODELS[name])
        else:
            model = AutoModelForCausalLM.from_config(MODELS[name])
    modules = dict(model.named_modules())
    config = UltraEditConfig.preset(name, lr=1e-5)
    assert config.lr == 1e-5
    assert set(config.edit_modules) <= set(modules)
    assert default_modules(model) == config.edit_modules


def test_published_choices():
    assert UltraEditConfig.preset("mistral-7b").edit_modules == (
        "model.layers.29.mlp.down_proj",
        "model.layers.30.mlp.down_proj",
    )
    llama = UltraEditConfig.preset("llama-3-8b").edit_modules
    assert (llama[0], llama[4]) == (
        "model.layers.11.mlp.gate_proj",
        "model.layers.15.mlp.gate_proj",
    )
    assert (llama[5], llama[-1]) == ("model.layers.18.mlp.up_proj", "model.layers.24.mlp.up_proj")
    assert len(UltraEditConfig.preset("qwen2.5-7b").edit_modules) == 18


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("gptj", "transformer.h.1.mlp.fc_out"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("bloom", "transformer.h.1.mlp.dense_4h_to_h"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("gemma3", "model.layers.1.mlp.down_proj"),
    ],
)
def test_defaults_for_other_families(family, expected):
    assert default_modules(tiny_model(family, layers=4))[0] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"turn_size": 0}, "turn_size is 0"),
        ({"micro_batch": 2.5}, "micro_batch is 2.5"),
        ({"tokens_per_pass": -5}, "tokens_per_pass is -5"),
        ({"variance": "exact"}, "variance is 'exact'; choose one of unbiased, published"),
        ({"form": "both"}, "form is 'both'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"seed": -1}, "seed is -1"),
        ({"edit_modules": "model"}, "edit_modules is the string 'model'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        UltraEditConfig(**settings)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown preset 'gpt-5'; choose one of gemma-3-27b"):
        UltraEditConfig.preset("gpt-5")
    with pytest.raises(TypeError, match="turnsize"):
        UltraEditConfig.preset("phi-4", turnsize=3)


def test_a_vision_tower_is_not_edited():
    model = tiny_model("llama", layers=4)
    model.vision_tower = tiny_model("opt", layers=9).model
    assert default_modules(model) == (
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    )
