"""Peak memory of solve_shift in primal form: one ``d_in × d_in`` matrix and a share of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import peak_allocation
from torch import Tensor

from pyeditfast.ops import solve_shift

op = importlib.import_module("pyeditfast.ops.solve_shift")

SHARE = 1.15
"""Bytes a byte of the matrix: the docstring grants the blocks a seventh of it."""

BLOCKS_OF_A_SMALL_MATRIX = 18 << 20

D_IN = 4096


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("system", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_primal_holds_one_matrix_and_a_share_of_it(lead, dtype, system, monkeypatch):
    if system == torch.float32:
        monkeypatch.setattr(op, "FLOAT64_COVARIANCE_BYTES", 0)
    n, d_out = 1200, 600
    keys, values = numbers(*lead, n, D_IN, dtype=dtype), numbers(*lead, n, d_out)
    peak = peak_allocation(lambda: solve_shift(keys, values, form="primal"))
    result = 4 * D_IN * values.numel() // n
    assert peak - result <= SHARE * system.itemsize * D_IN * D_IN
    # The measure itself: it sees the matrix and the result.
    assert peak - result >= system.itemsize * D_IN * D_IN


def test_primal_holds_one_matrix_where_float32_has_no_factor(monkeypatch, caplog):
    monkeypatch.setattr(op, "FLOAT64_COVARIANCE_BYTES", 0)
    n, d_out = 64, 8
    keys = 1e3 * (1.0 + 1e-3 * numbers(n, D_IN))
    covariance = keys.mT @ keys
    covariance.diagonal().add_(1.0)
    assert torch.linalg.cholesky_ex(covariance).info.item() > 0
    del covariance
    values = numbers(n, d_out)
    peak = peak_allocation(lambda: solve_shift(keys, values, form="primal"))
    assert peak - 4 * D_IN * d_out <= SHARE * 8 * D_IN * D_IN
    assert caplog.records == []


@pytest.mark.parametrize("sizes", [(20_000, 512, 512), (60_000, 64, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_many_rows_of_a_small_matrix_are_not_converted_at_once(dtype, sizes):
    n, d_in, d_out = sizes
    keys, values = numbers(n, d_in, dtype=dtype), numbers(n, d_out, dtype=dtype)
    peak = peak_allocation(lambda: solve_shift(keys, values, form="primal"))
    assert peak - 4 * d_in * d_out <= 8 * d_in * d_in + BLOCKS_OF_A_SMALL_MATRIX


RESIDENT = """
from pathlib import Path
import torch
from pyeditfast.ops import solve_shift

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
# Loads every library and its buffers.
solve_shift(torch.randn(1100, 1024), torch.randn(1100, 256), form="primal")
keys, values = torch.randn(512, {d_in}), torch.randn(512, {d_out})
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
shift = solve_shift(keys, values, form="primal")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident peaks of Linux")
def test_neither_do_the_libraries_hold_a_second_matrix():
    d_out = 256
    script = RESIDENT.format(d_in=D_IN, d_out=d_out)
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, matrix = int(run.stdout), 8 * D_IN * D_IN
    # 64 MB for what they lay out for their products, whatever the size: half of a matrix.
    assert peak - 4 * D_IN * d_out <= SHARE * matrix + (64 << 20)
    assert peak >= matrix
