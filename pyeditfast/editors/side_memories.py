"""The side memories of one module: the one that is trained, finished shards, and merged ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from pyeditfast.data.edit import Edit
from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.editors.wise_undo import BeforeSteps
from pyeditfast.ops import merge

EARLIER_SHARE = 0.6
"""What the memory of earlier merges weighs in a later one (WISE-Merge, the published code)."""

MERGE_SEEDS = 1 << 33
"""Where the seeds of merges begin, above those of all masks: a merge that drew the masks of its
shards again would keep all of what they trained.
"""


@dataclass(frozen=True, slots=True)
class WrittenEdit:
    """An edit that a side memory holds, with the locality prompt that it was trained against."""

    edit: Edit
    locality_prompt: str


@dataclass
class SideMemory:
    """One side memory ``weight`` ``[d_out, d_in]``.

    ``smallest_gap`` is the smallest in-scope gap of its edits at their last step; ``threshold`` is
    what a query's gap must exceed.
    """

    weight: Tensor
    smallest_gap: float = math.inf
    threshold: float = math.inf
    edits: list[WrittenEdit] = field(default_factory=list)

    def note(self, gap: float, edit: WrittenEdit, act_ratio: float) -> None:
        """Count in an edit whose gap at its last step was ``gap``."""
        self.smallest_gap = min(self.smallest_gap, gap)
        self.threshold = self.smallest_gap * act_ratio
        self.edits.append(edit)


class SideMemories:
    """All side memories beside ``main`` ``[d_out, d_in]``.

    ``merged`` come from merges, ``shards`` wait for one, ``current`` is trained; it is a copy of
    the main memory at first and exists only from the first edit of its shard on.
    """

    def __init__(self, main: Tensor, config: WiseConfig) -> None:
        self.main = main
        self.config = config
        self.merged: list[SideMemory] = []
        self.shards: list[SideMemory] = []
        self.current: SideMemory | None = None
        self.shards_begun = 0
        self._before: BeforeSteps | None = None
        self._edits_before = 0

    def all(self) -> list[SideMemory]:
        """Return every memory that a query can be routed to."""
        trained = [self.current] if self.current is not None and self.current.edits else []
        return [*self.merged, *self.shards, *trained]

    def trainable(self) -> SideMemory:
        """Return the memory that the next batch is written to; ``end_batch`` has to follow."""
        if self.current is None:
            self.current = SideMemory(self.main.clone())
            self.shards_begun += 1
        elif self.current.edits:
            self._before = BeforeSteps(self.current.weight, self.config, self.mask_seed)
            self._edits_before = len(self.current.edits)
        return self.current

    @property
    def mask_seed(self) -> int:
        """Return the seed of the mask of the memory in training: another for every shard."""
        return self.config.seed + max(0, self.shards_begun - 1)

    def end_batch(self) -> None:
        """Undo what was tried on the memory in training if no edit came to be in it."""
        before, self._before = self._before, None
        if self.current is None:
            return
        if not self.current.edits:
            self.current = None
            self.shards_begun -= 1
        elif before is not None and len(self.current.edits) == self._edits_before:
            before.restore()

    def close_shard_if_full(self) -> None:
        """Turn the memory in training into a shard after ``save_freq`` edits, and merge the shards
        after ``merge_freq``.
        """
        if self.current is None or len(self.current.edits) < self.config.save_freq:
            return
        self.shards.append(self.current)
        self.current = None
        # Not equal to: a merge that failed is tried again with the next shard.
        if len(self.shards) >= self.config.merge_freq // self.config.save_freq:
            self.merge_shards()

    def merge_shards(self) -> None:
        """Merge the finished shards into one memory (into the one there is, without
        ``retrieve``). Where the merge fails, all stay as they are.
        """
        parts, weights = list(self.shards), [1.0 / len(self.shards)] * len(self.shards)
        others = self.merged
        if self.merged and not self.config.retrieve:
            weights = [weight * (1.0 - EARLIER_SHARE) for weight in weights] + [EARLIER_SHARE]
            parts += self.merged
            others = []
        weight = merge(
            self.main,
            [part.weight for part in parts],
            self.config.merge_alg,
            density=self.config.density,
            weights=weights,
            seed=MERGE_SEEDS + self.config.seed + self.shards_begun,
        )
        merged = SideMemory(
            weight,
            min(part.smallest_gap for part in parts),
            min(part.threshold for part in parts),
            [edit for part in parts for edit in part.edits],
        )
        self.merged = [*others, merged]
        self.shards = []
