"""The step of a side memory: mask, decay, step and clamp in one pass, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.ops.checks import check_rows, check_same_device
from pyeditfast.ops.compiled import as_matrix, compiled, compiled_for, cpp_candidate
from pyeditfast.ops.memories import check_like
from pyeditfast.ops.precision import exact_matmul
from pyeditfast.ops.random_mask import random_uniform
from pyeditfast.reference.random_mask import check_arguments

CANDIDATES = (
    triton_candidate("masked_sgd"),
    # The newest function that the two ops need.
    cpp_candidate("masked_sgd_product"),
    Candidate("torch", always),
    Candidate("reference", always),
)

CHUNK_ELEMENTS = 2 << 20
"""Elements of the weight that are held in float32 at a time: 8 MB, whatever the weight's size."""

MASKED_PART_UP_TO = 1 / 3
MASKED_PART_FROM_TOKENS = 64
"""The C++ form computes of a gradient's product the part that the mask lets through, where that is
no larger a share and there are at least so many tokens: elsewhere the whole product takes less.
"""

ALIGNED_FLOATS = 16
"""So many float32 are the 64 bytes that the C++ form loads at a time."""


@dataclass(frozen=True)
class _Step:
    """The numbers of a step."""

    seed: int
    ratio: float
    lr: float
    weight_decay: float
    norm_constraint: float | None


def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    main: Tensor,
    *,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float = 0.0,
    norm_constraint: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Replace ``weight`` by ``clamp(w − lr · (mask · g + weight_decay · w), main ± c)``.

    ``weight``, ``main`` and ``grad`` ``[d_out, d_in]``; weight and main of one dtype (bf16, fp16,
    float32 or float64) and any strides. ``mask`` is ``random_mask(seed, ratio, weight.shape)``,
    which is never stored; what it leaves out decays all the same. ``norm_constraint`` is ``c``;
    None clamps nothing. All is computed in float32 (float64 for float64) and rounded once. Where
    ``active``, a 0-d boolean tensor on the weight's device, is False nothing changes: a loop can
    stop without asking the device. Returns ``weight``. Raises ``TypeError`` or ``ValueError`` for
    arguments that do not fit.

    Floor: weight, main and gradient read and weight written once; about 8 FLOPs an element and a
    Philox block for four elements. WISE (arXiv 2405.14768), section 2.3.2.
    """
    step = _Step(seed, ratio, lr, weight_decay, norm_constraint)
    _check(weight, main, step, active)
    check_rows("grad", grad)
    if grad.shape != weight.shape:
        raise ValueError(f"grad {tuple(grad.shape)} and weight {tuple(weight.shape)} differ")
    check_same_device("grad", grad.device, "weight", weight.device)
    if weight.numel() == 0:
        return weight
    candidates = _candidates(weight, grad)
    chosen = choose("masked_sgd", candidates, weight.device)
    with torch.no_grad():
        if chosen == "reference":
            return reference.masked_sgd_(weight, grad, main, **vars(step), active=active)
        if chosen == "triton":
            from pyeditfast_kernels.masked_sgd import masked_sgd_ as launch

            return launch(weight, grad, main, *vars(step).values(), active)
        if chosen == "cpp":
            if active is None or active:
                _compiled_step_(weight, grad, main, step)
                torch.autograd.graph.increment_version(weight)
            return weight
        return _step_rows_(weight, lambda rows: grad[rows], main, step, active)


def masked_sgd_product_(
    weight: Tensor,
    output_grads: Tensor,
    inputs: Tensor,
    main: Tensor,
    *,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float = 0.0,
    norm_constraint: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Take the step of ``masked_sgd_`` for the gradient ``dYᵀ X`` of a linear module, of which no
    more than a few rows exist at a time, or in C++ with a small ``ratio`` no more than the mask's
    part.

    ``output_grads`` ``[n, d_out]`` is d loss / d output and ``inputs`` ``[n, d_in]`` the module's
    input, both of one dtype. The product is accumulated in float32, never in TF32. Returns
    ``weight``. Raises ``TypeError`` or ``ValueError`` for arguments that do not fit.

    Floor: weight and main read and weight written once; ``2 n d_out d_in`` FLOPs, of which a CPU
    can leave out what the mask does, since it computes number by number.
    """
    step = _Step(seed, ratio, lr, weight_decay, norm_constraint)
    _check(weight, main, step, active)
    check_rows("output_grads", output_grads)
    check_rows("inputs", inputs)
    fitting_shape = (output_grads.shape[1:] + inputs.shape[1:]) == weight.shape
    if not fitting_shape or output_grads.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"output_grads {tuple(output_grads.shape)} and inputs {tuple(inputs.shape)} do not "
            f"give the gradient of a weight {tuple(weight.shape)}"
        )
    if output_grads.dtype != inputs.dtype:
        raise ValueError(f"output_grads is {output_grads.dtype} and inputs {inputs.dtype}")
    check_same_device("output_grads", output_grads.device, "weight", weight.device)
    check_same_device("inputs", inputs.device, "weight", weight.device)
    if weight.numel() == 0:
        return weight
    candidates = _candidates(weight, inputs)
    chosen = choose("masked_sgd", candidates, weight.device)
    with torch.no_grad():
        if chosen == "reference":
            return reference.masked_sgd_product_(
                weight, output_grads, inputs, main, **vars(step), active=active
            )
        if chosen == "triton":
            from pyeditfast_kernels.masked_sgd import masked_sgd_product_ as launch

            return launch(weight, output_grads, inputs, main, *vars(step).values(), active)
        work = _work_dtype(weight)
        # Converted once, not for every block of rows.
        output_grads, inputs = output_grads.to(work), inputs.to(work)
        if chosen == "cpp":
            if active is None or active:
                if _mask_is_worth_it(len(inputs), step):
                    _compiled_masked_product_step_(weight, output_grads, inputs, main, step)
                else:
                    _compiled_product_step_(weight, output_grads, inputs, main, step)
                torch.autograd.graph.increment_version(weight)
            return weight

        def grad_rows(rows: slice) -> Tensor:
            return exact_matmul(output_grads[:, rows].mT, inputs, work)

        return _step_rows_(weight, grad_rows, main, step, active)


