"""magnitude_threshold: the exact k-th largest magnitude."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out, random_rows

from pyeditfast import reference
from pyeditfast.backends import backend, explain
from pyeditfast.extension import extension_status, load_extension

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.magnitude_threshold")

extension = load_extension()
needs_extension = pytest.mark.skipif(extension is None, reason=extension_status())

BACKENDS = [
    "auto",
    "reference",
    "torch",
    pytest.param("cpp", marks=needs_extension),
]
SIXTEEN_AND_32_BITS = (torch.bfloat16, torch.float16, torch.float32)


def density_of(k, numel):
    """Return a density that keeps exactly ``k`` of ``numel`` elements."""
    density = k / numel
    while int(density * numel) < k:
        density = math.nextafter(density, 1.0)
    assert int(density * numel) == k
    return density


def by_sorting(x, k, base=None):
    """Return the k-th largest magnitude by numpy, which sorts NaN last, as the largest."""
    values = x.float() if base is None else x.float() - base.float()
    return float(np.sort(values.abs().flatten().numpy())[-k])


def assert_threshold(x, k, base=None):
    """Require that the op finds what sorting finds, NaN equal to NaN."""
    threshold = op.magnitude_threshold(x, density_of(k, x.numel()), base=base)
    assert threshold.dtype == torch.float32
    assert threshold.shape == ()
    expected = by_sorting(x, k, base)
    assert threshold.item() == expected or (math.isnan(threshold) and math.isnan(expected)), (
        threshold.item(),
        expected,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 13), (1, 1024), (3, 1031), (127, 129)])
def test_equals_sorting(name, dtype, shape):
    x, base = random_rows(*shape, dtype=dtype), random_rows(*shape, seed=1, dtype=dtype)
    numel = x.numel()
    with backend(name):
        for k in sorted({1, 2, numel // 3, numel // 2, numel - 1, numel} & set(range(1, 1 << 20))):
            if k <= numel:
                assert_threshold(x, k)
                assert_threshold(x, k, base)


@needs_extension
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("with_base", [False, True])
def test_every_k_of_a_small_tensor(dtype, with_base):
    x = random_rows(11, 23, dtype=dtype)
    base = random_rows(11, 23, seed=1, dtype=dtype) if with_base else None
    with backend("cpp"):
        for k in range(1, x.numel() + 1):
            assert_threshold(x, k, base)


@needs_extension
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
def test_a_large_tensor(dtype):
    x = random_rows(700, 1031, dtype=dtype, scale=0.02)
    base = (x.double() + random_rows(700, 1031, seed=1, scale=1e-3).double()).to(dtype)
    with backend("cpp"):
        for k in (1, 2, 1000, int(0.53 * x.numel()), x.numel() - 1, x.numel()):
            assert_threshold(x, k)
            assert_threshold(x, k, base)


@needs_extension
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, math.nan, 1e-7])
def test_all_equal(dtype, value):
    x = torch.full((37, 1029), value, dtype=dtype)
    with backend("cpp"):
        for k in (1, x.numel() // 2, x.numel()):
            assert_threshold(x, k)
            assert_threshold(x, k, torch.zeros_like(x))


@needs_extension
def test_ties_at_the_threshold():
    """Of 3 ones, 1000 halves and zeros the 4th to the 1003rd largest is a half."""
    x = torch.zeros(64, 129)
    x.view(-1)[:3] = -1.0
    x.view(-1)[3000:4000] = 0.5
    with backend("cpp"):
        thresholds = {
            k: op.magnitude_threshold(x, density_of(k, x.numel())).item()
            for k in (1, 3, 4, 500, 1003, 1004, x.numel())
        }
    assert thresholds == {1: 1.0, 3: 1.0, 4: 0.5, 500: 0.5, 1003: 0.5, 1004: 0.0, x.numel(): 0.0}


@needs_extension
def test_neighbouring_numbers():
    """All differ in the last bits only, around a border of the first pass's bins."""
    for middle in (0x3F800000, 0x00008000, 0x7F7F8000, 0x7F800000):
        bits = torch.arange(middle - 2000, middle + 2000, dtype=torch.int32)
        x = bits[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
        x = x.view(torch.float32).reshape(40, 100)
        with backend("cpp"):
            for k in (1, 2, 1999, 2000, 2001, 2002, 3999, 4000):
                assert_threshold(x, k)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)
    with backend("cpp"):
        for k in (1, 100, 256, 257, 2046, 2047, 30_000, 65_534, 65_535, 65_536):
            assert_threshold(x, k)
            assert_threshold(x, k, torch.zeros_like(x))


@needs_extension
def test_special_values_in_a_difference():
    special = [0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-40]
    x, base = torch.meshgrid(torch.tensor(special), torch.tensor(special), indexing="ij")
    with backend("cpp"):
        for k in range(1, 101):
            assert_threshold(x, k, base)


