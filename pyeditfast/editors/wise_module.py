"""The module that WISE edits: where it may lie, and the activation behind it."""

from __future__ import annotations

from transformers import PreTrainedModel

from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model.wise_linear import find_wise_linear

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Transformers' names of the activations that the gaps are measured behind."""


def require_unrouted(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` for a model that has side memories, ``TypeError`` for what is none."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; a model of Transformers is needed")
    if find_wise_linear(model) is not None:
        raise ValueError(
            "the model has side memories already; go on with their editor, or detach them first"
        )


def require_feed_forward(name: str) -> None:
    """Raise ``UnsupportedWeightError`` for the name of a module that is not in the feed-forward
    part of a block.
    """
    parts = name.split(".")
    attention = any(word in part for part in parts for word in ("attn", "attention"))
    if attention or not any(part.isdecimal() for part in parts):
        raise UnsupportedWeightError(
            f"{name} is not in the feed-forward part of a block; WISE edits one of its projections"
        )


def gap_activation(model: PreTrainedModel, wanted: str | None) -> str | None:
    """Return the activation of the gaps: ``wanted``, or the model's own for ``"model"``.

    Raises ``ValueError`` where the model's own is not known.
    """
    if wanted != "model":
        return wanted
    config = model.config.get_text_config()
    named = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    named = named or getattr(config, "hidden_activation", None)
    if named not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise ValueError(
            f"the model's activation is {named!r}; known are {known}: set activation in WiseConfig"
        )
    return ACTIVATION_NAMES[named]
