"""Adding a shift to a weight in place, with one rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import (
    KERNEL_DTYPES,
    Candidate,
    always,
    choose,
    explain,
    fitting,
    triton_candidate,
)
from pyeditfast.errors import NonFiniteError, ShiftOverflowError, UnsupportedWeightError
from pyeditfast.ops.checks import check_same_device
from pyeditfast.ops.compiled import as_matrix, as_rows, compiled, compiled_for, cpp_candidate
from pyeditfast.ops.precision import exact_matmul, reduced_float32
from pyeditfast.ops.random_mask import random_uniform
from pyeditfast.reference.apply_shift import round_stochastically
from pyeditfast.reference.random_mask import check_arguments
from pyeditfast.reference.solve_shift import Shift

CANDIDATES = (
    triton_candidate("apply_shift"),
    cpp_candidate("apply_shift"),
    Candidate("torch", always),
    Candidate("reference", always),
)

ROUNDINGS = ("nearest", "stochastic", "compensated")

CHUNK_ELEMENTS = 2 << 20
"""Elements of the weight that are held in float32 at a time: 8 MB, whatever the weight's size."""


def apply_shift_(
    weight: Tensor,
    shift: Shift,
    rounding: str = "nearest",
    seed: int | None = None,
    *,
    remainder: Tensor | None = None,
) -> Tensor:
    """Add ``Δᵀ`` to ``weight`` in place, round once, and return it.

    ``weight`` ``[..., d_out, d_in]``, bf16, fp16, float32 or float64, of any strides (a ``Conv1D``
    weight is passed as its transpose); ``shift`` of the same shape on the same device. The sum is
    taken in float32 (float64 for a float64 weight) and rounded to the weight's dtype:

    - ``"nearest"``: round to nearest even. What is smaller than half a spacing is lost.
    - ``"stochastic"``: 16-bit weights only; to one of the two neighbours, unbiased, reproducible by
      ``seed`` (Philox4x32-10 over the row-major element index).
    - ``"compensated"``: what rounding loses is kept in ``remainder`` (shape and dtype of
      ``weight``, zeros at first) and added back next time.

    The weight is untouched when an error is raised: ``UnsupportedWeightError`` for a weight that is
    not floating point, ``ValueError`` for arguments that do not match, ``NonFiniteError`` for NaN
    or infinity in the shift and ``ShiftOverflowError`` where the sum could leave the range of the
    dtype.

    Floor: ``2 n d_out d_in`` FLOPs; the weight read and written once. Temporaries of about 24 MB
    (three rows at the least; several times that for ``"stochastic"``), never a float32 matrix of
    the weight's size.
    """
    _check(weight, shift, rounding, seed, remainder)
    if weight.numel() == 0 or shift.rank == 0:
        return weight
    chosen = choose("apply_shift", _candidates(weight, shift), weight.device)
    _check_range(weight, shift, remainder, chosen)
    with torch.no_grad():
        if chosen == "reference":
            return reference.apply_shift_(weight, shift, rounding, seed, remainder=remainder)
        if chosen == "triton":
            return _launch(weight, shift, rounding, seed, remainder)
        if rounding == "nearest" and weight.dtype == torch.float32 and shift.form == "dual":
            return _add_product_(weight, shift)
        add_rows_ = _compiled_add_rows_ if chosen == "cpp" else _add_rows_
        # C++ needs no temporaries for what is float32 already.
        there = shift.matrix is not None and shift.matrix.dtype == torch.float32
        elements = weight.numel() if chosen == "cpp" and there else CHUNK_ELEMENTS
        for rows, offset in _chunks(weight, elements):
            low = None if remainder is None else remainder[rows]
            add_rows_(weight[rows], _dense_rows(shift, rows), rounding, seed, offset, low)
        if chosen == "cpp":
            _tell_autograd(weight, remainder)
    return weight


def check_shift(
    weight: Tensor,
    shift: Shift,
    rounding: str = "nearest",
    seed: int | None = None,
    *,
    remainder: Tensor | None = None,
) -> None:
    """Raise what ``apply_shift_`` would raise for these arguments, and change nothing."""
    _check(weight, shift, rounding, seed, remainder)
    if weight.numel() and shift.rank:
        chosen = explain("apply_shift", _candidates(weight, shift), weight.device).backend
        _check_range(weight, shift, remainder, chosen)


