"""Which modules are edited: published choices by model, and a default for models without one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

OTHER_TOWER = re.compile(r"vision|visual|image|audio|encoder", re.IGNORECASE)


def _layers(pattern: str, layers: Iterable[int]) -> tuple[str, ...]:
    return tuple(pattern.format(layer) for layer in layers)


ULTRAEDIT_MODULES: dict[str, tuple[str, ...]] = {
    # The published figures (arXiv 2505.14679 and its code).
    "mistral-7b": _layers("model.layers.{}.mlp.down_proj", (29, 30)),
    "llama-3-8b": (
        *_layers("model.layers.{}.mlp.gate_proj", range(11, 16)),
        *_layers("model.layers.{}.mlp.up_proj", range(18, 25)),
    ),
    "gpt-j-6b": _layers("transformer.h.{}.mlp.fc_out", range(18, 27)),
    "qwen2.5-7b": (
        *_layers("model.layers.{}.mlp.gate_proj", range(18, 27)),
        *_layers("model.layers.{}.mlp.up_proj", range(18, 27)),
    ),
    "phi-4": _layers("model.layers.{}.mlp.down_proj", range(30, 39)),
    # The published names start at language_model.model; Transformers 5 renamed them.
    "gemma-3-27b": (
        *_layers("model.language_model.layers.{}.mlp.gate_proj", range(52, 61)),
        *_layers("model.language_model.layers.{}.mlp.up_proj", range(52, 61)),
    ),
    # Not published: the relative depth of Mistral's choice.
    "llama-2-7b": _layers("model.layers.{}.mlp.down_proj", (29, 30)),
    "gpt2-xl": _layers("transformer.h.{}.mlp.c_proj", (44, 45)),
}

WISE_SETTINGS: dict[str, dict[str, Any]] = {
    # The published settings (arXiv 2405.14768 and its code), where they differ from the defaults.
    "gpt2-xl": {"edit_module": "transformer.h.8.mlp.c_fc", "n_iter": 40, "act_ratio": 0.8},
    "gpt-j-6b": {
        "edit_module": "transformer.h.21.mlp.fc_out",
        "act_margin": (15.0, 40.0, 20.0),
    },
    "llama-2-7b": {"edit_module": "model.layers.27.mlp.down_proj"},
    "llama-3-8b": {
        "edit_module": "model.layers.29.mlp.down_proj",
        "edit_lr": 0.9,
        "n_iter": 30,
        "act_margin": (2.0, 20.0, 10.0),
        "act_ratio": 0.5,
    },
    "mistral-7b": {"edit_module": "model.layers.27.mlp.down_proj"},
    "qwen2.5-7b": {"edit_module": "model.layers.23.mlp.down_proj"},
}

SIGNATURES = {
    # (model type, blocks, hidden size) of the models above; both Llamas differ by their vocabulary.
    ("mistral", 32, 4096): "mistral-7b",
    ("gptj", 28, 4096): "gpt-j-6b",
    ("qwen2", 28, 3584): "qwen2.5-7b",
    ("phi3", 40, 5120): "phi-4",
    ("gemma3_text", 62, 5376): "gemma-3-27b",
    ("gpt2", 48, 1600): "gpt2-xl",
}

DOWN_PROJECTION = re.compile(
    r".*\.(\d+)\.(?:mlp\.(?:down_proj|c_proj|fc_out|dense_4h_to_h|fc2)|fc2)$"
)


def preset_modules(name: str) -> tuple[str, ...]:
    """Return the edited modules of preset ``name``; raises ``ValueError`` listing the presets for
    another name.
    """
    try:
        return ULTRAEDIT_MODULES[name]
    except KeyError:
        known = ", ".join(sorted(ULTRAEDIT_MODULES))
        raise ValueError(f"unknown preset {name!r}; choose one of {known}") from None


def recognise(config: PretrainedConfig) -> str | None:
    """Return the preset of the model that ``config`` describes, None for one without a preset."""
    text = config.get_text_config()
    blocks, hidden = text.num_hidden_layers, text.hidden_size
    if (text.model_type, blocks, hidden) == ("llama", 32, 4096):
        return "llama-3-8b" if text.vocab_size > 100_000 else "llama-2-7b"
    return SIGNATURES.get((text.model_type, blocks, hidden))


def default_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the modules to edit where none are named.

    The preset's for a model that has one. Else the two down projections before the last block, as
    Mistral's preset edits 29 and 30 of 32 (all of them in a model of fewer than three blocks).
    Raises ``ValueError`` for a model whose MLPs are not recognised.
    """
    modules = dict(model.named_modules())
    preset = recognise(model.config)
    if preset is not None and all(name in modules for name in ULTRAEDIT_MODULES[preset]):
        return ULTRAEDIT_MODULES[preset]
    found = _down_projections(model)
    layers = sorted(found)
    chosen = layers[-3:-1] if len(layers) >= 3 else layers
    return tuple(found[layer] for layer in chosen)


def wise_preset(name: str) -> dict[str, Any]:
    """Return the settings of WISE's preset ``name``; raises ``ValueError`` listing the presets for
    another name.
    """
    try:
        return WISE_SETTINGS[name]
    except KeyError:
        known = ", ".join(sorted(WISE_SETTINGS))
        raise ValueError(f"unknown preset {name!r}; choose one of {known}") from None


def default_wise_module(model: PreTrainedModel) -> str:
    """Return the module that gets side memories where none is named.

    The preset's for a model that has one. Else the down projection at five sixths of the depth, as
    Llama-2-7B's preset edits 27 of 32. Raises ``ValueError`` for a model whose MLPs are not
    recognised.
    """
    settings = WISE_SETTINGS.get(recognise(model.config) or "", {})
    module = settings.get("edit_module")
    if module is not None and module in dict(model.named_modules()):
        return str(module)
    found = _down_projections(model)
    layers = sorted(found)
    return found[layers[27 * len(layers) // 32]]


def _down_projections(model: PreTrainedModel) -> dict[int, str]:
    """Return the names of the down projections of the text model by block."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        match = DOWN_PROJECTION.match(name)
        if match and not OTHER_TOWER.search(name) and getattr(module, "weight", None) is not None:
            found[int(match[1])] = name
    if not found:
        raise ValueError(
            f"no default edit modules are known for {type(model).__name__}; "
            "name them in edit_modules"
        )
    return found
