"""Solutions of linear systems that are better than float64's own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def exact_solution(gram: Tensor, rhs: Tensor) -> Tensor:
    """Return ``gram⁻¹ rhs`` in float64, rounded once or little more.

    Each step of iterative refinement solves for what is missing, which ``longdouble`` tells where
    it is wider than float64: the solution gains all digits of a step but those that the condition
    takes.
    """
    matrix, wanted = gram.double(), rhs.double()
    wide_matrix = matrix.numpy().astype(np.longdouble)
    wide_wanted = wanted.numpy().astype(np.longdouble)
    solution = torch.linalg.solve(matrix, wanted).numpy().astype(np.longdouble)
    for _ in range(2):
        missing = (wide_wanted - wide_matrix @ solution).astype(np.float64)
        solution = solution + torch.linalg.solve(matrix, torch.from_numpy(missing)).numpy()
    return torch.from_numpy(solution.astype(np.float64))
