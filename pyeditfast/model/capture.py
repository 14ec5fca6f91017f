"""Keys and output gradients of the edited modules at the answer positions, with no weight
gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model.edit_modules import EditModule


class Capture:
    """What one forward and backward pass leaves of the edited modules.

    ``keys`` holds one tensor ``[n, d_in]`` for each distinct input; ``key_of[i]`` tells which of
    them module ``i`` read (a gate and an up projection read the same one). All in the model's
    dtype, on the modules' devices.
    """

    def __init__(self, modules: Sequence[EditModule], answer_slots: Tensor, tokens: int) -> None:
        self.modules = list(modules)
        self.keys: list[Tensor] = []
        self.key_of: list[int] = [-1] * len(self.modules)
        self._slots = answer_slots
        self._tokens = tokens
        self._edges: list[GradientEdge | None] = [None] * len(self.modules)
        self._last_input: Tensor | None = None

    def hook(self, number: int) -> Any:
        """Return the forward hook for module ``number``."""

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._edges[number] is not None:
                raise RuntimeError(
                    f"{self.modules[number].name} ran more than once in one forward pass"
                )
            self.key_of[number] = self._key_index(number, inputs[0])
            begins = not output.requires_grad
            if begins:
                # Nothing before this module needs a gradient: the graph begins here.
                output = output.detach().requires_grad_()
            # The edge, not the tensor: the model may go on to change the output in place.
            self._edges[number] = get_gradient_edge(output)
            return output.clone() if begins else output

        return record

    def _key_index(self, number: int, entered: Tensor) -> int:
        if entered is not self._last_input:
            rows = entered.detach().reshape(-1, entered.shape[-1])
            if rows.shape[0] != self._tokens:
                raise UnsupportedWeightError(
                    f"{self.modules[number].name} saw {rows.shape[0]} of {self._tokens} tokens; "
                    "only modules that see every token can be edited"
                )
            self.keys.append(rows.index_select(0, self._slots.to(rows.device)))
            self._last_input = entered
        return len(self.keys) - 1

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return d loss / d output at the answer positions, ``[n, d_out]`` a module.

        The graph is freed.
        """
        edges = []
        for module, edge in zip(self.modules, self._edges, strict=True):
            if edge is None:
                raise RuntimeError(f"{module.name} did not run in the model's forward pass")
            edges.append(edge)
        grads = torch.autograd.grad(loss, edges, allow_unused=True)
        self._edges = [None] * len(self.modules)
        self._last_input = None
        return [self._at_answers(number, grad) for number, grad in enumerate(grads)]

    def _at_answers(self, number: int, grad: Tensor | None) -> Tensor:
        if grad is None:
            # The output does not reach the loss.
            weight = self.modules[number].weight
            return weight.new_zeros(len(self._slots), weight.shape[0])
        rows = grad.reshape(-1, grad.shape[-1])
        return rows.index_select(0, self._slots.to(rows.device))


@contextlib.contextmanager
def capturing(
    modules: Sequence[EditModule], answer_slots: Tensor, tokens: int
) -> Iterator[Capture]:
    """Record ``modules`` inside a ``with`` block; ``answer_slots`` ``[n]`` index the flattened
    tokens of the pass.
    """
    capture = Capture(modules, answer_slots, tokens)
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
    # By name: offloading libraries put new parameters in the place of the old ones.
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for name in trainable:
            model.get_parameter(name).requires_grad_(False)
        model.eval()
        yield
    finally:
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)
        for module in training:
            module.training = True
