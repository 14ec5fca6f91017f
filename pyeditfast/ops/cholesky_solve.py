"""Solution of symmetric positive definite systems; an error names the item that fails."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose
from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops.checks import check_rows, check_same_device, check_square

logger = logging.getLogger(__name__)

CANDIDATES = (Candidate("torch", always), Candidate("reference", always))

JITTERS = (1e-12, 1e-10, 1e-8)
"""Multiples of the mean diagonal that are tried, in float64, on an item that is not positive
definite.
"""


def cholesky_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """Return ``G⁻¹ B`` by Cholesky factorization.

    ``gram`` ``[..., n, n]`` symmetric positive definite and ``rhs`` ``[..., n, m]``, both float32
    or both float64; the result has the shape and dtype of ``rhs``. Only the lower triangle of
    ``gram`` is read. An item that has no float32 factor is solved in float64, then with a small
    jitter on its diagonal (a warning says how much); what still fails raises
    ``NotPositiveDefiniteError`` with the index of the item. NaN or infinity in ``gram`` raises
    ``NonFiniteError``.

    Floor for one batch item: ``n³ / 3 + 2 n² m`` FLOPs, ``n² + 2 n m`` elements moved.
    """
    check_square("gram", gram)
    check_rows("rhs", rhs)
    if gram.dtype not in (torch.float32, torch.float64) or rhs.dtype != gram.dtype:
        raise TypeError(
            f"gram has dtype {gram.dtype} and rhs {rhs.dtype}; "
            "both torch.float32 or both torch.float64 are needed"
        )
    if gram.shape[:-1] != rhs.shape[:-1]:
        raise ValueError(f"gram {tuple(gram.shape)} and rhs {tuple(rhs.shape)} do not match")
    check_same_device("gram", gram.device, "rhs", rhs.device)
    if choose("cholesky_solve", CANDIDATES, gram.device) == "reference":
        return reference.cholesky_solve(gram.double(), rhs.double()).to(rhs.dtype)
    if gram.numel() == 0:
        return rhs.clone()
    factor, info = torch.linalg.cholesky_ex(gram)
    # LAPACK takes an infinite last pivot for a good one.
    sound = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(sound.all()):
        return _solve_item_by_item(gram, rhs, factor, sound)
    return torch.cholesky_solve(rhs, factor)


def _solve_item_by_item(gram: Tensor, rhs: Tensor, factor: Tensor, sound: Tensor) -> Tensor:
    n, m = rhs.shape[-2:]
    grams, factors = gram.reshape(-1, n, n), factor.reshape(-1, n, n)
    sides, solution = rhs.reshape(sound.numel(), n, m), rhs.new_empty(sound.numel(), n, m)
    for item, has_factor in enumerate(sound.flatten().tolist()):
        if has_factor:
            solution[item] = torch.cholesky_solve(sides[item], factors[item])
        else:
            repaired = _float64_factor(grams[item], item)
            solution[item] = torch.cholesky_solve(sides[item].double(), repaired).to(rhs.dtype)
    return solution.reshape(rhs.shape)


def _float64_factor(gram: Tensor, item: int) -> Tensor:
    exact = gram.double()
    if not bool(exact.isfinite().all()):
        raise NonFiniteError(f"item {item} of gram holds NaN or infinity")
    scale = exact.diagonal().mean().item()
    for jitter in (0.0, *JITTERS):
        attempt = exact.clone()
        attempt.diagonal().add_(jitter * scale)
        factor, info = torch.linalg.cholesky_ex(attempt)
        if info.item() == 0:
            if jitter:
                logger.warning(
                    "item %d of gram is not positive definite; %.3g was added to its diagonal",
                    item,
                    jitter * scale,
                )
            return factor
    raise NotPositiveDefiniteError(
        f"item {item} of gram {tuple(gram.shape)} is not positive definite (pivot {int(info)}), "
        f"not even in float64 with {JITTERS[-1] * scale:.3g} added to its diagonal"
    )
