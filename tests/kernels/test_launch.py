"""Launching: what is checked before a kernel runs, and recording instead of running."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from guarded_memory import GuardedMemory

from pyeditfast_kernels.launch import Config, interprets, launch, recording

CONFIG = Config("eight", {"BLOCK": 8}, num_warps=1, num_stages=1, why="a test")


@triton.jit
def ascending_kernel(out, n, first, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, first + place, mask=place < n)


@triton.jit
def careless_kernel(out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, place, mask=place <= n)


def test_launches_on_the_device_of_the_tensors(device):
    out = torch.empty(19, device=device)
    launch(ascending_kernel, (3,), CONFIG, out=out, n=19, first=2)
    assert torch.equal(out.cpu(), torch.arange(2.0, 21.0))


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0)])
def test_an_empty_grid_launches_nothing(device, grid):
    out = torch.zeros(3, device=device)
    launch(ascending_kernel, grid, CONFIG, out=out, n=3, first=2)
    with recording() as launches:
        launch(ascending_kernel, grid, CONFIG, out=out, n=3, first=2)
    assert launches == [] and not out.any()


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536), (1, 1, 65536)])
def test_a_grid_that_cuda_does_not_allow(device, grid):
    out = torch.empty(3, device=device)
    message = f"ascending_kernel needs a grid of {grid}; CUDA allows (2147483647, 65535, 65535)"
    with recording() as launches, pytest.raises(ValueError, match=re.escape(message)):
        launch(ascending_kernel, grid, CONFIG, out=out, n=3, first=2)
    assert launches == []


def test_a_misspelt_argument(device):
    with pytest.raises(TypeError, match=r"first|frist"):
        launch(ascending_kernel, (1,), CONFIG, out=torch.empty(3, device=device), n=3, frist=2)


def test_recording_runs_nothing():
    out = torch.empty(5, device="meta")
    with recording() as launches:
        launch(ascending_kernel, (1,), CONFIG, out=out, n=5, first=2)
        with recording() as inner:
            launch(ascending_kernel, (7,), CONFIG, out=out, n=5, first=3)
    assert [noted.grid for noted in launches] == [(1,)]
    assert [noted.arguments["first"] for noted in inner] == [3]
    assert launches[0].kernel is ascending_kernel and launches[0].config is CONFIG


def test_recording_ends_with_its_block(device):
    out = torch.empty(5, device=device)
    with pytest.raises(KeyError), recording():
        raise KeyError
    launch(ascending_kernel, (1,), CONFIG, out=out, n=5, first=0)
    assert torch.equal(out.cpu(), torch.arange(5.0))


def test_kernels_run_in_the_interpreter_only_without_a_gpu(device):
    assert interprets() == (device.type == "cpu")


# The guards that every test of this folder runs with.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_guards_see_a_store_past_the_end(device, dtype):
    memory = GuardedMemory()
    out = memory.empty(2, 4, dtype=dtype, device=device)
    assert out.shape == (2, 4) and out.isnan().all()
    launch(ascending_kernel, (1,), CONFIG, out=out, n=8, first=0)
    memory.check()
    launch(careless_kernel, (2,), CONFIG, out=out, n=8)
    with pytest.raises(AssertionError, match="wrote beside"):
        memory.check()
