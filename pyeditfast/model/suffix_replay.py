"""Running only what lies behind one module, again and again.

While a side memory is trained nothing before the edited module changes. The blocks before it and
the parts of its own block that run before it are run once; afterwards each of them gives back what
it gave then, so that a forward pass costs what lies behind the module.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model.packing import PackedLayout
from pyeditfast.model.runner import Batch, ModelRunner


class _ReachedError(Exception):
    """The forward pass came to the edited module."""


class SuffixReplay:
    """One pass of sequences up to the input of a module, and what lies behind it for any output.

    ``inputs`` ``[tokens, d_in]`` is what the module reads, in the model's dtype. Raises
    ``UnsupportedWeightError`` for a module that is not inside a block of the model, or that does
    not see every token once.
    """

    def __init__(self, runner: ModelRunner, module_name: str, batch: Batch) -> None:
        self.runner = runner
        self.batch = batch
        self._path = _path(runner.model, module_name)
        self._name = module_name
        self._recorded: dict[nn.Module, list[Any]] = {}
        self._before: dict[nn.Module, Any] = {}
        self._block_input: Tensor
        self._shape: torch.Size
        self.inputs = self._record()
        self.batch = _reading_answers(batch, self._path.last_attention)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the pass, pads included."""
        return int(self.batch.inputs["input_ids"].numel())

    def _record(self) -> Tensor:
        """Run the pass up to the module and keep what ran before it in its block."""
        captured: list[Tensor] = []

        def reached(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.append(inputs[0].detach())
            raise _ReachedError

        def block_entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._block_input = (args[0] if args else kwargs["hidden_states"]).detach()

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._recorded.setdefault(module, []).append(_detached(output))

        def keep_form(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            form = (None, *output[1:]) if isinstance(output, tuple) else None
            self._before[module] = _detached(form)

        block, module = self._path.block, self._path.module
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for handle in (
                module.register_forward_pre_hook(reached),
                block.register_forward_pre_hook(block_entered, with_kwargs=True),
                *(part.register_forward_hook(keep) for part in self._path.beside),
                *(earlier.register_forward_hook(keep_form) for earlier in self._path.before),
            ):
                hooks.callback(handle.remove)
            with contextlib.suppress(_ReachedError):
                self.runner.answer_logits(self.batch)
        if not captured:
            raise UnsupportedWeightError(f"{self._name} did not run in the model's forward pass")
        self._shape = captured[0].shape
        inputs = captured[0].reshape(-1, self._shape[-1])
        if inputs.shape[0] != self.tokens:
            raise UnsupportedWeightError(
                f"{self._name} saw {inputs.shape[0]} of {self.tokens} tokens; "
                "only modules that see every token can be edited"
            )
        return inputs

    def answer_losses(self, output: Tensor) -> Tensor:
        """Return the losses at the answer positions ``[n]``, float32 or wider, if the module gives
        ``output`` ``[tokens, d_out]``.
        """
        with self.giving(output):
            return self.runner.answer_losses(self.batch)

    @contextlib.contextmanager
    def giving(self, output: Tensor) -> Iterator[None]:
        """Let the model run the pass from the module on, which gives ``output``."""
        given = output.view(*self._shape[:-1], output.shape[-1])
        path = self._path
        forwards = {
            **{block: _handing_on(form) for block, form in self._before.items()},
            path.block: self._entering_block(),
            **{part: _again(part, outputs) for part, outputs in self._recorded.items()},
            path.module: lambda entered: given,
            **{part: self._only_at_answers(part) for part in path.last},
        }
        with _computing(forwards):
            yield

    def _entering_block(self) -> Callable[..., Any]:
        original = self._path.block.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(self._block_input, *args, **kwargs)

        return forward

    def _only_at_answers(self, part: nn.Module) -> Callable[..., Any]:
        """Return a forward of ``part`` that computes the answer positions and gives 0 elsewhere."""
        original = part.forward
        slots = self.batch.answer_slots

        def forward(hidden_states: Tensor) -> Any:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            places = slots.to(rows.device)
            result = original(rows.index_select(0, places).unsqueeze(0))
            # Mixtures of experts give their router's logits too.
            computed = (result[0] if isinstance(result, tuple) else result).squeeze(0)
            everywhere = computed.new_zeros(rows.shape[0], computed.shape[-1])
            filled = everywhere.index_copy(0, places, computed)
            output = filled.view(*hidden_states.shape[:-1], computed.shape[-1])
            return (output, *result[1:]) if isinstance(result, tuple) else output

        return forward


def module_inputs(runner: ModelRunner, module_name: str, batch: Batch) -> Tensor:
    """Return what a module reads in a pass, ``[tokens, d_in]``; nothing behind it is run."""
    return SuffixReplay(runner, module_name, batch).inputs


OUTPUT = ("o_proj", "out_proj")
"""Attention's last linear layer. What makes its queries is no such part: a short convolution behind
it would read the neighbours.
"""


@dataclass(frozen=True)
class _Path:
    """Where a module lies: its ``block``, the blocks ``before`` it, and the parts ``beside`` the
    module in its block. ``last``: the parts of the model's last block that work on each position by
    itself and whose output is read at answer positions alone; ``last_attention``: the attention
    whose output is too, though it does not.
    """

    module: nn.Module
    block: nn.Module
    before: list[nn.Module]
    beside: list[nn.Module]
    last: list[nn.Module]
    last_attention: list[nn.Module]


def _path(model: PreTrainedModel, name: str) -> _Path:
    parts = name.split(".")
    lists = [
        place
        for place in range(len(parts))
        if isinstance(model.get_submodule(".".join(parts[:place])), nn.ModuleList)
    ]
    if not lists:
        raise UnsupportedWeightError(f"{name} is not inside one of the model's blocks")
    place = lists[0]
    blocks = list(model.get_submodule(".".join(parts[:place])).children())
    number = int(parts[place])
    beside = []
    for depth in range(place + 1, len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        beside += [child for label, child in parent.named_children() if label != parts[depth]]
    read = ([], []) if number == len(blocks) - 1 else _read_at_answers(blocks[-1])
    return _Path(model.get_submodule(name), blocks[number], blocks[:number], beside, *read)


def _read_at_answers(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return ``last`` and ``last_attention`` of the last ``block``."""

    def children(parent: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
        found = [part for name, part in parent.named_children() if name in names]
        return [part for part in found if len(inspect.signature(part.forward).parameters) == 1]

    attention = [parent for parent in block.modules() if children(parent, OUTPUT)]
    if len(attention) > 1:
        # One may read what another gives elsewhere.
        attention = []
    outputs = [part for parent in attention for part in children(parent, OUTPUT)]
    return children(block, ("mlp",)) + outputs, attention


def _reading_answers(batch: Batch, attention: list[nn.Module]) -> Batch:
    """Return a packed ``batch`` whose ``attention`` modules answer at its answer slots alone."""
    layout = batch.inputs.get("packed_layout")
    if layout is None or not attention:
        return batch
    read = {module: batch.answer_slots for module in attention}
    layout = PackedLayout(layout.lengths, read)
    return replace(batch, inputs={**batch.inputs, "packed_layout": layout})


@contextlib.contextmanager
def _computing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each module compute its function of ``forwards`` inside a ``with`` block."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _handing_on(recorded: Any) -> Callable[..., Any]:
    """Return a forward that hands the hidden states on, in the form of a block's ``recorded``
    output.
    """

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(recorded, tuple):
            return (hidden_states, *recorded[1:])
        return hidden_states

    return forward


def _again(part: nn.Module, outputs: list[Any]) -> Callable[..., Any]:
    """Return a forward that gives ``outputs`` one call after the other, then computes again."""
    original = part.forward
    waiting = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for output in waiting:
            return output
        return original(*args, **kwargs)

    return forward


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(item) for item in output)
    return output
