"""Mean and sum of squared deviations of every feature, in one pass over the rows.

``rows`` ``[n, d]`` in bf16, fp16 or float32, of any strides, give ``mean`` and ``squares`` ``[d]``
float64. The rows are cut into *chunks*, none of which crosses a segment (a micro-batch):

1. ``partial_moments_kernel``: a program takes one chunk of one block of features, ``BLOCK_N`` rows
   at a time, in float32. The mean ``p`` of the first rows is taken away from all of them, so that
   deviations keep their digits however large the mean is. The chunk's mean is left in two parts,
   ``p`` and the mean of ``x − p``.
2. ``merge_moments_kernel``: joins a segment's chunks, then the segments, in order, in float64.

Both join neighbours ``a`` and ``b`` as Chan, Golub and LeVeque (1983) do, ``δ = mean_b − mean_a``::

    mean = mean_a + δ n_b / (n_a + n_b)
    S    = S_a + S_b + δ² n_a n_b / (n_a + n_b)

With segments, the ``S`` of one of ``m`` rows counts ``m / (m − 1)`` times: the published variance
of UltraEdit (arXiv 2505.14679).

Floor: ``n d`` elements read, 16 bytes a feature written, about 4 FLOPs an element. Beside that, the
chunks' moments: 12 bytes a feature for each chunk of 64 rows or more, written and read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, launch
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

PARTIAL = Config(
    "64 rows, 128 features",
    {"BLOCK_N": 64, "BLOCK_D": 128},
    num_warps=8,
    num_stages=1,
    why="16 KB of bf16 in flight a program; 400 rows of 14336 make 784 programs",
)

WIDE = Config(
    "32 rows, 256 features",
    {"BLOCK_N": 32, "BLOCK_D": 256},
    num_warps=8,
    num_stages=1,
    why="for `make tune`: pieces of a row of 512 bytes, in two steps a chunk",
)

CANDIDATES = {"bfloat16": (PARTIAL, WIDE)}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""

MERGE = Config(
    "128 features",
    {"BLOCK_D": 128},
    num_warps=4,
    num_stages=1,
    why="a feature a thread: float64 on little data",
)

LONG_CHUNKS_FROM = 8192


def rows_of_a_chunk(n: int) -> int:
    """Return how many of ``n`` rows one program reads: few, until many rows fill the chip."""
    return 1024 if n >= LONG_CHUNKS_FROM else 64


def cut_into_chunks(segments: Sequence[int], chunk: int) -> list[tuple[int, int, int, int]]:
    """Return ``(first row of the segment, start, stop, last row of the segment + 1)`` a chunk."""
    cuts = []
    first = 0
    for length in segments:
        end = first + length
        cuts += [(first, row, min(row + chunk, end), end) for row in range(first, end, chunk)]
        first = end
    return cuts


@triton.jit
def chunk_bounds(cuts, chunk, n, chunk_n, SEGMENTED: tl.constexpr):
    """Return first row of the segment, start, stop and end of the segment, int64."""
    if SEGMENTED:
        first = tl.load(cuts + 4 * chunk)
        start = tl.load(cuts + 4 * chunk + 1)
        stop = tl.load(cuts + 4 * chunk + 2)
        end = tl.load(cuts + 4 * chunk + 3)
    else:
        first = tl.zeros((), tl.int64)
        start = first + chunk * chunk_n
        end = first + n
        stop = tl.minimum(start + chunk_n, end)
    return first, start, stop, end


@triton.jit
def block_moments(shifted, mask, count):
    """Return mean and sum of squared deviations ``[BLOCK_D]`` of the rows inside the mask."""
    mean = tl.sum(tl.where(mask, shifted, 0.0), 0) / count
    deviations = tl.where(mask, shifted - mean[None, :], 0.0)  # [BLOCK_N, BLOCK_D]
    return mean, tl.sum(deviations * deviations, 0)


@triton.jit
def partial_moments_kernel(
    rows,
    cuts,
    pivots,
    means,
    squares,
    n,
    d,
    chunk_n,
    stride_n,
    stride_d,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks = tl.cdiv(d, BLOCK_D)
    chunk = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = columns < d
    _, start, stop, _ = chunk_bounds(cuts, chunk, n, chunk_n, SEGMENTED)
    length = (stop - start).to(tl.int32)
    lanes = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offsets = ((start + lanes) * stride_n)[:, None] + (columns.to(tl.int64) * stride_d)[None, :]

    mask = (lanes < length)[:, None] & inside[None, :]
    count = tl.minimum(length, BLOCK_N).to(tl.float32)
    x = tl.load(rows + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    pivot = tl.sum(x, 0) / count  # [BLOCK_D]
    mean, square = block_moments(x - pivot[None, :], mask, count)
    for done in range(BLOCK_N, length, BLOCK_N):
        offsets += tl.cast(BLOCK_N, tl.int64) * stride_n
        mask = (lanes < length - done)[:, None] & inside[None, :]
        added = tl.minimum(length - done, BLOCK_N).to(tl.float32)
        x = tl.load(rows + offsets, mask=mask, other=0.0).to(tl.float32)
        block_mean, block_square = block_moments(x - pivot[None, :], mask, added)
        share = added / (done + added)
        delta = block_mean - mean
        mean += delta * share
        square += block_square + delta * delta * (done * share)
    out = chunk * d + columns
    tl.store(pivots + out, pivot, mask=inside)
    tl.store(means + out, mean, mask=inside)
    tl.store(squares + out, square, mask=inside)


@triton.jit
def merge_moments_kernel(
    cuts,
    pivots,
    means,
    squares,
    mean_out,
    squares_out,
    n,
    d,
    chunk_n,
    chunks,
    SEGMENTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = columns < d
    # Of the segment so far, and of all segments before it.
    mean = tl.zeros((BLOCK_D,), tl.float64)
    square = tl.zeros((BLOCK_D,), tl.float64)
    total_mean = tl.zeros((BLOCK_D,), tl.float64)
    total_square = tl.zeros((BLOCK_D,), tl.float64)
    for index in range(chunks):
        chunk = tl.zeros((), tl.int64) + index
        first, start, stop, end = chunk_bounds(cuts, chunk, n, chunk_n, SEGMENTED)
        place = chunk * d + columns
        pivot = tl.load(pivots + place, mask=inside, other=0.0).to(tl.float64)
        chunk_mean = pivot + tl.load(means + place, mask=inside, other=0.0).to(tl.float64)
        chunk_square = tl.load(squares + place, mask=inside, other=0.0).to(tl.float64)
        before = (start - first).to(tl.float64)
        share = (stop - start).to(tl.float64) / (stop - first).to(tl.float64)
        delta = chunk_mean - mean
        mean += delta * share
        square += chunk_square + delta * delta * (before * share)
        if stop == end:
            if SEGMENTED:
                m = (end - first).to(tl.float64)
                square = square * (m / tl.maximum(m - 1, 1))
            share = (end - first).to(tl.float64) / end.to(tl.float64)
            delta = mean - total_mean
            total_mean += delta * share
            total_square += square + delta * delta * (first.to(tl.float64) * share)
            mean = tl.zeros((BLOCK_D,), tl.float64)
            square = tl.zeros((BLOCK_D,), tl.float64)
    tl.store(mean_out + columns, total_mean, mask=inside)
    tl.store(squares_out + columns, total_square, mask=inside)


def running_moments(
    parts: Sequence[Tensor], segments: Sequence[int] | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations, float64, of rows ``[n, d]`` in parts side by side.

    Both are ``[Σ d]``; ``n`` is at least 1. ``segments``: the rows of the consecutive
    micro-batches, for the published variance; None for the plain one. ``config``
    is the one tuned for the device, or else ``PARTIAL``, unless given.
    """
    n, device = parts[0].shape[0], parts[0].device
    chunk_n = rows_of_a_chunk(n)
    chunks, cuts = triton.cdiv(n, chunk_n), None
    if segments is not None:
        # From pinned memory, so that the host need not wait for the device.
        table = torch.tensor(
            cut_into_chunks(segments, chunk_n),
            dtype=torch.int64,
            pin_memory=device.type == "cuda",
        )
        chunks, cuts = table.shape[0], table.to(device, non_blocking=True)
    widths = [part.shape[1] for part in parts]
    mean = torch.empty(sum(widths), dtype=torch.float64, device=device)
    squares = torch.empty_like(mean)
    for rows, part_mean, part_squares in zip(
        parts, mean.split(widths), squares.split(widths), strict=True
    ):
        d = rows.shape[1]
        of_chunks = torch.empty(3, chunks, d, dtype=torch.float32, device=device)
        shared = {
            "cuts": cuts,
            **dict(zip(("pivots", "means", "squares"), of_chunks, strict=True)),
            "n": n,
            "d": d,
            "chunk_n": chunk_n,
            "SEGMENTED": segments is not None,
        }
        tuned = tuned_config("running_moments", describe_dtype(rows.dtype), CANDIDATES, device)
        partial = config or tuned or PARTIAL
        launch(
            partial_moments_kernel,
            (chunks * triton.cdiv(d, partial.sizes["BLOCK_D"]),),
            partial,
            **shared,
            rows=rows,
            stride_n=rows.stride(0),
            stride_d=rows.stride(1),
        )
        launch(
            merge_moments_kernel,
            (triton.cdiv(d, MERGE.sizes["BLOCK_D"]),),
            MERGE,
            **shared,
            mean_out=part_mean,
            squares_out=part_squares,
            chunks=chunks,
        )
    return mean, squares


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        name: str, n: int, d: int, dtype: torch.dtype, segments: list[int] | None
    ) -> Example:
        wide = (partial_moments_kernel.__name__,) if d % 16 == 0 else ()
        rows = torch.empty(n, d, dtype=dtype, device="meta")
        return Example(name, lambda: running_moments([rows], segments), wide_loads=wide)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        example("bf16, 400 rows of 14336", 400, 14336, bf16, None),
        example("fp16, 400 rows of 14336", 400, 14336, fp16, None),
        example("fp32, 400 rows of 14336", 400, 14336, fp32, None),
        example("bf16, 10 segments of 40 rows of 14336", 400, 14336, bf16, [40] * 10),
        example("fp32, 10 segments of 40 rows of 14336", 400, 14336, fp32, [40] * 10),
        example("bf16, 401 rows of 14335", 401, 14335, bf16, None),
        example("bf16, 1 row of 1", 1, 1, bf16, None),
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
        return (torch.randn((70, 144) if tiny else (400, 14336), device=device).bfloat16(),)

    def exact(inputs: tuple[Tensor, ...]) -> Tensor:
        rows = inputs[0].double()
        return torch.stack([rows.mean(0), (rows - rows.mean(0)).square().sum(0)])

    return [
        Tunable(
            "running_moments",
            name,
            candidates,
            inputs,
            call=lambda inputs, config: torch.stack(running_moments(inputs, None, config)),
            exact=exact,
        )
        for name, candidates in CANDIDATES.items()
    ]
