"""Where a model with side memories sends edited and unrelated prompts, and by what margin."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pyeditfast.model.query_routing import Route

KEPT = 10_000
"""Gaps kept of each kind of prompt, so that a stream of millions needs constant memory."""

ANSWERED_BY_MAIN = "specificity"
"""The kind of prompt that no side memory should answer."""


@dataclass(frozen=True)
class RoutingScores:
    """Shares in [0, 1] of the prompts that were routed as wanted; None where there was none.

    ``efficacy``, ``generalization`` and ``portability``: the edited prompts, their rephrasings and
    the portability prompts that a side memory answers. ``specificity``: the locality prompts that
    the main memory answers. ``counts``: prompts of each kind. ``thresholds``: one a side memory.

    ``gaps``: by kind, the gap of each prompt (a random sample of ``KEPT`` where there are more) in
    the side memory that answers it or, where the main memory does, in the one whose threshold it
    comes nearest to; ``memories`` are the numbers of these side memories.
    """

    efficacy: float | None = None
    generalization: float | None = None
    specificity: float | None = None
    portability: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()
    gaps: dict[str, list[float]] = field(default_factory=dict)
    memories: dict[str, list[int]] = field(default_factory=dict)

    def relative_gaps(self, kind: str) -> list[float]:
        """Return the gaps of ``kind``, each over the threshold of its side memory: above 1 means
        that the side memory answers.
        """
        return [
            _relative(gap, self.thresholds[memory])
            for gap, memory in zip(self.gaps[kind], self.memories[kind], strict=True)
        ]

    def to_dict(self) -> dict[str, object]:
        """Return the scores as JSON-ready values; None for a gap that is not finite."""
        return {
            **asdict(self),
            "thresholds": [_json_ready(value) for value in self.thresholds],
            "gaps": {kind: [_json_ready(gap) for gap in gaps] for kind, gaps in self.gaps.items()},
        }

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {getattr(self, kind):.3f}" for kind in self.gaps)
        alone = len(self.thresholds) == 1
        medians = ", ".join(
            f"{kind} {statistics.median(gaps if alone else self.relative_gaps(kind)):.3g}"
            for kind, gaps in self.gaps.items()
        )
        told = f"routed as wanted: {shares}\nmedian gap"
        if alone:
            return f"{told}: {medians} (threshold {self.thresholds[0]:.3g})"
        return f"{told} over threshold: {medians} ({len(self.thresholds)} side memories)"


class RoutingTally:
    """Counts the routes of prompts of some ``kinds``."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._draw = random.Random(0)
        self._thresholds: tuple[float, ...] = ()
        self._counts = dict.fromkeys(kinds, 0)
        self._sides = dict.fromkeys(kinds, 0)
        self._kept: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}

    def add(self, kind: str, route: Route) -> None:
        """Count the ``route`` of a prompt of ``kind``."""
        self._thresholds = route.thresholds
        self._counts[kind] += 1
        self._sides[kind] += route.memory >= 0
        kept = self._kept[kind]
        memory = _deciding_memory(route)
        if len(kept) < KEPT:
            kept.append((route.gaps[memory], memory))
            return
        place = self._draw.randrange(self._counts[kind])
        if place < KEPT:
            kept[place] = (route.gaps[memory], memory)

    def scores(self) -> RoutingScores | None:
        """Return the scores of all prompts counted, None before the first."""
        shares = {kind: self._sides[kind] / count for kind, count in self._counts.items() if count}
        if not shares:
            return None
        if ANSWERED_BY_MAIN in shares:
            shares[ANSWERED_BY_MAIN] = 1.0 - shares[ANSWERED_BY_MAIN]
        return RoutingScores(
            **shares,
            counts=dict(self._counts),
            thresholds=self._thresholds,
            gaps={kind: [gap for gap, _ in self._kept[kind]] for kind in shares},
            memories={kind: [memory for _, memory in self._kept[kind]] for kind in shares},
        )


def _deciding_memory(route: Route) -> int:
    if route.memory >= 0:
        return route.memory
    relative = [
        _relative(gap, threshold)
        for gap, threshold in zip(route.gaps, route.thresholds, strict=True)
    ]
    # A NaN compares with nothing; it is nearest to no threshold.
    ranked = [-math.inf if math.isnan(value) else value for value in relative]
    return max(range(len(ranked)), key=ranked.__getitem__)


def _relative(gap: float, threshold: float) -> float:
    if threshold > 0:
        return gap / threshold
    return math.inf if gap > threshold else 1.0


def _json_ready(value: float) -> float | None:
    return value if math.isfinite(value) else None