def _check(weight: Tensor, main: Tensor, step: _Step, active: Tensor | None) -> None:
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise UnsupportedWeightError(
            f"weight has dtype {weight.dtype}; bfloat16, float16, float32 or float64 is needed"
        )
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; [d_out, d_in] is needed")
    check_like("main", main, "weight", weight)
    check_arguments(step.seed, weight.shape, ratio=step.ratio)
    for name in ("lr", "weight_decay"):
        value = getattr(step, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; a finite number of 0 or more is needed")
    if step.norm_constraint is not None and not step.norm_constraint >= 0:
        raise ValueError(f"norm_constraint is {step.norm_constraint}; 0 or more is needed")
    if active is not None:
        if active.dtype != torch.bool or active.numel() != 1:
            raise ValueError(f"active is {active.dtype} {tuple(active.shape)}; one bool is needed")
        check_same_device("active", active.device, "weight", weight.device)


def _candidates(weight: Tensor, grad: Tensor) -> Sequence[Candidate]:
    return compiled_for(fitting(CANDIDATES, weight.dtype, grad.dtype), weight.dtype, grad.dtype)


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _compiled_step_(
    weight: Tensor, grad: Tensor, main: Tensor, step: _Step, first_row: int = 0
) -> None:
    """Take the step on rows of a weight, of which ``first_row`` is the first."""
    bounded = step.norm_constraint is not None
    compiled().masked_sgd(
        weight=as_matrix(weight),
        grad=as_matrix(grad),
        main=as_matrix(main) if bounded else None,
        rows=weight.shape[0],
        columns=weight.shape[1],
        seed=step.seed,
        ratio=step.ratio,
        offset=first_row * weight.shape[1],
        lr=step.lr,
        weight_decay=step.weight_decay,
        norm_constraint=step.norm_constraint if bounded else 0.0,
        threads=torch.get_num_threads(),
    )


def _compiled_product_step_(
    weight: Tensor, output_grads: Tensor, inputs: Tensor, main: Tensor, step: _Step
) -> None:
    by_columns = weight.stride(0) < weight.stride(1)
    for rows in _row_blocks(weight):
        # The gradient in the layout of the weight.
        if by_columns:
            grad = exact_matmul(inputs.mT, output_grads[:, rows]).mT
        else:
            grad = exact_matmul(output_grads[:, rows].mT, inputs)
        _compiled_step_(weight[rows], grad, main[rows], step, rows.start)


def _mask_is_worth_it(tokens: int, step: _Step) -> bool:
    return (
        step.ratio <= MASKED_PART_UP_TO
        and tokens >= MASKED_PART_FROM_TOKENS
        and compiled().masked_sgd_product_is_fast()
    )


def _compiled_masked_product_step_(
    weight: Tensor, output_grads: Tensor, inputs: Tensor, main: Tensor, step: _Step
) -> None:
    bounded = step.norm_constraint is not None
    output_grads, inputs = _by_feature(output_grads), _by_feature(inputs)
    compiled().masked_sgd_product(
        weight=as_matrix(weight),
        output_grads=as_matrix(output_grads),
        inputs=as_matrix(inputs),
        main=as_matrix(main) if bounded else None,
        rows=weight.shape[0],
        columns=weight.shape[1],
        tokens=inputs.shape[1],
        seed=step.seed,
        ratio=step.ratio,
        offset=0,
        lr=step.lr,
        weight_decay=step.weight_decay,
        norm_constraint=step.norm_constraint if bounded else 0.0,
        threads=torch.get_num_threads(),
    )


def _by_feature(rows: Tensor) -> Tensor:
    """Return a copy of ``[n, d]`` as ``[d, n]`` whose rows begin at aligned addresses."""
    tokens, d = rows.shape
    padded = rows.new_empty(d, math.ceil(tokens / ALIGNED_FLOATS) * ALIGNED_FLOATS)
    return padded[:, :tokens].copy_(rows.mT)


def _step_rows_(
    weight: Tensor,
    grad_rows: Callable[[slice], Tensor],
    main: Tensor,
    step: _Step,
    active: Tensor | None,
) -> Tensor:
    """Take the step block by block of rows, whose gradient ``grad_rows`` gives."""
    work = _work_dtype(weight)
    d_in = weight.shape[1]
    for rows in _row_blocks(weight):
        old = weight[rows].to(work)
        uniform = random_uniform(
            step.seed, tuple(old.shape), offset=rows.start * d_in, device=weight.device
        )
        # Compared in float32, as the reference does.
        left_out = uniform >= torch.tensor(step.ratio, dtype=torch.float32, device=weight.device)
        new = grad_rows(rows).to(work).masked_fill(left_out, 0.0)
        new.add_(old, alpha=step.weight_decay).mul_(-step.lr).add_(old)
        if step.norm_constraint is not None:
            centre = main[rows].to(work)
            new = torch.minimum(
                torch.maximum(new, centre - step.norm_constraint), centre + step.norm_constraint
            )
        if active is not None:
            new = torch.where(active, new, old)
        weight[rows].copy_(new)
    return weight
