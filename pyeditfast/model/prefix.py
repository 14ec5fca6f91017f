"""One pass of sequences up to the input of a module, and what ran before it there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model.module_path import ModulePath, module_path
from pyeditfast.model.runner import Batch, ModelRunner


class NotByTokenError(Exception):
    """Something that ran before the module does not have a row for each token."""


class _ReachedError(Exception):
    """The forward pass came to the edited module."""


@dataclass(frozen=True)
class Prefix:
    """What ran before a module in a pass of sequences.

    ``module_input`` is what the module reads and ``block_input`` what its block does, in the form
    in which they come. ``beside``: the outputs of each part of the block that ran before the
    module, call by call; ``before``: what each earlier block gives beside the hidden states.
    """

    module_input: Tensor
    block_input: Tensor
    beside: dict[nn.Module, list[Any]]
    before: dict[nn.Module, Any]

    @classmethod
    def of(cls, runner: ModelRunner, path: ModulePath, batch: Batch) -> Prefix:
        """Run ``batch`` up to the module of ``path``.

        Raises ``UnsupportedWeightError`` if it does not see every token once.
        """
        module_inputs: list[Tensor] = []
        block_inputs: list[Tensor] = []
        beside: dict[nn.Module, list[Any]] = {}
        before: dict[nn.Module, Any] = {}

        def reached(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            module_inputs.append(inputs[0].detach())
            raise _ReachedError

        def block_entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            block_inputs.append((args[0] if args else kwargs["hidden_states"]).detach())

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            beside.setdefault(module, []).append(_detached(output))

        def keep_form(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            form = (None, *output[1:]) if isinstance(output, tuple) else None
            before[module] = _detached(form)

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for handle in (
                path.module.register_forward_pre_hook(reached),
                path.block.register_forward_pre_hook(block_entered, with_kwargs=True),
                *(part.register_forward_hook(keep) for part in path.beside),
                *(earlier.register_forward_hook(keep_form) for earlier in path.before),
            ):
                hooks.callback(handle.remove)
            with contextlib.suppress(_ReachedError):
                runner.answer_logits(batch)
        if not module_inputs:
            raise UnsupportedWeightError(f"{path.name} did not run in the model's forward pass")
        found = cls(module_inputs[0], block_inputs[-1], beside, before)
        tokens, seen = batch.inputs["input_ids"].numel(), found.inputs.shape[0]
        if seen != tokens:
            raise UnsupportedWeightError(
                f"{path.name} saw {seen} of {tokens} tokens; "
                "only modules that see every token can be edited"
            )
        return found

    @property
    def inputs(self) -> Tensor:
        """Return what the module reads, ``[tokens, d_in]``."""
        return self.module_input.flatten(0, -2)

    def at(self, slots: Tensor, shape: torch.Size) -> Prefix:
        """Return the same of the tokens at ``slots`` alone, as one row.

        ``slots`` ``[n]`` index the flattened tokens of this pass, whose token ids are of ``shape``
        ``[rows, columns]``. Raises ``NotByTokenError`` where something was recorded that does not
        have a row for each token.
        """

        def chosen(recorded: Any) -> Any:
            return _at_slots(recorded, slots, shape)

        return Prefix(
            chosen(self.module_input),
            chosen(self.block_input),
            {part: [chosen(output) for output in outputs] for part, outputs in self.beside.items()},
            {block: chosen(form) for block, form in self.before.items()},
        )


def module_inputs(runner: ModelRunner, module_name: str, batch: Batch) -> Tensor:
    """Return what a module reads in a pass, ``[tokens, d_in]``; nothing behind it is run.

    Raises ``UnsupportedWeightError`` for a module that is not inside a block of the model, or that
    does not see every token once.
    """
    return Prefix.of(runner, module_path(runner.model, module_name), batch).inputs


def _at_slots(recorded: Any, slots: Tensor, shape: torch.Size) -> Any:
    if isinstance(recorded, tuple):
        return tuple(_at_slots(item, slots, shape) for item in recorded)
    if not isinstance(recorded, Tensor):
        return recorded
    index = slots.to(recorded.device)
    if recorded.shape[:2] == shape:
        return recorded.flatten(0, 1).index_select(0, index).unsqueeze(0)
    if recorded.shape[:1] == (shape.numel(),):
        return recorded.index_select(0, index)
    raise NotByTokenError


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(item) for item in output)
    return output