def _check(
    weight: Tensor, shift: Shift, rounding: str, seed: int | None, remainder: Tensor | None
) -> None:
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise UnsupportedWeightError(
            f"weight has dtype {weight.dtype}; bfloat16, float16, float32 or float64 is needed "
            "(load the model without quantization)"
        )
    if weight.ndim < 2 or weight.shape != shift.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and shift {tuple(shift.shape)} differ")
    check_same_device("weight", weight.device, "shift", shift.device)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    if rounding == "stochastic":
        if seed is None:
            raise ValueError('rounding="stochastic" needs a seed')
        if weight.element_size() != 2:
            raise ValueError(f'rounding="stochastic" is for 16-bit weights, not {weight.dtype}')
    elif seed is not None:
        raise ValueError(f'a seed has no meaning for rounding="{rounding}"')
    if rounding == "compensated":
        if remainder is None:
            raise ValueError('rounding="compensated" needs a remainder')
        if remainder.shape != weight.shape or remainder.dtype != weight.dtype:
            raise ValueError(
                f"remainder is {remainder.dtype} {tuple(remainder.shape)}; "
                f"weight is {weight.dtype} {tuple(weight.shape)}"
            )
        check_same_device("weight", weight.device, "remainder", remainder.device)
    elif remainder is not None:
        raise ValueError(f'a remainder has no meaning for rounding="{rounding}"')
    for name, tensor in (("weight", weight), ("remainder", remainder)):
        if tensor is not None and _repeats_elements(tensor):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: elements share memory"
            )


def _candidates(weight: Tensor, shift: Shift) -> Sequence[Candidate]:
    candidates = compiled_for(fitting(CANDIDATES, weight.dtype), weight.dtype)
    if shift.form == "dual":
        return candidates
    return [
        replace(candidate, unavailable=lambda device: "its kernel takes dual shifts")
        if candidate.backend == "triton"
        else candidate
        for candidate in candidates
    ]


def _launch(
    weight: Tensor, shift: Shift, rounding: str, seed: int | None, remainder: Tensor | None
) -> Tensor:
    from pyeditfast_kernels.apply_shift import apply_shift_ as launch_apply_shift_
    from pyeditfast_kernels.modules import as_modules

    assert shift.left is not None and shift.right is not None
    right = shift.right if shift.right.dtype == torch.bfloat16 else shift.right.float()
    tensors = [weight, shift.left.float(), right]
    tensors += [] if remainder is None else [remainder]
    elements = weight.shape[-2] * weight.shape[-1]
    for first, (some_weight, some_left, some_right, *kept) in as_modules(*tensors):
        launch_apply_shift_(
            some_weight,
            some_left,
            some_right,
            rounding,
            seed,
            kept[0] if kept else None,
            first * elements,
        )
    _tell_autograd(weight, remainder)
    return weight


def _tell_autograd(weight: Tensor, remainder: Tensor | None) -> None:
    """As an in-place operation of torch would: whoever saved the weight for a backward pass
    notices.
    """
    torch.autograd.graph.increment_version([weight] if remainder is None else [weight, remainder])


def _repeats_elements(tensor: Tensor) -> bool:
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in strides)


def _check_range(weight: Tensor, shift: Shift, remainder: Tensor | None, chosen: str) -> None:
    limit = torch.finfo(weight.dtype).max
    near = 1e-3 * limit
    # A bound that is not close would refuse what fits, where it is added to the weight's largest.
    rough = near if weight.dtype != torch.float16 else 0.0
    bound = _entry_bound(shift, rough, chosen)
    if not bound < float("inf"):
        raise NonFiniteError(f"the shift {tuple(shift.shape)} holds NaN or infinity")
    # Reading the whole weight is worth it only in float16, or where the shift comes near the limit.
    if weight.dtype == torch.float16 or bound > near:
        largest = _largest_magnitude(weight, chosen)
        if remainder is not None:
            largest += _largest_magnitude(remainder, chosen)
        if bound + largest > limit:
            raise ShiftOverflowError(
                f"a shift of up to {bound:.3g} on a {weight.dtype} weight of up to {largest:.3g} "
                f"could exceed {limit:.3g}"
            )


