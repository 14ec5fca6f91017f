"""Solution of ``G X = B`` for a symmetric positive definite ``G``."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """Return ``G⁻¹ B`` ``[..., n, m]`` for ``gram`` ``[..., n, n]`` and ``rhs`` ``[..., n, m]``."""
    return torch.linalg.solve(gram, rhs)
