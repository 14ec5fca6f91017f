"""Solution of symmetric positive definite systems; an error names the item that fails."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, limiting, refusing
from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops.checks import check_rows, check_same_device, check_square
from pyeditfast.ops.cholesky_on_cuda import solve_on_cuda
from pyeditfast.ops.cholesky_size_class import size_class
from pyeditfast.ops.compiled import cuda_candidate
from pyeditfast.ops.measured_backend import not_measured_faster

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS = (
    cuda_candidate("cholesky_solve"),
    Candidate("torch", always),
    Candidate("reference", always),
)

CANDIDATES = limiting(
    _IMPLEMENTATIONS,
    "cuda",
    lambda device: "it is taken at the sizes for which `make tune` measured it to be faster",
)

JITTERS = (1e-12, 1e-10, 1e-8)
"""Multiples of the mean diagonal that are tried, in float64, on an item that is not positive
definite.
"""

STRIP = 256
"""Rows that are looked at together where a copy of the whole matrix is not wanted."""


def cholesky_solve(gram: Tensor, rhs: Tensor, *, overwrite_gram: bool = False) -> Tensor:
    """Return ``G⁻¹ B`` by Cholesky factorization.

    ``gram`` ``[..., n, n]`` symmetric positive definite and ``rhs`` ``[..., n, m]``, both float32
    or both float64; the result has the shape and dtype of ``rhs``. Only the lower triangle of
    ``gram`` is read. An item that has no float32 factor is solved in float64, then with a small
    jitter on its diagonal (a warning says how much); what still fails raises
    ``NotPositiveDefiniteError`` with the index of the item. NaN or infinity in ``gram`` raises
    ``NonFiniteError``.

    With ``overwrite_gram`` the factor of an item takes its place in ``gram``, which is of no use
    afterwards, and no second matrix of that size exists (else there are two). ``gram`` has to be
    contiguous then and to ask for no gradient, ``rhs`` neither: ``ValueError``. An item that has no
    factor raises ``NotPositiveDefiniteError`` at once, for nothing is left of it to solve in
    float64. The reference backend overwrites nothing.

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
    if overwrite_gram:
        _check_overwritable(gram, rhs)
    chosen = choose("cholesky_solve", _candidates(gram, rhs, overwrite_gram), gram.device)
    if chosen == "reference":
        return reference.cholesky_solve(gram.double(), rhs.double()).to(rhs.dtype)
    if gram.numel() == 0:
        return rhs.clone()
    if overwrite_gram:
        return _solve_overwriting(gram, rhs)
    if chosen == "cuda":
        solution, pivots = solve_on_cuda(gram, rhs)
        sound = pivots == 0
    else:
        factor, pivots = torch.linalg.cholesky_ex(gram)
        # LAPACK takes an infinite last pivot for a good one.
        sound = (pivots == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        solution = torch.cholesky_solve(rhs, factor)
    return solution if bool(sound.all()) else _repaired(gram, rhs, solution, sound)


def _candidates(gram: Tensor, rhs: Tensor, overwrite_gram: bool) -> Sequence[Candidate]:
    if overwrite_gram:
        return refusing(CANDIDATES, "cuda", "a matrix is overwritten by torch's solver")
    if torch.is_grad_enabled() and (gram.requires_grad or rhs.requires_grad):
        return refusing(CANDIDATES, "cuda", "the CUDA form has no backward pass")
    n, columns = rhs.shape[-2:]
    size = size_class(gram.shape[:-2].numel(), n, columns, gram.dtype)
    measured = functools.partial(not_measured_faster, "cholesky_solve", "cuda", size, "torch")
    return limiting(_IMPLEMENTATIONS, "cuda", measured, f"measured to be faster for {size}")


def factor_(gram: Tensor) -> int:
    """Replace a contiguous ``gram`` ``[n, n]`` by its lower factor, with zeros above it.

    Returns 0, or the number of the pivot (from 1) that is not positive and finite; ``gram`` is
    destroyed then.
    """
    # LAPACK works on columns: in its eyes a matrix stored by rows is the transpose, and the lower
    # triangle the upper one. Any other layout would make torch factor a copy.
    by_columns = gram.mT
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(by_columns, upper=True, out=(by_columns, info))
    pivot = int(info)
    if pivot == 0 and not bool(gram.diagonal().isfinite().all()):
        # LAPACK takes an infinite last pivot for a good one.
        return gram.shape[-1]
    return pivot


def substitute_(factor: Tensor, rhs: Tensor) -> None:
    """Replace ``rhs`` ``[n, m]`` (by rows or by columns) by ``(L Lᵀ)⁻¹ rhs``, ``factor`` = ``L``.

    ``torch.cholesky_solve`` would copy the factor.
    """
    torch.linalg.solve_triangular(factor, rhs, upper=False, out=rhs)
    torch.linalg.solve_triangular(factor.mT, rhs, upper=True, out=rhs)


def repaired_factor(fresh: Callable[[], Tensor], item: int) -> Tensor:
    """Return the float64 factor of a matrix that failed, with as little jitter as it takes.

    ``fresh`` returns the matrix, contiguous and float64, anew each time, and the factor takes its
    place: there is never more than one. Raises ``NonFiniteError`` and ``NotPositiveDefiniteError``,
    which name ``item``.
    """
    for jitter in (0.0, *JITTERS):
        gram = fresh()
        # Not `isfinite`, which would make a copy.
        if not bool(torch.linalg.vector_norm(gram, float("inf")).isfinite()):
            raise NonFiniteError(f"item {item} of gram holds NaN or infinity")
        scale = gram.diagonal().mean().item()
        gram.diagonal().add_(jitter * scale)
        pivot = factor_(gram)
        if pivot == 0:
            if jitter:
                logger.warning(
                    "item %d of gram is not positive definite; %.3g was added to its diagonal",
                    item,
                    jitter * scale,
                )
            return gram
        shape = tuple(gram.shape)
        # Before the next one is made.
        del gram
    raise NotPositiveDefiniteError(
        f"item {item} of gram {shape} is not positive definite (pivot {pivot}), "
        f"not even in float64 with {JITTERS[-1] * scale:.3g} added to its diagonal"
    )


def _check_overwritable(gram: Tensor, rhs: Tensor) -> None:
    if not gram.is_contiguous():
        raise ValueError(
            f"gram {tuple(gram.shape)} has strides {gram.stride()}; "
            "overwrite_gram needs a contiguous one"
        )
    if torch.is_grad_enabled() and (gram.requires_grad or rhs.requires_grad):
        name = "gram" if gram.requires_grad else "rhs"
        raise ValueError(f"{name} requires a gradient, for which overwrite_gram leaves nothing")


def _solve_overwriting(gram: Tensor, rhs: Tensor) -> Tensor:
    # Of all items before the first factor, for rhs may be a part of gram.
    solution = rhs.clone(memory_format=torch.contiguous_format)
    places = itertools.product(*(range(size) for size in gram.shape[:-2]))
    for item, place in enumerate(places):
        if not _lower_is_finite(gram[place]):
            raise NonFiniteError(f"item {item} of gram holds NaN or infinity")
        pivot = factor_(gram[place])
        if pivot:
            raise NotPositiveDefiniteError(
                f"item {item} of gram {tuple(gram.shape[-2:])} is not positive definite "
                f"(pivot {pivot}); overwritten, it cannot be tried in float64"
            )
        substitute_(gram[place], solution[place])
    return solution


def _lower_is_finite(gram: Tensor) -> bool:
    norms = [
        torch.linalg.vector_norm(rows[:, : start + rows.shape[0]].tril(start), float("inf"))
        for start, rows in zip(range(0, gram.shape[0], STRIP), gram.split(STRIP), strict=True)
    ]
    return bool(torch.stack(norms).isfinite().all())


def _repaired(gram: Tensor, rhs: Tensor, solution: Tensor, sound: Tensor) -> Tensor:
    """Return the solution with the items that are not ``sound`` solved anew, in float64."""
    n, m = rhs.shape[-2:]
    grams, sides = gram.reshape(-1, n, n), rhs.reshape(-1, n, m)
    repaired = solution.reshape(-1, n, m).clone()
    for item in (~sound).flatten().nonzero().flatten().tolist():
        factor = repaired_factor(functools.partial(_in_float64, grams[item]), item)
        side = _in_float64(sides[item])
        substitute_(factor, side)
        repaired[item] = side
    return repaired.reshape(rhs.shape)


def _in_float64(tensor: Tensor) -> Tensor:
    """Return a contiguous float64 copy."""
    return torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device).copy_(tensor)
