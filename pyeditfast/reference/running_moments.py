"""Running mean and standard deviation of UltraEdit's lifelong normalizer (arXiv 2505.14679).

The recurrence for a micro-batch ``x`` of ``m`` rows after ``n`` rows, ``N = n + m``, ``δ = mean(x)
− μ``::

    μ ← μ + m δ / N
    S ← S + (m − 1) var(x) + n m δ² / N        (unbiased: the exact sum of squared deviations)
    S ← S + m var(x) + n m δ² / N              (published)
    σ = √(S / (N − 1))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps
"""What the published code adds to a standard deviation before it divides, in every dtype."""


class RunningMoments:
    """Count, mean and standard deviation of all rows seen so far, kept in ``dtype``."""

    def __init__(
        self, size: int, variance: str = "unbiased", dtype: torch.dtype = torch.float64
    ) -> None:
        self.size, self.variance = size, variance
        self.count = 0
        self.mean = torch.zeros(size, dtype=dtype)
        self.squares = torch.zeros(size, dtype=dtype)

    @property
    def std(self) -> Tensor:
        """Return ``√(S / (N − 1))``, ``[size]``; zero while fewer than two rows were seen."""
        if self.count < 2:
            return torch.zeros_like(self.mean)
        return (self.squares / (self.count - 1)).sqrt()

    def update(self, *parts: Tensor, segments: Sequence[int] | None = None) -> None:
        """Take in rows ``[n, size]`` (parts side by side), cut into micro-batches of ``segments``
        rows.
        """
        rows = torch.cat(parts, -1).to(self.mean.dtype)
        for batch in rows.split(list(segments) if segments is not None else [rows.shape[0]]):
            self._update(batch)

    def _update(self, rows: Tensor) -> None:
        m, total = rows.shape[0], self.count + rows.shape[0]
        if m == 0:
            return
        mean = rows.mean(0)
        within = (rows - mean).square().sum(0)
        if self.variance == "published" and m > 1:
            within = within * m / (m - 1)
        delta = mean - self.mean
        self.mean = self.mean + m * delta / total
        self.squares = self.squares + within + self.count * m * delta.square() / total
        self.count = total

    def merge(self, other: RunningMoments) -> None:
        """Take in what ``other`` has seen (Chan, Golub, LeVeque 1983)."""
        total = self.count + other.count
        if total == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + other.count * delta / total
        between = self.count * other.count * delta.square() / total
        self.squares = self.squares + other.squares + between
        self.count = total

    def normalize(self, rows: Tensor) -> Tensor:
        """Return ``(x − μ) / (σ + eps)`` for rows ``[..., size]``."""
        return (rows - self.mean) / (self.std + EPSILON)
