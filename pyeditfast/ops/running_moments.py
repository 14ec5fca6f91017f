"""UltraEdit's lifelong normalizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.ops.checks import check_rows
from pyeditfast.reference.running_moments import EPSILON

CANDIDATES = (
    triton_candidate("running_moments"),
    Candidate("torch", always),
    Candidate("reference", always),
)

VARIANCES = ("unbiased", "published")


class RunningMoments:
    """Running mean and standard deviation of every row seen so far, for ``size`` features.

    ``variance="unbiased"`` (the default) keeps the exact pooled variance. ``"published"``
    reproduces the figure of the published code, which weights each micro-batch of ``m`` rows by
    ``m`` instead of ``m − 1``; a micro-batch of one row counts as variance 0 there, where the
    published code turns to NaN. The state is float64, the count an exact integer, so that millions
    of edits do not drift. Raises ``ValueError`` for a size below 1 or an unknown variance.

    Source: UltraEdit, arXiv 2505.14679; merging after Chan, Golub, LeVeque (1983).
    """

    def __init__(
        self, size: int, variance: str = "unbiased", *, device: torch.device | str | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; at least one feature is needed")
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; choose one of {', '.join(VARIANCES)}")
        self.size = size
        self.variance = variance
        self._count = 0
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"RunningMoments(size={self.size}, variance={self.variance!r}, count={self._count})"

    @property
    def count(self) -> int:
        """Return the number of rows seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """Return the mean of the rows seen, ``[size]`` float64 (a copy)."""
        return self._mean.clone()

    @property
    def std(self) -> Tensor:
        """Return the standard deviation, ``[size]`` float64; zero while fewer than two rows were
        seen.
        """
        if self._count < 2:
            return torch.zeros_like(self._squares)
        return (self._squares / (self._count - 1)).sqrt_()

    def update(self, *parts: Tensor, segments: Sequence[int] | None = None) -> None:
        """Take in rows.

        ``parts``: one tensor ``[..., n, size]``, or several ``[..., n, ·]`` whose last dimensions
        add up to ``size`` (keys and gradients need not be joined); any floating dtype. ``segments``
        are the numbers of rows of the consecutive micro-batches, over the flattened rows; they
        matter only for ``variance="published"`` and default to one micro-batch. Raises
        ``ValueError`` for shapes or segments that do not add up.

        Floor: the rows read once, about 3 FLOPs an element.
        """
        rows = self._flatten(parts)
        n = rows[0].shape[0]
        if segments is not None and (sum(segments) != n or any(m < 1 for m in segments)):
            raise ValueError(f"segments {list(segments)} do not cut {n} rows into micro-batches")
        if n == 0:
            return
        candidates = fitting(CANDIDATES, *(part.dtype for part in rows))
        chosen = choose("running_moments", candidates, rows[0].device)
        lengths = [n] if segments is None or self.variance == "unbiased" else list(segments)
        if chosen == "triton":
            self._update_by_kernel(rows, lengths)
            return
        if chosen == "reference":
            rows = [part.double() for part in rows]
        start = 0
        for m in lengths:
            self._update_segment([part[start : start + m] for part in rows], m)
            start += m

    def _flatten(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if not parts:
            raise ValueError("update needs at least one tensor of rows")
        for part in parts:
            check_rows("rows", part)
        leading = parts[0].shape[:-1]
        widths = [part.shape[-1] for part in parts]
        if sum(widths) != self.size or any(part.shape[:-1] != leading for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"rows of shape {shapes} do not make [..., n, {self.size}]")
        # The product, not -1: torch cannot infer a dimension when a tensor is empty.
        n = math.prod(leading)
        return [part.reshape(n, part.shape[-1]) for part in parts]

    def _update_segment(self, rows: Sequence[Tensor], m: int) -> None:
        means, squares = zip(*(_mean_and_squares(part) for part in rows), strict=True)
        within = torch.cat(squares).to(self._squares)
        if self.variance == "published" and m > 1:
            within *= m / (m - 1)
        self._absorb(m, torch.cat(means).to(self._mean), within)

    def _update_by_kernel(self, rows: Sequence[Tensor], lengths: Sequence[int]) -> None:
        from pyeditfast_kernels.running_moments import running_moments

        published = lengths if self.variance == "published" else None
        mean, squares = running_moments(rows, published)
        self._absorb(sum(lengths), mean.to(self._mean), squares.to(self._squares))

    def _absorb(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self._count + count
        delta = mean - self._mean
        self._squares += squares
        self._squares += delta.square().mul_(self._count * count / total)
        self._mean += delta.mul_(count / total)
        self._count = total

    def merge(self, other: RunningMoments) -> None:
        """Take in everything that ``other`` has seen.

        Raises ``ValueError`` if sizes or variances differ.
        """
        if other.size != self.size or other.variance != self.variance:
            raise ValueError(f"{other!r} cannot be merged into {self!r}")
        if other._count:
            self._absorb(
                other._count,
                other._mean.to(self._mean.device),
                other._squares.to(self._squares.device),
            )

    def mean_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the mean and ``1 / (std + eps)``, both ``[size]`` float32 on ``device``."""
        scale = (self.std + EPSILON).reciprocal_()
        return self._mean.to(device, torch.float32), scale.to(device, torch.float32)

    def normalize(self, rows: Tensor) -> Tensor:
        """Return ``(x − mean) / (std + eps)`` for rows ``[..., size]``, eps that of float32.

        The result is float64 for float64 rows, else float32. There is no kernel for it, since
        ``edit_values`` normalizes for itself: ``"triton"`` takes the torch form. Raises
        ``ValueError`` for another width.
        """
        check_rows("rows", rows)
        if rows.shape[-1] != self.size:
            raise ValueError(f"rows have shape {tuple(rows.shape)}; [..., {self.size}] is needed")
        if choose("running_moments", CANDIDATES, rows.device) == "reference":
            return self._normalize_float64(rows.double()).to(_result_dtype(rows))
        if rows.dtype == torch.float64:
            return self._normalize_float64(rows)
        mean, scale = self.mean_and_scale(rows.device)
        return (rows.float() - mean).mul_(scale)

    def _normalize_float64(self, rows: Tensor) -> Tensor:
        return (rows - self._mean.to(rows.device)) / (self.std.to(rows.device) + EPSILON)

    def state_dict(self) -> dict[str, Tensor]:
        """Return count (int64), mean and squares (float64, ``[size]``) as tensors that share no
        memory.
        """
        return {
            "count": torch.tensor(self._count, dtype=torch.int64),
            "mean": self._mean.clone(),
            "squares": self._squares.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned; raises ``ValueError`` if names or sizes differ."""
        if set(state) != {"count", "mean", "squares"}:
            raise ValueError(f"state holds {sorted(state)}; count, mean and squares are needed")
        for name in ("mean", "squares"):
            if state[name].shape != (self.size,):
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not ({self.size},)")
        self._count = int(state["count"])
        self._mean = state["mean"].to(self._mean, copy=True)
        self._squares = state["squares"].to(self._squares, copy=True)

    def copy(self) -> RunningMoments:
        """Return an independent copy."""
        twin = RunningMoments(self.size, self.variance, device=self._mean.device)
        twin.load_state_dict(self.state_dict())
        return twin


def _mean_and_squares(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Two passes: the deviations are taken from the mean, so that a large mean costs no digits. What
    # rounding the mean to float32 lost is the mean of the deviations; without it a constant column
    # would be left with a deviation of one rounding, and normalize to noise instead of 0.
    rows = rows.to(_result_dtype(rows))
    rounded = rows.mean(0)
    deviations = rows - rounded
    lost = deviations.mean(0).double()
    squares = deviations.square_().sum(0).double() - lost.square() * rows.shape[0]
    return rounded.double() + lost, squares.clamp_(min=0.0)


def _result_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32
