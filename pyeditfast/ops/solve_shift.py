"""UltraEdit's shift, solved on the cheaper side."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose
from pyeditfast.errors import NonFiniteError
from pyeditfast.ops.checks import check_ridge, check_same_rows
from pyeditfast.ops.cholesky_solve import cholesky_solve, factor_, repaired_factor, substitute_
from pyeditfast.ops.covariance import covariance
from pyeditfast.ops.gram import gram
from pyeditfast.ops.precision import add_product_, block_rows, exact_dtype, row_blocks
from pyeditfast.reference.solve_shift import Shift

CANDIDATES = (Candidate("torch", always), Candidate("reference", always))

FORMS = ("auto", "dual", "primal")

LARGEST_LOSS = 2e-6
"""What rounding the cheaper factor of a dual shift may cost; above it the other is solved for."""

FLOAT64_COVARIANCE_BYTES = 512 << 20
"""A covariance above this size is kept in float32: at 14336 the difference is 822 MB."""


def dual_flops(n: int, d_in: int, d_out: int) -> int:
    """Return the FLOPs of the dual form: Gram, Cholesky, and a solve with the narrower factor."""
    return 2 * n * n * d_in + n**3 // 3 + 2 * n * n * min(d_in, d_out)


def primal_flops(n: int, d_in: int, d_out: int) -> int:
    """Return the FLOPs of the primal form: covariance, ``KᵀV``, Cholesky and solve."""
    return n * d_in * d_in + 2 * n * d_in * d_out + d_in**3 // 3 + 2 * d_in * d_in * d_out


def choose_form(n: int, d_in: int, d_out: int) -> str:
    """Return the form that ``form="auto"`` takes: the one with fewer FLOPs."""
    return "dual" if dual_flops(n, d_in, d_out) <= primal_flops(n, d_in, d_out) else "primal"


def solve_shift(keys: Tensor, values: Tensor, ridge: float = 1.0, form: str = "auto") -> Shift:
    """Solve ``Δ = (Kᵀ K + λ I)⁻¹ Kᵀ V`` and return ``Δᵀ`` as a ``Shift``.

    ``keys`` ``[..., n, d_in]``, ``values`` ``[..., n, d_out]``, any floating dtype, ``ridge`` = λ >
    0. The *dual* form uses ``Δᵀ = (G⁻¹ V)ᵀ K = Vᵀ (G⁻¹ K)`` with ``G = K Kᵀ + λ I`` ``[n, n]``,
    solves for the side with fewer columns and keeps the product of rank ``n``; the *primal* form
    solves with ``Kᵀ K + λ I`` ``[d_in, d_in]`` and is dense. ``"auto"`` takes the one with fewer
    FLOPs. The normal equations are formed and solved in float64, because keys with a dominant
    direction cost float32 three digits or more; the factors of the result are float32. A primal
    system above 512 MB is formed and solved in float32; a module that has no float32 factor, again
    in float64. The shift is a constant to autograd.

    The primal form takes the modules one by one, and a factor takes the place of its matrix. Beside
    inputs and result (``4 d_in d_out`` bytes a module) it needs ``8 d_in²`` bytes up to 512 MB and
    ``4 d_in²`` above (at 14336: 822 MB; ``8 d_in²`` where float32 fails), and for blocks of rows
    and columns a seventh of that or 18 MB, whichever is more (two fifths where the user allows
    reduced float32 products).

    Raises ``ValueError`` for shapes that do not match, an unknown form or a ridge of 0 or less;
    ``NonFiniteError`` for NaN or infinity in keys or values; ``NotPositiveDefiniteError`` if no
    factor exists.

    Floor for one batch item, dual: ``n² d_in + n³ / 3 + 2 n² min(d_in, d_out)`` FLOPs; the keys and
    values read once. Source: UltraEdit, arXiv 2505.14679; push-through identity.
    """
    check_same_rows("keys", keys, "values", values)
    check_ridge(ridge)
    if ridge == 0.0:
        raise ValueError("ridge is 0; solve_shift needs a positive ridge (the paper uses 1)")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(FORMS)}")
    keys, values = keys.detach(), values.detach()
    for name, rows in (("keys", keys), ("values", values)):
        if not _is_finite(rows):
            raise NonFiniteError(f"{name} {tuple(rows.shape)} hold NaN or infinity")
    if choose("solve_shift", CANDIDATES, keys.device) == "reference":
        exact = reference.solve_shift(keys.double(), values.double(), ridge)
        assert exact.matrix is not None
        return Shift(exact.form, exact.rank, matrix=exact.matrix.float())
    n, d_in, d_out = keys.shape[-2], keys.shape[-1], values.shape[-1]
    if form == "auto":
        form = choose_form(n, d_in, d_out)
    solve = _solve_dual if form == "dual" else _solve_primal
    return solve(keys, values, ridge)


def _solve_dual(keys: Tensor, values: Tensor, ridge: float) -> Shift:
    n, d_in, d_out = keys.shape[-2], keys.shape[-1], values.shape[-1]
    normal = gram(keys, ridge, dtype=torch.float64)
    if d_out <= d_in:
        left = cholesky_solve(normal, values.double())
        if _loss_of_rounding(left, values, normal, ridge) <= LARGEST_LOSS:
            return Shift("dual", n, left=left.float(), right=keys.float())
    right = cholesky_solve(normal, keys.double())
    return Shift("dual", n, left=values.float(), right=right.float())


def _loss_of_rounding(left: Tensor, values: Tensor, normal: Tensor, ridge: float) -> float:
    """Return the relative error of ``leftᵀ K`` that rounding ``left = G⁻¹ V`` to float32 costs.

    Along a direction that dominates the keys, or where keys repeat, the terms of the product cancel
    and the error of ``left`` is all that stays. ``‖Δ‖² = ⟨left, V − λ left⟩`` needs no product.
    """
    square = (left * (values.double() - ridge * left)).sum((-2, -1))
    key_squares = normal.diagonal(dim1=-2, dim2=-1) - ridge
    terms = (left.square().sum(-1) * key_squares).sum(-1)
    loss = 2.0**-24 * (terms / square.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return float(loss.max()) if loss.numel() else 0.0


def _is_finite(rows: Tensor) -> bool:
    # `isfinite` would make a copy, and there may be more rows than fit beside the matrix.
    return not rows.numel() or bool(torch.linalg.vector_norm(rows, float("inf")).isfinite())


def _solve_primal(keys: Tensor, values: Tensor, ridge: float) -> Shift:
    n, d_in, d_out = keys.shape[-2], keys.shape[-1], values.shape[-1]
    matrix = keys.new_empty((*keys.shape[:-2], d_out, d_in), dtype=torch.float32)
    places = itertools.product(*(range(size) for size in keys.shape[:-2]))
    for item, place in enumerate(places):
        _solve_module(matrix[place], keys[place], values[place], ridge, item)
    return Shift("primal", min(n, d_in, d_out), matrix=matrix)


def _solve_module(out: Tensor, keys: Tensor, values: Tensor, ridge: float, item: int) -> None:
    """Write ``Δᵀ`` ``[d_out, d_in]`` of one module to ``out``."""
    d_in = keys.shape[-1]
    small = 8 * d_in * d_in <= FLOAT64_COVARIANCE_BYTES
    factor = _normal_matrix(keys, ridge, torch.float64 if small else torch.float32)
    if factor_(factor):
        # What failed is gone; it is made again rather than kept, and in float64 for good.
        del factor
        again = functools.partial(_normal_matrix, keys, ridge, torch.float64)
        factor = repaired_factor(again, item)
    # Some columns of Kᵀ V at a time: all of it, in float64, could outweigh the matrix.
    columns = block_rows(d_in)
    for some_out, some_values in zip(
        out.split(columns), values.split(columns, dim=-1), strict=True
    ):
        _solve_columns(some_out, factor, keys, some_values)


def _solve_columns(out: Tensor, factor: Tensor, keys: Tensor, values: Tensor) -> None:
    side = torch.zeros(out.shape, dtype=factor.dtype, device=out.device)
    for some_keys, some_values in row_blocks(exact_dtype(out.device, side.dtype), keys, values):
        add_product_(side, some_values.mT, some_keys)
    substitute_(factor, side.mT)
    out.copy_(side)


def _normal_matrix(keys: Tensor, ridge: float, dtype: torch.dtype) -> Tensor:
    """Return ``Kᵀ K + λ I`` ``[d_in, d_in]``."""
    normal = torch.zeros(keys.shape[-1], keys.shape[-1], dtype=dtype, device=keys.device)
    covariance(keys, out=normal)
    normal.diagonal().add_(ridge)
    return normal
