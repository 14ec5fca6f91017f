"""One turn's keys and gradients, from forward and backward passes over all its edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyeditfast.model.capture import capturing, frozen
from pyeditfast.model.edit_modules import EditModule
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.sequences import AnswerSequence
from pyeditfast.phases import PhaseClock


@dataclass(frozen=True)
class TurnGradients:
    """Keys and gradients of a turn, sequence after sequence.

    ``keys``: one ``[n, d_in]`` for each distinct module input, in the model's dtype; ``key_of[i]``
    is the one that module ``i`` read. ``grads``: one ``[n, d_out]`` a module, in its dtype, the
    gradient of the *summed* cross-entropy. ``rows``: answer positions of each sequence, in order;
    they add up to n.
    """

    keys: list[Tensor]
    key_of: list[int]
    grads: list[Tensor]
    rows: list[int]

    def select(self, kept: Sequence[int]) -> TurnGradients:
        """Return the rows of the sequences numbered ``kept``, in that order."""
        pieces = torch.arange(sum(self.rows)).split(self.rows)
        index = torch.cat([pieces[number] for number in kept]) if kept else torch.arange(0)

        def take(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.index_select(0, index.to(tensor.device)) for tensor in tensors]

        return TurnGradients(
            take(self.keys), self.key_of, take(self.grads), [self.rows[number] for number in kept]
        )

    def non_finite_sequences(self) -> list[int]:
        """Return the numbers of the sequences with NaN or infinity in a key or a gradient."""
        device = self.keys[0].device
        bad = torch.zeros(sum(self.rows), dtype=torch.bool, device=device)
        for tensor in (*self.keys, *self.grads):
            bad |= ~tensor.isfinite().all(-1).to(device)
        pieces = bad.cpu().split(self.rows)
        return [number for number, piece in enumerate(pieces) if bool(piece.any())]


def turn_gradients(
    runner: ModelRunner,
    modules: Sequence[EditModule],
    sequences: Sequence[AnswerSequence],
    clock: PhaseClock,
) -> TurnGradients:
    """Run ``sequences`` (longest first) through the model and return their keys and gradients.

    The loss is the sum over all answer tokens, so that every token's gradient can be weighted
    afterwards whatever the passes were: a sequence's positions depend on its own loss alone. No
    weight gradient is computed, the head runs at answer positions only, and the backward pass ends
    at the first edited module.
    """

    def run(
        current: list[AnswerSequence],
    ) -> tuple[list[Tensor], list[int], list[Tensor]]:
        batch = runner.batch(current)
        tokens = batch.inputs["input_ids"].numel()
        with capturing(modules, batch.answer_slots, tokens) as capture, torch.enable_grad():
            with clock.phase("forward"):
                logits = runner.answer_logits(batch).float()
                loss = cross_entropy(logits, batch.targets.to(logits.device), reduction="sum")
            with clock.phase("backward"):
                grads = capture.gradients(loss)
        return capture.keys, capture.key_of, grads

    with frozen(runner.model):
        passes = runner.run_in_passes(sequences, run)
    ordered = [sequence.index for current, _ in passes for sequence in current]
    if ordered != [sequence.index for sequence in sequences]:
        raise AssertionError("passes changed the order of the sequences")
    keys, key_of, grads = zip(*(result for _, result in passes), strict=True)
    return TurnGradients(
        [torch.cat(parts) for parts in zip(*keys, strict=True)],
        key_of[0],
        [torch.cat(parts) for parts in zip(*grads, strict=True)],
        [len(sequence.targets) for sequence in sequences],
    )
