"""covariance: ``Kᵀ K``, added up in a stream."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, bits, lay_out, random_rows, same_bits, view_of
from tolerances import assert_as_accurate, floor, largest_error

from pyeditfast import backend, reference
from pyeditfast.ops import covariance

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.covariance")

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (13, 7),
    (7, 13),
    (101, 31),
    (2, 29, 17),
    (2, 3, 11, 5),
    (3000, 400),
]


@pytest.fixture(params=[1, 4, 5, 7, 2048])
def block(request, monkeypatch):
    """Run with blocks that divide the width, that leave a rest, and that hold it all."""
    monkeypatch.setattr(op, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(dtype, shape):
    keys = random_rows(*shape, dtype=dtype)
    result = covariance(keys)
    assert result.shape == (*shape[:-2], shape[-1], shape[-1])
    naive = reference.covariance(keys.float())
    assert_as_accurate(result, naive, reference.covariance(keys.double()), shape[-2])


@pytest.mark.parametrize("width", [1, 4, 5, 10, 13])
def test_blocks_agree(block, width):
    # Integers: every order of summation gives the same float32 numbers.
    generator = torch.Generator().manual_seed(width)
    keys = torch.randint(-99, 100, (2, 17, width), generator=generator)
    exact = keys.double().mT @ keys.double()
    assert torch.equal(covariance(keys.float()).double(), exact)
    out = torch.ones(2, width, width)
    assert torch.equal(covariance(keys.float(), out).double(), exact + 1)


def test_stays_symmetric_to_the_bit(block):
    out = torch.zeros(2, 13, 13)
    for seed in range(5):
        covariance(random_rows(2, 31, 13, seed=seed), out)
        assert torch.equal(out, out.mT)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_up_a_stream(dtype, out_dtype, block):
    keys = random_rows(3, 60, 13, dtype=dtype)
    start = random_rows(3, 13, 13, seed=5, dtype=out_dtype)
    start = start + start.mT
    out = start.clone()
    for part in keys.split([1, 7, 0, 30, 22], dim=-2):
        assert covariance(part, out) is out
    exact = reference.covariance(keys.double(), start.double())
    assert out.dtype == out_dtype
    assert_as_accurate(out, reference.covariance(keys.to(out_dtype), start), exact, 60)


def test_float64_out_keeps_what_float32_loses():
    keys = 1e4 + random_rows(50, 9)
    exact = reference.covariance(keys.double())
    out = covariance(keys, torch.zeros(9, 9, dtype=torch.float64))
    assert largest_error(out, exact) <= floor(torch.float64, 50)
    assert largest_error(covariance(keys), exact) > 1e3 * floor(torch.float64, 50)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_keys(dtype, layout, block):
    plain = random_rows(3, 19, 11, dtype=dtype, seed=1)
    keys, storage = lay_out(plain, layout)
    before = storage.clone()
    naive = reference.covariance(plain.float())
    assert_as_accurate(covariance(keys), naive, reference.covariance(plain.double()), 19)
    assert same_bits(storage, before)


def test_expanded_keys(block):
    row = random_rows(2, 1, 11)
    exact = reference.covariance(row.double().repeat(1, 6, 1))
    naive = reference.covariance(row.repeat(1, 6, 1))
    assert_as_accurate(covariance(row.expand(2, 6, 11)), naive, exact, 6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_out_and_the_bytes_around_it(layout, block):
    keys = random_rows(2, 19, 11)
    start = covariance(random_rows(2, 7, 11, seed=2))
    out, storage = lay_out(start, layout)
    before = storage.clone()
    assert covariance(keys, out) is out
    exact = reference.covariance(keys.double(), start.double())
    assert_as_accurate(out, reference.covariance(keys, start), exact, 19)
    after = storage.clone()
    view_of(after, layout).zero_()
    view_of(before, layout).zero_()
    assert torch.equal(bits(after), bits(before))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 6), (2, 0, 6)], ids=str)
def test_empty_keys(shape):
    result = covariance(torch.zeros(shape))
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.zeros(*shape[:-2], shape[-1], shape[-1]))


def test_no_rows_leave_out_as_it_was():
    start = covariance(random_rows(9, 4))
    out = start.clone()
    covariance(torch.zeros(0, 4), out)
    assert torch.equal(out, start)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 1.5e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e15),
        (torch.float32, 1e15),
        (torch.float32, 1e-6),
    ],
    ids=str,
)
def test_extreme_magnitudes(dtype, scale, block):
    keys = random_rows(23, 13, dtype=dtype, scale=scale).clamp(-4 * scale, 4 * scale)
    naive = reference.covariance(keys.float())
    assert_as_accurate(covariance(keys), naive, reference.covariance(keys.double()), 23)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(dtype):
    keys = random_rows(2, 257, 61, dtype=dtype)
    assert same_bits(covariance(keys), covariance(keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_float64_formula(dtype):
    keys = random_rows(2, 17, 29, dtype=dtype)
    start = covariance(random_rows(2, 5, 29, seed=1))
    out = start.clone()
    with backend("reference"):
        assert covariance(keys, out) is out
        fresh = covariance(keys)
    assert torch.equal(out, reference.covariance(keys.double(), start.double()).float())
    assert torch.equal(fresh, reference.covariance(keys.double()).float())


@pytest.mark.parametrize(
    ("keys", "out", "error", "message"),
    [
        ([[1.0]], None, TypeError, "keys is a list"),
        (torch.ones(2, 3, dtype=torch.int32), None, TypeError, "keys has dtype torch.int32"),
        (torch.ones(3), None, ValueError, "keys has shape (3,)"),
        (
            torch.ones(2, 3),
            torch.zeros(2, 2),
            ValueError,
            "out has shape (2, 2); keys (2, 3) need (3, 3)",
        ),
        (
            torch.ones(4, 2, 3),
            torch.zeros(3, 3),
            ValueError,
            "out has shape (3, 3); keys (4, 2, 3) need (4, 3, 3)",
        ),
        (
            torch.ones(2, 3),
            torch.zeros(3, 3, dtype=torch.bfloat16),
            TypeError,
            "out has dtype torch.bfloat16",
        ),
        (
            torch.ones(2, 3),
            torch.zeros(3, 3, device="meta"),
            ValueError,
            "keys is on cpu and out on meta",
        ),
    ],
)
def test_errors_show_the_offending_value(keys, out, error, message):
    with pytest.raises(error, match=re.escape(message)):
        covariance(keys, out)
    if out is not None and out.device.type == "cpu":
        assert not out.any()
