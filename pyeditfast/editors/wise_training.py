"""Training a side memory on a batch of edits: the steps of WISE (arXiv 2405.14768, section 2.3.2),
each as cheap as what lies behind the edited module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.editors.wise_graph import StepGraphs
from pyeditfast.model.prefix import module_inputs
from pyeditfast.model.query_batch import Query, QueryBatch, query_batch
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.suffix_replay import SuffixReplay
from pyeditfast.ops import (
    margin_loss,
    masked_sgd_product_,
    mean_of_positive,
    query_gap,
    token_gaps,
)

WEIGHT_DECAY = 1e-5
SMALL_CHANGE = 1e-4
SMALL_LOSS = 0.02
"""Training stops before a step when the loss of the step before moved by no more than
``SMALL_CHANGE`` and was no more than ``SMALL_LOSS``.
"""

STEPS_BETWEEN_CHECKS = 10
"""On a GPU, steps between two questions to the device whether training has stopped; the steps in
between do nothing once it has.
"""


@dataclass(frozen=True)
class EditQueries:
    """What one edit is trained on: its prompt in every template with the target, and its locality
    prompt.
    """

    sequences: list[Query]
    locality: Query


@dataclass(frozen=True)
class PastQueries:
    """Sequences of earlier edits: those that other memories hold, a group for each, and those that
    this one holds.
    """

    others: list[list[Query]]
    own: list[Query]


@dataclass(frozen=True)
class TrainingOutcome:
    """``steps`` taken; the mean gap of each edit's sequences and the gap of its locality prompt at
    the last step; ``finite``: whether every loss was, and the side memory is.
    """

    steps: int
    loss: float
    in_gaps: list[float]
    out_gaps: list[float]
    finite: bool


class SideMemoryTraining:
    """The training of ``side`` ``[d_out, d_in]``, beside ``main`` of the same shape, on a batch of
    edits.

    The module ``module_name`` reads the same inputs at every step, so the model runs up to it once
    and from then on only behind it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        module_name: str,
        main: Tensor,
        side: Tensor,
        bias: Tensor | None,
        config: WiseConfig,
        activation: str | None,
        edits: Sequence[EditQueries],
        past: PastQueries | None,
        *,
        pad_token: int,
        graphs: StepGraphs,
    ) -> None:
        self.main, self.side, self.bias = main, side, bias
        self.config, self.activation = config, activation
        self.graphs = graphs
        # A gap over more than 100 tokens is a mean too while editing, as published.
        self.reduction = "mean" if config.reduction == "auto" else config.reduction
        self.edit_count = len(edits)
        self.sequences = [sequence for edit in edits for sequence in edit.sequences]
        locality = [edit.locality for edit in edits]
        layout, longest = self._layout(runner, [*self.sequences, *locality])

        def batch(queries: Sequence[Query]) -> QueryBatch:
            return query_batch(queries, layout, pad_token=pad_token, longest=longest).to(
                runner.device
            )

        edited = batch(self.sequences)
        self.replay = SuffixReplay(runner, module_name, edited.batch)
        self.token_weights = self._token_weights(edited.answers).to(main.device)
        groups = [edited, batch(locality)]
        if past is not None:
            groups += [batch(queries) for queries in (*past.others, past.own) if queries]
        self.others = 0 if past is None else len(past.others)
        inputs = [
            self.replay.inputs,
            *(module_inputs(runner, module_name, group.batch) for group in groups[1:]),
        ]
        self.inputs = torch.cat(inputs)
        self.sizes = [len(part) for part in inputs]
        self.rows = [group.rows.to(main.device) for group in groups]
        self.masks = [self._counted(group.mask).to(main.device) for group in groups]
        self.main_output = linear(self.inputs, main, bias)
        self.replay.drop_queries(self.main_output[: self.sizes[0]])

    def _layout(self, runner: ModelRunner, queries: Sequence[Query]) -> tuple[str, int | None]:
        longest = max(len(query) for query in queries)
        if self.config.quirks == "published":
            return "left", longest
        return ("packed" if runner.packs(longest) else "right"), None

    def _counted(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask) if self.config.quirks == "published" else mask

    def _token_weights(self, answers: Sequence[int]) -> Tensor:
        """Return what each answer token counts for: a mean over its sequence, then over all."""
        extra = 1 if self.config.quirks == "published" else 0
        each = [1.0 / (len(answers) * (count + extra)) for count in answers]
        weights = torch.tensor(each, dtype=_at_least_float32(self.main[:0]).dtype)
        return weights.repeat_interleave(torch.tensor(answers))

    def run(self, seed: int) -> TrainingOutcome:
        """Take the steps with the mask of ``seed``."""
        state = _State(self.main.device, self.edit_count)
        step = self._step_function(state, seed)
        cuda = self.main.device.type == "cuda"
        every = STEPS_BETWEEN_CHECKS if cuda else 1
        with self.graphs.replayed(step) if cuda else contextlib.nullcontext(step) as take:
            for number in range(self.config.n_iter):
                take()
                if (number + 1) % every == 0 and not bool(state.running):
                    break
        # The last step has no pass behind it that would show what it did.
        sound = torch.stack(torch.aminmax(self.side)).isfinite().all()
        return state.outcome(sound)

    def _step_function(self, state: _State, seed: int) -> Callable[[], None]:
        config = self.config

        def step() -> None:
            output = linear(self.inputs, self.side, self.bias).detach().requires_grad_()
            with torch.enable_grad():
                loss, in_gaps, out_gaps = self._loss(output)
            (grads,) = torch.autograd.grad(loss, output)
            state.advance(loss.detach(), in_gaps.detach(), out_gaps.detach())
            masked_sgd_product_(
                self.side,
                grads,
                self.inputs,
                self.main,
                seed=seed,
                ratio=config.mask_ratio,
                lr=config.edit_lr,
                weight_decay=WEIGHT_DECAY,
                norm_constraint=config.norm_constraint,
                active=state.running,
            )

        return step

    def _loss(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and the in- and out-of-scope gaps ``[edits]``."""
        parts = output.split(self.sizes)
        losses = self.replay.answer_losses(parts[0]).to(output.device)
        loss = (losses * self.token_weights).sum()
        gaps = self._gaps(output)
        in_gaps = gaps[0].view(self.edit_count, -1)
        margins = [
            margin_loss(inside, outside, self.config.act_margin)
            for inside, outside in zip(in_gaps, gaps[1], strict=True)
        ]
        loss = loss + torch.stack(margins).mean() + self._replay_loss(gaps[2:])
        return loss, in_gaps.mean(-1), gaps[1]

    def _gaps(self, output: Tensor) -> list[Tensor]:
        each = token_gaps(
            _at_least_float32(self.main_output), _at_least_float32(output), self.activation
        )
        return [
            query_gap(part[rows], self.reduction, mask)
            for part, rows, mask in zip(each.split(self.sizes), self.rows, self.masks, strict=True)
        ]

    def _replay_loss(self, gaps: Sequence[Tensor]) -> Tensor | float:
        """Return the loss of past edits: near the main memory those of other memories, far from it
        those of this one (WISE, appendix B.3).
        """
        alpha, beta, _ = self.config.act_margin
        loss: Tensor | float = 0.0
        if self.others:
            near = [mean_of_positive(gap - alpha) for gap in gaps[: self.others]]
            loss = torch.stack(near).mean()
        for gap in gaps[self.others :]:
            loss = loss + mean_of_positive(beta - gap)
        return loss


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _State:
    """What training knows, on the device: a stop is felt there before the host hears of it."""

    def __init__(self, device: torch.device, edits: int) -> None:
        self.running = torch.ones((), dtype=torch.bool, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        # The published meter begins with these, so that it cannot stop on its first two losses.
        self.last = torch.full((), 1e9, dtype=torch.float64, device=device)
        self.before_last = torch.zeros((), dtype=torch.float64, device=device)
        self.gaps = torch.zeros(2, edits, device=device)

    def advance(self, loss: Tensor, in_gaps: Tensor, out_gaps: Tensor) -> None:
        """Note the pass of a step and decide whether the step is taken."""
        # The pass that finds training finished still tells the gaps.
        gaps = torch.stack([in_gaps, out_gaps]).to(self.gaps)
        self.gaps.copy_(torch.where(self.running, gaps, self.gaps))
        moved = (self.last - self.before_last).abs()
        self.running &= ~((moved <= SMALL_CHANGE) & (self.last <= SMALL_LOSS))
        self.finite &= loss.isfinite() | ~self.running
        self.running &= self.finite
        self.steps += self.running
        self.before_last.copy_(torch.where(self.running, self.last, self.before_last))
        self.last.copy_(torch.where(self.running, loss.double(), self.last))

    def outcome(self, sound: Tensor) -> TrainingOutcome:
        """Return what the host may know now; ``sound``: whether the side memory is finite."""
        in_gaps, out_gaps = self.gaps.tolist()
        return TrainingOutcome(
            int(self.steps), float(self.last), in_gaps, out_gaps, bool(self.finite & sound)
        )
