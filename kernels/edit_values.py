"""UltraEdit's values, ``v = −lr · ‖k̂‖² · ĝ``, hats for ``(x − mean) · scale``.

``keys`` ``[n, d_in]`` and ``grads`` ``[n, d_out]`` in bf16, fp16 or float32, rows of any strides;
``mean`` and ``scale`` ``[d_in + d_out]`` float32, keys first; values ``[n, d_out]`` float32.

Floor: ``n (d_in + d_out)`` elements read, ``4 n d_out`` bytes written, about 4 FLOPs an element.
Mean and scale are read once by every program, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, launch
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

ONE_ROW = Config(
    "one row",
    {"BLOCK_N": 1, "BLOCK_D": 4096},
    num_warps=8,
    num_stages=1,
    why="a turn of 400 answer tokens fills the chip only with a program a row; 8 bf16 a thread",
)

FOUR_ROWS = Config(
    "four rows",
    {"BLOCK_N": 4, "BLOCK_D": 1024},
    num_warps=8,
    num_stages=1,
    why="mean and scale, 8 bytes a feature, are read once for four rows of 2 or 4 bytes",
)

ONE_ROW_NARROW = Config(
    "one row, 4 warps",
    {"BLOCK_N": 1, "BLOCK_D": 2048},
    num_warps=4,
    num_stages=1,
    why="for `make tune`: smaller programs, twice as many a multiprocessor",
)

TWO_ROWS = Config(
    "two rows",
    {"BLOCK_N": 2, "BLOCK_D": 2048},
    num_warps=8,
    num_stages=1,
    why="for `make tune`: longer pieces of a row, mean and scale read twice as often",
)

FOUR_ROWS_FROM = 2048

CANDIDATES = {
    "bfloat16, few rows": (ONE_ROW, ONE_ROW_NARROW),
    "bfloat16, many rows": (FOUR_ROWS, TWO_ROWS),
}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""


def shape_class(n: int, dtype: torch.dtype) -> str:
    """Return the class of ``n`` rows of keys of ``dtype``."""
    return f"{describe_dtype(dtype)}, {'many' if n >= FOUR_ROWS_FROM else 'few'} rows"


def choose_config(n: int) -> Config:
    """Return the configuration for ``n`` rows."""
    return FOUR_ROWS if n >= FOUR_ROWS_FROM else ONE_ROW


@triton.jit
def edit_values_kernel(
    keys,
    grads,
    mean,
    scale,
    values,
    lr,
    n,
    d_in,
    d_out,
    keys_stride_n,
    keys_stride_d,
    grads_stride_n,
    grads_stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    lanes = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    row_mask = (rows < n)[:, None]
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        columns = start + lanes
        inside = columns < d_in
        column_offsets = columns.to(tl.int64) * keys_stride_d
        offsets = (rows * keys_stride_n)[:, None] + column_offsets[None, :]
        key = tl.load(keys + offsets, mask=row_mask & inside[None, :], other=0.0).to(tl.float32)
        centre = tl.load(mean + columns, mask=inside, other=0.0)
        factor = tl.load(scale + columns, mask=inside, other=0.0)
        key = (key - centre[None, :]) * factor[None, :]  # [BLOCK_N, BLOCK_D]
        squares += key * key
    weight = tl.sum(squares, 1) * -lr  # [BLOCK_N]
    for start in range(0, d_out, BLOCK_D):
        columns = start + lanes
        inside = columns < d_out
        mask = row_mask & inside[None, :]
        column_offsets = columns.to(tl.int64) * grads_stride_d
        offsets = (rows * grads_stride_n)[:, None] + column_offsets[None, :]
        grad = tl.load(grads + offsets, mask=mask, other=0.0).to(tl.float32)
        centre = tl.load(mean + d_in + columns, mask=inside, other=0.0)
        factor = tl.load(scale + d_in + columns, mask=inside, other=0.0)
        grad = (grad - centre[None, :]) * factor[None, :]  # [BLOCK_N, BLOCK_D]
        out = values + (rows * d_out)[:, None] + columns[None, :]
        tl.store(out, grad * weight[:, None], mask=mask)


def edit_values(
    keys: Tensor,
    grads: Tensor,
    mean: Tensor,
    scale: Tensor,
    lr: float,
    values: Tensor,
    config: Config | None = None,
) -> Tensor:
    """Write the values of ``keys`` ``[n, d_in]`` and ``grads`` ``[n, d_out]`` and return them.

    ``mean`` and ``scale`` are ``[d_in + d_out]``, ``values`` is ``[n, d_out]``; the three are
    float32 and contiguous. ``config`` is the one tuned for the device, or else that of
    ``choose_config``, unless given.
    """
    n, d_in, d_out = keys.shape[0], keys.shape[1], grads.shape[1]
    if config is None:
        tuned = tuned_config("edit_values", shape_class(n, keys.dtype), CANDIDATES, keys.device)
        config = tuned or choose_config(n)
    launch(
        edit_values_kernel,
        (triton.cdiv(n, config.sizes["BLOCK_N"]),),
        config,
        keys=keys,
        grads=grads,
        mean=mean,
        scale=scale,
        values=values,
        lr=float(lr),
        n=n,
        d_in=d_in,
        d_out=d_out,
        keys_stride_n=keys.stride(0),
        keys_stride_d=keys.stride(1),
        grads_stride_n=grads.stride(0),
        grads_stride_d=grads.stride(1),
    )
    return values


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(name: str, n: int, dtype: torch.dtype, d_in: int, d_out: int) -> Example:
        def call() -> None:
            rows = torch.empty(n, d_in + d_out, dtype=dtype, device="meta")
            moments = torch.empty(2, d_in + d_out, device="meta")
            values = torch.empty(n, d_out, device="meta")
            edit_values(rows[:, :d_in], rows[:, d_in:], *moments, 1e-6, values)

        wide = (edit_values_kernel.__name__,) if d_in % 16 == d_out % 16 == 0 else ()
        return Example(name, call, wide_loads=wide)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        example("bf16, 400 rows of 14336 + 4096", 400, bf16, 14336, 4096),
        example("fp16, 400 rows of 14336 + 4096", 400, fp16, 14336, 4096),
        example("fp32, 400 rows of 14336 + 4096", 400, fp32, 14336, 4096),
        example("bf16, 4096 rows of 14336 + 4096", 4096, bf16, 14336, 4096),
        example("fp16, 4096 rows of 14336 + 4096", 4096, fp16, 14336, 4096),
        example("fp32, 4096 rows of 14336 + 4096", 4096, fp32, 14336, 4096),
        example("bf16, 401 rows of 14335 + 4097", 401, bf16, 14335, 4097),
        example("bf16, 1 row of 1 + 1", 1, bf16, 1, 1),
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def choice(n: int, dtype: torch.dtype) -> Tunable:
        name = shape_class(n, dtype)

        def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
            rows, d_in, d_out = (9, 144, 96) if tiny else (n, 14336, 4096)
            return (
                torch.randn(rows, d_in, device=device).to(dtype),
                torch.randn(rows, d_out, device=device).to(dtype),
                torch.randn(d_in + d_out, device=device),
                torch.rand(d_in + d_out, device=device),
            )

        def call(inputs: tuple[Tensor, ...], config: Config) -> Tensor:
            grads = inputs[1]
            values = torch.empty(grads.shape, dtype=torch.float32, device=grads.device)
            return edit_values(*inputs, 1e-6, values, config)

        def exact(inputs: tuple[Tensor, ...]) -> Tensor:
            keys, grads, mean, scale = (tensor.double() for tensor in inputs)
            d_in = keys.shape[1]
            weight = ((keys - mean[:d_in]) * scale[:d_in]).square().sum(-1, keepdim=True)
            return -1e-6 * weight * (grads - mean[d_in:]) * scale[d_in:]

        return Tunable("edit_values", name, CANDIDATES[name], inputs, call, exact)

    return [choice(n, torch.bfloat16) for n in (400, 4096)]
