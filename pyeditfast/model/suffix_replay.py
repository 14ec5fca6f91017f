"""Running only what lies behind one module, again and again.

While a side memory is trained nothing before the edited module changes. The blocks before it and
the parts of its own block that run before it are run once; afterwards each of them gives back what
it gave then, so that a forward pass costs what lies behind the module.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyeditfast.model.module_path import module_path
from pyeditfast.model.packing import PackedLayout
from pyeditfast.model.prefix import NotByTokenError, Prefix
from pyeditfast.model.runner import CHECK_TOLERANCE, Batch, ModelRunner, seen_by_answers


class SuffixReplay:
    """One pass of sequences up to the input of a module, and what lies behind it for any output.

    ``inputs`` ``[tokens, d_in]`` is what the module reads, pads included, in the model's dtype.
    Where the model can be packed, only the tokens that an answer sees go on behind the module: no
    pads, and no last target token. Raises ``UnsupportedWeightError`` for a module that is not
    inside a block of the model, or that does not see every token once.
    """

    def __init__(self, runner: ModelRunner, module_name: str, batch: Batch) -> None:
        self.runner = runner
        self._path = module_path(runner.model, module_name)
        prefix = Prefix.of(runner, self._path, batch)
        self.inputs = prefix.inputs
        self._slots: Tensor | None = None
        self._prefix, self.batch = prefix, batch
        self._drop_unseen()
        self._alone: dict[nn.Module, float] = dict.fromkeys(self._path.last, 0.0)
        self.batch = _reading_answers(self.batch, self._path.last_attention)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the module reads, pads included."""
        return len(self.inputs)

    def _drop_unseen(self) -> None:
        """Go on with the tokens that the answers see alone, where the model can be packed."""
        shape = self.batch.inputs["input_ids"].shape
        if "packed_layout" not in self.batch.inputs and not self.runner.packs(shape[1]):
            return
        batch, slots = seen_by_answers(self.batch)
        with contextlib.suppress(NotByTokenError):
            self._prefix = self._prefix.at(slots, shape)
            self._slots, self.batch = slots.to(self.inputs.device), batch

    def drop_queries(self, output: Tensor) -> None:
        """From now on compute the last block's queries at answer positions alone, if nothing reads
        them elsewhere: if the model gives the same logits for ``output`` with NaN there.
        """
        for part in self._path.last_queries:
            known = self.runner.read_at_answers_alone
            if part not in known:
                expected = self._logits(output)
                self._alone[part] = math.nan
                difference = (self._logits(output) - expected).norm() / expected.norm()
                # Written so that a NaN counts as a difference.
                known[part] = bool(difference <= CHECK_TOLERANCE.get(self.runner.model.dtype, 0.0))
                del self._alone[part]
            if known[part]:
                self._alone[part] = 0.0

    def _logits(self, output: Tensor) -> Tensor:
        with torch.no_grad(), self.giving(output):
            return self.runner.answer_logits(self.batch).double()

    def answer_losses(self, output: Tensor) -> Tensor:
        """Return the losses at the answer positions ``[n]``, float32 or wider, if the module gives
        ``output`` ``[tokens, d_out]``.
        """
        with self.giving(output):
            return self.runner.answer_losses(self.batch)

    @contextlib.contextmanager
    def giving(self, output: Tensor) -> Iterator[None]:
        """Let the model run the pass from the module on, which gives ``output``."""
        read = output if self._slots is None else output.index_select(0, self._slots)
        given = read.view(*self._prefix.module_input.shape[:-1], output.shape[-1])
        path, prefix = self._path, self._prefix
        forwards = {
            **{block: _handing_on(form) for block, form in prefix.before.items()},
            path.block: self._entering_block(),
            **{part: _again(part, outputs) for part, outputs in prefix.beside.items()},
            path.module: lambda entered: given,
            **{part: self._only_at_answers(part, fill) for part, fill in self._alone.items()},
        }
        with _computing(forwards):
            yield

    def _entering_block(self) -> Callable[..., Any]:
        original = self._path.block.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(self._prefix.block_input, *args, **kwargs)

        return forward

    def _only_at_answers(self, part: nn.Module, elsewhere: float) -> Callable[..., Any]:
        """Return a forward of ``part`` that computes the answer positions and gives ``elsewhere``
        at the others.
        """
        original = part.forward
        slots = self.batch.answer_slots

        def forward(hidden_states: Tensor) -> Any:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            places = slots.to(rows.device)
            result = original(rows.index_select(0, places).unsqueeze(0))
            # Mixtures of experts give their router's logits too.
            computed = (result[0] if isinstance(result, tuple) else result).squeeze(0)
            everywhere = computed.new_full((rows.shape[0], computed.shape[-1]), elsewhere)
            filled = everywhere.index_copy(0, places, computed)
            output = filled.view(*hidden_states.shape[:-1], computed.shape[-1])
            return (output, *result[1:]) if isinstance(result, tuple) else output

        return forward


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
