"""``solve_shift`` against the published ``d × d`` solve; the shift is made dense in both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peak_memory_primal
import pytest
import torch

from pyeditfast.ops import solve_shift
from pyeditfast_published.ultraedit import published_shift

ROWS = 400
SHAPES = [(14336, 4096), (4096, 14336)]


def inputs(d_in: int, d_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, d_in, generator=generator),
        torch.randn(ROWS, d_out, generator=generator),
    )


def dense(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return solve_shift(keys, values).dense()


def published(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return published_shift(keys, values).mT


def exact(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the dual form in float64 throughout, independent of the op."""
    keys, values = keys.double(), values.double()
    normal = keys @ keys.T + torch.eye(keys.shape[0], dtype=torch.float64)
    return torch.linalg.solve(normal, values).T @ keys


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("contender", ["published", "pyeditfast", "pyeditfast low-rank"])
def bench_solve_shift(benchmark, contender, d_in, d_out):
    benchmark.group = f"solve_shift n=400 {d_in}→{d_out} float32"
    benchmark.name = contender
    run = {
        "published": published,
        "pyeditfast": dense,
        # What the editor does: the product is never made.
        "pyeditfast low-rank": lambda keys, values: solve_shift(keys, values),
    }[contender]
    keys, values = inputs(d_in, d_out, 0)
    expected = exact(keys, values)
    result = run(keys, values)
    found = result if isinstance(result, torch.Tensor) else result.dense()
    error = float((found.double() - expected).norm() / expected.norm())
    del expected, result, found
    benchmark.extra_info["relative_error"] = error
    if contender != "published":
        assert error <= 5e-6
    seeds = iter(range(1, 1000))
    rounds = 3 if contender == "published" else 9
    benchmark.pedantic(
        run, setup=lambda: (inputs(d_in, d_out, next(seeds)), {}), rounds=rounds, warmup_rounds=1
    )


@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
def bench_primal_shift(benchmark, contender):
    n, d_in, d_out = (getattr(peak_memory_primal, name) for name in ("ROWS", "D_IN", "D_OUT"))
    benchmark.group = f"solve_shift, primal form, n={n} {d_in}→{d_out} float32"
    benchmark.name = contender
    script = Path(peak_memory_primal.__file__)
    printed = subprocess.run(
        [sys.executable, str(script), contender], capture_output=True, text=True, check=True
    ).stdout
    benchmark.extra_info["peak_bytes_beyond_inputs"] = int(printed)
    run = {"published": peak_memory_primal.published, "pyeditfast": peak_memory_primal.candidate}
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(n, d_in, generator=generator)
    values = torch.randn(n, d_out, generator=generator)
    result = benchmark.pedantic(run[contender], args=(keys, values), rounds=1)
    expected = exact(keys, values)
    error = float((result.double() - expected).norm() / expected.norm())
    benchmark.extra_info["relative_error"] = error
    if contender == "pyeditfast":
        room = int(printed) - peak_memory_primal.RESULT_BYTES
        assert room <= 1.15 * peak_memory_primal.MATRIX_BYTES
        # A float32 matrix: as many digits as published. The dual form, which "auto" takes here,
        # has all of them.
        assert error <= 1e-2
