"""Gradient checkpointing runs a module again in the backward pass: which forward pass was it?"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from pyeditfast.model.model_call import ModelCall

REMEMBERED = 32
"""Forward passes that may come before the first of their backward passes."""


def in_backward() -> bool:
    """Say whether the autograd engine is running, by the test that torch's checkpointing makes."""
    return torch._C._current_graph_task_id() != -1


class RecomputedCalls:
    """The last forward passes in training mode, recognized by what a module read in them."""

    def __init__(self) -> None:
        self._noted: deque[tuple[ModelCall, Tensor]] = deque(maxlen=REMEMBERED)

    def note(self, call: ModelCall, x: Tensor) -> None:
        """Remember that ``x`` ``[..., d_in]`` was read in ``call``."""
        self._noted.append((replace(call, decides=False), _token_sums(x)))

    def find(self, x: Tensor) -> ModelCall:
        """Return the pass in which ``x`` was read, its routes decided."""
        sums = _token_sums(x)
        for call, noted in reversed(self._noted):
            if noted.shape == sums.shape and torch.equal(noted, sums):
                return call
        raise ValueError(
            "a routed module is run again in a backward pass on an input that none of the last "
            f"{REMEMBERED} forward passes in training mode gave it"
        )


def _token_sums(x: Tensor) -> Tensor:
    return x.detach().float().sum(-1).flatten()
