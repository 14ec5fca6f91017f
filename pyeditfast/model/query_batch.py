"""Whole queries as model inputs: prompts with their whole target, or prompts alone.

WISE measures gaps at every token of a query, the last target token included, which an
``AnswerSequence`` leaves out because nothing has to follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeditfast.model.packing import PackedLayout
from pyeditfast.model.runner import Batch

LAYOUTS = ("packed", "right", "left")


@dataclass(frozen=True, slots=True)
class Query:
    """The tokens of a prompt and its target; ``targets`` are the last of ``tokens``, or none."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer_positions(self) -> range:
        """Return the positions that a target token follows."""
        first = len(self.tokens) - len(self.targets) - 1
        return range(first, first + len(self.targets))


@dataclass(frozen=True)
class QueryBatch:
    """Queries as model inputs, and where their tokens lie.

    ``batch.answer_slots`` and ``batch.targets`` are those of all queries in order. ``rows``
    ``[queries, longest]`` index the flattened tokens of the pass, ``mask`` of the same shape tells
    which of them count; ``answers`` are the target tokens of each query.
    """

    batch: Batch
    rows: Tensor
    mask: Tensor
    answers: list[int]

    def to(self, device: torch.device) -> QueryBatch:
        """Return the batch with every tensor on ``device``."""
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.batch.inputs.items()
        }
        batch = Batch(inputs, self.batch.answer_slots.to(device), self.batch.targets.to(device))
        return QueryBatch(batch, self.rows.to(device), self.mask.to(device), self.answers)


def query_batch(
    queries: Sequence[Query], layout: str, *, pad_token: int = 0, longest: int | None = None
) -> QueryBatch:
    """Return ``queries`` as one pass.

    ``layout``: ``"packed"`` concatenates them in one row; ``"right"`` and ``"left"`` pad on that
    side, on the left to ``longest`` where it is given.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    lengths = torch.tensor([len(query) for query in queries])
    width = max(int(lengths.max()), longest or 0)
    columns = torch.arange(width)
    if layout == "packed":
        packed = PackedLayout(lengths.tolist())
        starts = lengths.cumsum(0) - lengths
        tokens = torch.tensor([token for query in queries for token in query.tokens])
        inputs = {
            "input_ids": tokens.unsqueeze(0),
            "position_ids": packed.positions().unsqueeze(0),
            "packed_layout": packed,
        }
        rows = starts[:, None] + torch.minimum(columns[None, :], lengths[:, None] - 1)
        mask = columns[None, :] < lengths[:, None]
    else:
        rows = torch.arange(len(queries) * width).view(len(queries), width)
        shift = width - lengths if layout == "left" else torch.zeros_like(lengths)
        starts = torch.arange(len(queries)) * width + shift
        places = columns[None, :] - shift[:, None]
        mask = (places >= 0) & (places < lengths[:, None])
        ids = torch.full((len(queries), width), pad_token)
        ids[mask] = torch.tensor([token for query in queries for token in query.tokens])
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
    slots = [
        start + position
        for query, start in zip(queries, starts.tolist(), strict=True)
        for position in query.answer_positions
    ]
    targets = [token for query in queries for token in query.targets]
    batch = Batch(
        inputs, torch.tensor(slots, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
    )
    return QueryBatch(batch, rows, mask, [len(query.targets) for query in queries])
