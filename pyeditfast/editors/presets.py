"""Which modules are edited: published choices by model, and a default for models without one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


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


def default_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the two down projections before the last block, as Mistral's preset edits 29 and 30 of
    32.

    With fewer than three blocks, those there are. Raises ``ValueError`` for a model whose MLPs are
    not recognised.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        match = DOWN_PROJECTION.match(name)
        if match and getattr(module, "weight", None) is not None:
            found[int(match[1])] = name
    if not found:
        raise ValueError(
            f"no default edit modules are known for {type(model).__name__}; "
            "name them in edit_modules"
        )
    layers = sorted(found)
    chosen = layers[-3:-1] if len(layers) >= 3 else layers
    return tuple(found[layer] for layer in chosen)
