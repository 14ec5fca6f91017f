"""UltraEdit's shift ``Δ = (Kᵀ K + λ I)⁻¹ Kᵀ V`` (arXiv 2505.14679) and its low-rank form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """What is added to a weight ``[..., d_out, d_in]``, dense or as a product of low rank.

    Dual form: ``Δᵀ = leftᵀ right`` with ``left`` ``[..., n, d_out]`` and ``right`` ``[..., n,
    d_in]``. Primal form: ``matrix`` ``[..., d_out, d_in]`` holds ``Δᵀ``. All float32, or float64 in
    the reference.
    """

    form: str
    rank: int
    left: Tensor | None = None
    right: Tensor | None = None
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        if self.form == "dual":
            complete = self.left is not None and self.right is not None and self.matrix is None
        elif self.form == "primal":
            complete = self.matrix is not None and self.left is None and self.right is None
        else:
            raise ValueError(f"form is {self.form!r}, not 'dual' or 'primal'")
        if not complete:
            raise ValueError("a dual Shift holds left and right, a primal one holds matrix")

    @property
    def shape(self) -> torch.Size:
        """Return the shape of ``Δᵀ``, ``[..., d_out, d_in]``."""
        if self.matrix is not None:
            return self.matrix.shape
        assert self.left is not None and self.right is not None
        return torch.Size([*self.left.shape[:-2], self.left.shape[-1], self.right.shape[-1]])

    @property
    def device(self) -> torch.device:
        """Return the device that holds the shift."""
        held = self.matrix if self.matrix is not None else self.right
        assert held is not None
        return held.device

    def to(self, device: torch.device) -> Shift:
        """Return the shift on ``device``."""
        parts = {"left": self.left, "right": self.right, "matrix": self.matrix}
        moved = {name: None if part is None else part.to(device) for name, part in parts.items()}
        return Shift(self.form, self.rank, **moved)

    def dense(self) -> Tensor:
        """Return ``Δᵀ`` as one matrix, ``[..., d_out, d_in]``."""
        if self.matrix is not None:
            return self.matrix
        assert self.left is not None and self.right is not None
        return self.left.mT @ self.right

    def largest_entry_bound(self) -> Tensor:
        """Return an upper bound of ``max |Δᵀ|`` (a scalar, float64) that costs no dense matrix.

        In dual form, by Cauchy and Schwarz, the product of the largest column norms of both
        factors. NaN or infinite where the shift is.
        """
        if self.matrix is not None:
            if not self.matrix.numel():
                return self.matrix.new_zeros((), dtype=torch.float64)
            # No abs, which would be a dense matrix more.
            smallest, largest = torch.aminmax(self.matrix)
            return torch.maximum(-smallest, largest).double()
        assert self.left is not None and self.right is not None
        norms = [_column_norms(part) for part in (self.left, self.right)]
        if not all(norm.numel() for norm in norms):
            return norms[0].new_zeros(())
        return norms[0].max() * norms[1].max()


def _column_norms(part: Tensor) -> Tensor:
    # In float64, since a norm rounded down is no bound; slice by slice, so that no copy is whole.
    slices = part.split(4096, dim=-1)
    norms = [torch.linalg.vector_norm(columns.double(), dim=-2).flatten() for columns in slices]
    return torch.cat(norms)


def solve_shift(keys: Tensor, values: Tensor, ridge: float = 1.0, form: str = "auto") -> Shift:
    """Return ``Δᵀ`` for keys ``[..., n, d_in]`` and values ``[..., n, d_out]``, as published:
    primal.

    ``form`` is here to match the op; the reference has one form.
    """
    identity = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    shift = torch.linalg.solve(keys.mT @ keys + ridge * identity, keys.mT @ values)
    return Shift("primal", min(keys.shape[-2], *shift.shape[-2:]), matrix=shift.mT)