FLOAT_BITS = st.integers(min_value=0, max_value=2**32 - 1)


@needs_extension
@settings(deadline=None, max_examples=200)
@given(
    patterns=st.lists(FLOAT_BITS, min_size=1, max_size=80),
    repeats=st.integers(min_value=1, max_value=40),
    data=st.data(),
)
def test_any_bits(patterns, repeats, data):
    """Whatever the 32 bits are, and however often they repeat."""
    numbers = np.array(patterns * repeats, dtype=np.uint32).view(np.float32)
    x = torch.from_numpy(numbers).reshape(1, -1)
    k = data.draw(st.integers(min_value=1, max_value=x.numel()))
    with backend("cpp"):
        assert_threshold(x, k)
        assert_threshold(x, k, x.flip(1))
        half = x.view(torch.int16).view(torch.bfloat16)
        assert_threshold(half, k)


@needs_extension
@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=300),
    rows=st.integers(min_value=1, max_value=4),
    share=st.floats(min_value=1e-3, max_value=1.0),
)
def test_any_numbers_and_density(values, rows, share):
    x = torch.tensor(values[: len(values) // rows * rows]).reshape(-1, rows).T
    if int(share * x.numel()) == 0:
        share = 1.0
    with backend("cpp"):
        threshold = op.magnitude_threshold(x, share)
    assert torch.equal(threshold, reference.magnitude_threshold(x, share))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base_layout", ["contiguous", "transposed", "inside"])
def test_layouts(name, layout, base_layout):
    x, base = random_rows(37, 1029, dtype=torch.bfloat16), random_rows(37, 1029, seed=1)
    base = base.bfloat16()
    x_view, base_view = lay_out(x, layout)[0], lay_out(base, base_layout)[0]
    for k in (1, 1000, 20_000, x.numel()):
        density = density_of(k, x.numel())
        with backend(name):
            assert op.magnitude_threshold(x_view, density).item() == by_sorting(x, k)
            threshold = op.magnitude_threshold(x_view, density, base=base_view)
        assert threshold.item() == by_sorting(x, k, base)


@needs_extension
def test_narrow_and_expanded():
    wide = random_rows(301, 9)
    with backend("cpp"):
        assert_threshold(wide[:, 3:4], 57)
        assert_threshold(wide[:1], 4)
        assert_threshold(wide[:, 2:5], 100)
        assert_threshold(wide[:1].expand(50, 9), 60)
        assert_threshold(wide[:, :1].expand(301, 50), 60)


@pytest.mark.parametrize("name", BACKENDS)
def test_more_dimensions(name):
    x, base = random_rows(3, 5, 37), random_rows(3, 5, 37, seed=1)
    with backend(name):
        assert_threshold(x, 100)
        assert_threshold(x, 100, base)


@needs_extension
def test_dimensions_that_are_no_matrix():
    x = random_rows(5, 3, 37).transpose(0, 1)
    assert_threshold(x, 100)
    with backend("cpp"), pytest.raises(ValueError, match=r"x \(3, 5, 37\) has strides \(37, 111"):
        op.magnitude_threshold(x, 0.5)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thread_counts_give_the_same_threshold(dtype):
    x = random_rows(301, 1023, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with backend("cpp"):
                assert_threshold(x, 100_000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["auto", "reference", "torch"])
def test_float64(name):
    x = random_rows(37, 29, dtype=torch.float64)
    with backend(name):
        threshold = op.magnitude_threshold(x, density_of(500, x.numel()))
    assert threshold.dtype == torch.float64
    assert threshold.item() == np.sort(x.abs().flatten().numpy())[-500]


def test_backend_on_the_cpu():
    expected = "torch" if extension is None else "cpp"
    choice = explain("magnitude_threshold", op.CANDIDATES, torch.device("cpu"))
    assert choice.backend == expected


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0.0, "density is 0.0; a number above 0 and up to 1 is needed"),
        (-0.5, "density is -0.5"),
        (1.5, "density is 1.5"),
        (math.nan, "density is nan"),
        (0.01, "density 0.01 keeps none of 12 elements"),
    ],
)
def test_bad_densities(density, message):
    with pytest.raises(ValueError, match=message):
        op.magnitude_threshold(torch.ones(3, 4), density)


def test_bad_tensors():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"base is torch.float32 \(4, 3\); x is torch.float32 \(3"):
        op.magnitude_threshold(x, 0.5, base=x.T)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        op.magnitude_threshold(x.long(), 0.5)
    with pytest.raises(ValueError, match=r"x has shape \(12,\)"):
        op.magnitude_threshold(x.flatten(), 0.5)
    with pytest.raises(ValueError, match="keeps none of 0 elements"):
        op.magnitude_threshold(torch.empty(0, 4), 0.5)
