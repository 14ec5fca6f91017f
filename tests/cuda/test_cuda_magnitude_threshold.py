"""The CUDA kernels of magnitude_threshold, emulated: the exact k-th largest magnitude."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, lay_out, random_rows

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.magnitude_threshold")

pytestmark = pytest.mark.usefixtures("cuda")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_thresholds(x, ks, base=None):
    """Require what sorting finds; numpy sorts NaN last, as the largest."""
    values = x.float() if base is None else x.float() - base.float()
    ordered = np.sort(values.abs().flatten().numpy())
    for k in sorted({k for k in ks if 1 <= k <= x.numel()}):
        found = op._select_on_cuda(x, base, k)
        assert found.dtype == torch.float32 and found.shape == ()
        assert np.array_equal(found.numpy(), ordered[-k], equal_nan=True), (k, found, ordered[-k])


def test_the_op_takes_the_kernels(block_order):
    x = random_rows(57, 129, dtype=torch.bfloat16)
    assert op.magnitude_threshold(x, 0.25) == x.float().abs().flatten().kthvalue(5515).values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 13), (3, 1031), (127, 129)], ids=str)
def test_equals_sorting(dtype, shape):
    x, base = random_rows(*shape, dtype=dtype), random_rows(*shape, seed=1, dtype=dtype)
    ks = (1, 2, x.numel() // 3, x.numel() // 2, x.numel() - 1, x.numel())
    assert_thresholds(x, ks)
    assert_thresholds(x, ks, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks_and_blocks(dtype, block_order):
    # Seven chunks of 57,344 on the six blocks of the executor's three multiprocessors.
    x = random_rows(390, 1000, dtype=dtype, scale=0.02)
    x[:, ::3] = 0.0
    assert_thresholds(x, (1, 1000, int(0.53 * x.numel()), x.numel()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -3.5, math.inf, math.nan, 1e-7])
def test_all_equal(dtype, value):
    # More of one value than a count of 16 bits holds.
    x = torch.full((72, 1029), value, dtype=dtype)
    assert_thresholds(x, (1, x.numel()))
    assert_thresholds(x[:9], (1, x[:9].numel()), torch.zeros_like(x[:9]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_16_bit_number(dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)
    ks = (1, 100, 256, 257, 2046, 2047, 30_000, 65_534, 65_535, 65_536)
    assert_thresholds(x, ks)
    assert_thresholds(x, ks, torch.zeros_like(x))


def test_neighbouring_numbers():
    """All differ in the last bits only, around borders of the digits."""
    for middle in (0x3F800000, 0x3F900400, 0x00100000, 0x7F7F8000, 0x7F800000):
        bits = torch.arange(middle - 1200, middle + 1200, dtype=torch.int32)
        x = bits[torch.randperm(2400, generator=torch.Generator().manual_seed(0))]
        assert_thresholds(x.view(torch.float32).reshape(24, 100), (1, 1199, 1200, 1201, 2400))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(dtype, layout):
    x, _ = lay_out(random_rows(13, 37, dtype=dtype), layout)
    ks = (1, 100, x.numel())
    assert_thresholds(x, ks)
    assert_thresholds(x, ks, random_rows(13, 37, seed=1, dtype=dtype))
    assert_thresholds(random_rows(13, 37, seed=1, dtype=dtype), ks, x)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    based=st.booleans(),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_any_shape(rows, columns, offset, dtype, based, seed, data):
    values = random_rows(1, rows * columns + offset, seed=seed, dtype=dtype)[0]
    x = values[offset:].view(rows, columns)
    base = random_rows(rows, columns, seed=seed + 1, dtype=dtype) if based else None
    assert_thresholds(x, [data.draw(st.integers(1, rows * columns))], base)


# What does not fit.


@pytest.fixture
def call(emulated_module):
    """A valid call; arguments can be replaced."""
    tensors = {name: torch.ones(3, 4) for name in ("x", "base")}
    tensors["workspace"] = torch.empty(2050, dtype=torch.int64)
    tensors["out"] = torch.empty(())

    def called(**changes):
        arguments = {
            **{name: (tensors[name].data_ptr(), 4, 1, 0) for name in ("x", "base")},
            **{"rows": 3, "columns": 4, "k": 5, "stream": (0, 0)},
            **{name: tensors[name].data_ptr() for name in ("out", "workspace")},
        }
        emulated_module.cuda_magnitude_threshold(**{**arguments, **changes})
        return tensors["out"].item()

    return called


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be from 1 to the number of elements, got 0 for 3 x 4"),
        ({"k": 13}, "got 13 for 3 x 4"),
        ({"rows": -1}, "rows and columns must be >= 0"),
        ({"x": (0, 4, 1, 0)}, "x is a null pointer"),
        ({"x": (4097, 4, 1, 0)}, "x is at 0x1001, which is no multiple of 4"),
        ({"x": (4096, -4, 1, 0)}, "x has strides -4 and 1; 0 or more is needed"),
        ({"x": (4096, 4, 1, 7)}, "x has element type 7"),
        ({"base": (4096, 4, 1, 1)}, "base has element type 1, x has 0"),
        ({"out": 0}, "out is a null pointer"),
        ({"workspace": 0}, "workspace is at"),
        ({"workspace": 4100}, "a multiple of 8 is needed"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(call, changes, message):
    assert call() == 0.0
    with pytest.raises(ValueError, match=message):
        call(**changes)