def _entry_bound(shift: Shift, rough: float, chosen: str) -> float:
    """Return an upper bound of ``max |Δᵀ|``; of a dense shift the maximum itself, where that may be
    above ``rough``.
    """
    if shift.matrix is None:
        return float(shift.largest_entry_bound())
    if chosen == "cpp":
        return _largest_magnitude(shift.matrix, chosen)
    # No entry is larger than its row's norm, and torch reads norms faster than the largest entry.
    norm = float(torch.linalg.vector_norm(shift.matrix, dim=-1).max())
    return norm if norm <= rough else float(shift.largest_entry_bound())


def _largest_magnitude(tensor: Tensor, chosen: str) -> float:
    matrix = as_rows(tensor) if chosen == "cpp" and tensor.dtype in KERNEL_DTYPES else None
    if matrix is None:
        smallest, largest = torch.aminmax(tensor.detach())
        return max(abs(float(smallest)), abs(float(largest)))
    rows, columns = matrix.shape
    found: float = compiled().largest_magnitude(
        x=as_matrix(matrix), rows=rows, columns=columns, threads=torch.get_num_threads()
    )
    return found


def _chunks(weight: Tensor, elements: int) -> Iterator[tuple[tuple[slice | int, ...], int]]:
    """Yield the index of each block of rows, of about ``elements`` elements, and the row-major
    offset of its first element.
    """
    d_out, d_in = weight.shape[-2:]
    step = max(1, elements // d_in)
    for batch in range(weight[..., 0, 0].numel()):
        lead: list[int] = []
        rest = batch
        for size in reversed(weight.shape[:-2]):
            rest, index = divmod(rest, size)
            lead.insert(0, index)
        for start in range(0, d_out, step):
            yield (*lead, slice(start, min(start + step, d_out))), (batch * d_out + start) * d_in


def _dense_rows(shift: Shift, rows: tuple[slice | int, ...]) -> Tensor:
    if shift.matrix is not None:
        return shift.matrix[rows]
    assert shift.left is not None and shift.right is not None
    columns = (*rows[:-1], slice(None), rows[-1])
    return exact_matmul(shift.left[columns].mT, shift.right[rows[:-1]])


def _add_product_(weight: Tensor, shift: Shift) -> Tensor:
    """Accumulate the dual form straight into a float32 weight."""
    assert shift.left is not None and shift.right is not None
    left, right = shift.left.float(), shift.right.float()
    if reduced_float32(weight.device):
        for rows, _ in _chunks(weight, CHUNK_ELEMENTS):
            weight[rows] += _dense_rows(shift, rows)
        return weight
    if weight.ndim == 2:
        return weight.addmm_(left.mT, right)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape[:-2])).tolist():
        item = tuple(index) if isinstance(index, list) else (index,)
        weight[item].addmm_(left[item].mT, right[item])
    return weight


def _compiled_add_rows_(
    weight: Tensor,
    shift: Tensor,
    rounding: str,
    seed: int | None,
    offset: int,
    remainder: Tensor | None,
) -> None:
    if seed is not None:
        check_arguments(seed, tuple(weight.shape), offset)
    shift = shift.float()
    compiled().apply_shift(
        weight=as_matrix(weight),
        shift=as_matrix(shift),
        remainder=None if remainder is None else as_matrix(remainder),
        rows=weight.shape[0],
        columns=weight.shape[1],
        rounding=compiled().ROUNDINGS[rounding],
        seed=seed or 0,
        offset=offset,
        threads=torch.get_num_threads(),
    )


def _add_rows_(
    weight: Tensor,
    shift: Tensor,
    rounding: str,
    seed: int | None,
    offset: int,
    remainder: Tensor | None,
) -> None:
    total = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shift = shift.to(total)
    if remainder is None:
        # In place where the weight is of this dtype.
        exact = weight.to(total).add_(shift)
        if rounding == "stochastic":
            assert seed is not None
            uniform = random_uniform(seed, tuple(weight.shape), offset=offset, device=weight.device)
            exact = round_stochastically(exact, weight.dtype, uniform)
        if exact is not weight:
            weight.copy_(exact)
        return
    change = remainder.to(total).add_(shift)
    if total != weight.dtype:
        exact = change.add_(weight)
        weight.copy_(exact)
        remainder.copy_(exact.sub_(weight))
        return
    # What the sum itself loses (Knuth's two-sum), since rounding loses nothing after it:
    # (before - (exact - added)) + (change - added), where the second term is in the remainder.
    exact = weight + change
    added = exact - weight
    remainder.sub_(added)
    torch.sub(exact, added, out=added)
    torch.sub(weight, added, out=added)
    remainder.add_(added)
    weight.copy_(exact)
