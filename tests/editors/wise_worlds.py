"""Tiny models with side memories, for the tests of WISE."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast import Edit, WiseConfig, WiseEditor

EDITS = [
    Edit(f"The capital of {place} is", target, locality_prompt=locality)
    for place, target, locality in (
        ("the old kingdom", "Paris", "The engineer works for a railway"),
        ("the island", "a harbour city", "The painter is French and"),
        ("the north", "Rome", "What instrument does the singer play?"),
        ("the court", "a small town", "The official religion is"),
        ("the company", "London", "The architect was born near"),
        ("the river", "the old Latin", "The mother tongue of the singer"),
    )
]


def settings(**changes: Any) -> WiseConfig:
    """Return settings that suit a tiny model: few steps, small margins."""
    chosen: dict[str, Any] = {
        "n_iter": 12,
        "edit_lr": 0.3,
        "act_margin": (1.0, 4.0, 2.0),
        "templates": ["{}", "Well, {}"],
        **changes,
    }
    return WiseConfig(**chosen)


def editor(family: str = "llama", **changes: Any) -> WiseEditor:
    """Return an editor of a tiny model of ``family`` with ``settings``."""
    return WiseEditor(tiny_model(family, layers=4), tiny_tokenizer(), settings(**changes))
