"""A model's output head: where it runs, and whether the logits are its output as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def head_only_at(model: PreTrainedModel, slots: Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at ``slots`` of the flattened tokens."""
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no output head; a causal language model is needed"
        )

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        return (hidden.index_select(0, slots.to(hidden.device)).unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the output head if it is a linear layer that nothing has been added to."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    return None if head._forward_hooks or head._forward_pre_hooks else head


@contextlib.contextmanager
def head_skipped(head: nn.Linear) -> Iterator[None]:
    """Let a model give the head's input in place of its logits."""
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.__dict__["forward"]


class HeadPass:
    """What a head read and gave inside a ``with`` block; of no head, nothing."""

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, Tensor, int]] = []

    @classmethod
    @contextlib.contextmanager
    def watched(cls, head: nn.Linear | None) -> Iterator[HeadPass]:
        """Watch ``head``."""
        seen = cls()

        def keep(module: nn.Module, inputs: tuple[Any, ...], given: Tensor) -> None:
            seen._calls.append((inputs[0], given, given._version))

        with contextlib.ExitStack() as hooks:
            if head is not None:
                hooks.callback(head.register_forward_hook(keep).remove)
            yield seen

    @property
    def hidden(self) -> Tensor:
        """Return what the head read in its one call."""
        ((hidden, _, _),) = self._calls
        return hidden

    def gave(self, logits: Tensor) -> bool:
        """Say whether ``logits`` are all that the head gave in its one call, not changed since."""
        if len(self._calls) != 1:
            return False
        _, given, version = self._calls[0]
        return (
            given.data_ptr() == logits.data_ptr()
            and given.numel() == logits.numel()
            and given.dtype == logits.dtype
            and given._version == version
        )
