"""Keys and output gradients of the edited modules at the answer positions, with no weight
gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeditfast.model.edit_modules import EditModule


class Capture:
    """What one forward and backward pass leaves of the edited modules.

    ``keys`` holds one tensor ``[n, d_in]`` for each distinct input; ``key_of[i]`` tells which of
    them module ``i`` read (a gate and an up projection read the same one). All in the model's
    dtype, on the modules' devices.
    """

    def __init__(self, modules: Sequence[EditModule], answer_slots: Tensor) -> None:
        self.modules = list(modules)
        self.keys: list[Tensor] = []
        self.key_of: list[int] = [-1] * len(self.modules)
        self._slots = answer_slots
        self._outputs: list[Tensor | None] = [None] * len(self.modules)
        self._last_input: Tensor | None = None

    def hook(self, number: int) -> Any:
        """Return the forward hook for module ``number``."""

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._outputs[number] is not None:
                raise RuntimeError(
                    f"{self.modules[number].name} ran more than once in one forward pass"
                )
            self.key_of[number] = self._key_index(inputs[0])
            if not output.requires_grad:
                # Nothing before this module needs a gradient: the graph begins here.
                output = output.detach().requires_grad_()
            self._outputs[number] = output
            return output

        return record

    def _key_index(self, entered: Tensor) -> int:
        if entered is not self._last_input:
            rows = entered.detach().reshape(-1, entered.shape[-1])
            self.keys.append(rows.index_select(0, self._slots.to(rows.device)))
            self._last_input = entered
        return len(self.keys) - 1

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return d loss / d output at the answer positions, ``[n, d_out]`` a module, and free the
        graph.
        """
        outputs = []
        for module, output in zip(self.modules, self._outputs, strict=True):
            if output is None:
                raise RuntimeError(f"{module.name} did not run in the model's forward pass")
            outputs.append(output)
        grads = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        self._outputs = [None] * len(self.modules)
        self._last_input = None
        return [
            grad.reshape(-1, grad.shape[-1]).index_select(0, self._slots.to(grad.device))
            for grad in grads
        ]


@contextlib.contextmanager
def capturing(modules: Sequence[EditModule], answer_slots: Tensor) -> Iterator[Capture]:
    """Record ``modules`` inside a ``with`` block; ``answer_slots`` ``[n]`` index the flattened
    tokens of the pass.
    """
    capture = Capture(modules, answer_slots)
    handles = [
        item.module.register_forward_hook(capture.hook(number))
        for number, item in enumerate(modules)
    ]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode with no trainable parameter inside a ``with`` block, then
    restore both.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
