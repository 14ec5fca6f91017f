"""gram: ``K Kᵀ + ridge · I``."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from tolerances import UNIT_ROUNDOFF, assert_as_accurate, floor, largest_error

from pyeditfast import backend, reference
from pyeditfast.ops import gram

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.gram")

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (7, 13),
    (31, 101),
    (101, 31),
    (64, 128),
    (2, 17, 29),
    (2, 3, 5, 11),
    (400, 3000),
]


def naive_gram(keys: torch.Tensor, ridge: float, dtype: torch.dtype) -> torch.Tensor:
    """The formula in plain torch. The op's result is float32 for 16-bit keys too, so they are
    measured against plain float32, not against plain bfloat16.
    """
    return reference.gram(keys.to(dtype), ridge)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(dtype, shape):
    keys = random_rows(*shape, dtype=dtype)
    result = gram(keys, 0.7)
    assert result.shape == (*shape[:-1], shape[-2])
    assert_as_accurate(
        result,
        naive_gram(keys, 0.7, torch.float32),
        reference.gram(keys.double(), 0.7),
        shape[-1],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float64_result_is_the_float64_formula(dtype):
    keys = random_rows(3, 37, 101, dtype=dtype)
    result = gram(keys, 0.7, dtype=torch.float64)
    assert result.dtype == torch.float64
    exact = reference.gram(keys.double(), 0.7)
    assert largest_error(result, exact) <= floor(torch.float64, 101)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_keys_are_exact(dtype):
    # Every product and every partial sum of these integers is a float32 number.
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(-255, 256, (29, 53), generator=generator)
    assert torch.equal(gram(keys.to(dtype)).double(), (keys.double() @ keys.double().mT))


@pytest.mark.parametrize("columns", [1, 4, 7, 53])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_agree(dtype, wanted, columns, monkeypatch):
    # Integers: every order of summation gives the same numbers.
    monkeypatch.setattr(op, "COLUMNS", columns)
    generator = torch.Generator().manual_seed(4)
    keys = torch.randint(-99, 100, (2, 13, 53), generator=generator).to(dtype)
    exact = keys.double() @ keys.double().mT
    assert torch.equal(gram(keys, dtype=wanted).double(), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_keys(dtype, layout):
    plain = random_rows(3, 19, 47, dtype=dtype, seed=1)
    keys, storage = lay_out(plain, layout)
    before = storage.clone()
    result = gram(keys, 1.0)
    exact = reference.gram(plain.double(), 1.0)
    assert_as_accurate(result, naive_gram(plain, 1.0, torch.float32), exact, 47)
    assert same_bits(storage, before)


def test_expanded_keys():
    row = random_rows(2, 1, 23)
    result = gram(row.expand(2, 9, 23), 0.5)
    exact = reference.gram(row.double().repeat(1, 9, 1), 0.5)
    assert_as_accurate(result, naive_gram(row.repeat(1, 9, 1), 0.5, torch.float32), exact, 23)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (4, 0, 6), (0, 3, 6), (2, 0, 3, 6)], ids=str)
def test_empty_keys(shape):
    result = gram(torch.zeros(shape), 2.0)
    assert result.dtype == torch.float32
    assert torch.equal(result, 2.0 * torch.eye(shape[-2]).expand(*shape[:-2], -1, -1))


def test_keys_without_features_leave_the_ridge():
    assert torch.equal(gram(torch.zeros(2, 5, 0), 0.25), 0.25 * torch.eye(5).expand(2, 5, 5))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 6e4 / 4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.float32, 1e15),
        (torch.float32, 1e-6),
        (torch.float64, 1e-6),
    ],
    ids=str,
)
def test_extreme_magnitudes(dtype, scale):
    # In float16 the products of large keys overflow and those of small ones vanish.
    keys = random_rows(11, 67, dtype=dtype, scale=scale).clamp(-4 * scale, 4 * scale)
    exact = reference.gram(keys.double())
    assert_as_accurate(gram(keys), naive_gram(keys, 0.0, torch.float32), exact, 67)


def test_a_dominant_direction_does_not_hide_the_ridge():
    # Entries of 1e6 leave a float32 Gram no digit of a ridge of 0.01; a float64 one keeps it.
    direction = random_rows(1, 65, seed=1)
    keys = random_rows(13, 65) + 1e2 * direction
    with_ridge = gram(keys, 0.01, dtype=torch.float64)
    without = gram(keys, 0.0, dtype=torch.float64)
    assert largest_error(with_ridge - without, 0.01 * torch.eye(13).double()) <= 1e-5


def test_ridge_is_added_to_the_diagonal_alone():
    keys = random_rows(2, 17, 33)
    plain, ridged = gram(keys), gram(keys, 3.5)
    on_diagonal = torch.eye(17, dtype=torch.bool).expand(2, 17, 17)
    assert torch.equal(ridged[~on_diagonal], plain[~on_diagonal])
    assert torch.equal(ridged[on_diagonal], plain[on_diagonal] + 3.5)


def test_is_symmetric_up_to_rounding():
    result = gram(random_rows(2, 37, 301), 1.0)
    assert largest_error(result, result.mT.double()) <= 2 * floor(torch.float32, 301)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(dtype):
    keys = random_rows(2, 61, 257, dtype=dtype)
    assert same_bits(gram(keys, 1.0), gram(keys, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_float64_formula(dtype):
    keys = random_rows(2, 17, 29, dtype=dtype)
    with backend("reference"):
        result = gram(keys, 1.0)
    assert torch.equal(result, reference.gram(keys.double(), 1.0).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_computes_in_the_dtype_of_the_keys(dtype):
    keys = random_rows(3, 5, dtype=dtype)
    by_hand = torch.empty(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            by_hand[i, j] = (keys[i].double() * keys[j].double()).sum() + (2.0 if i == j else 0.0)
    result = reference.gram(keys, 2.0)
    assert result.dtype == dtype
    assert largest_error(result, by_hand) <= 4 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1.0]],), {}, TypeError, "keys is a list, not a torch.Tensor"),
        ((torch.ones(2, 3, dtype=torch.int64),), {}, TypeError, "keys has dtype torch.int64"),
        ((torch.ones(3),), {}, ValueError, "keys has shape (3,); [..., n, d] is needed"),
        ((torch.ones(2, 3), -0.5), {}, ValueError, "ridge is -0.5"),
        ((torch.ones(2, 3), float("nan")), {}, ValueError, "ridge is nan"),
        ((torch.ones(2, 3), float("inf")), {}, ValueError, "ridge is inf"),
        ((torch.ones(2, 3),), {"dtype": torch.float16}, ValueError, "dtype is torch.float16"),
    ],
)
def test_errors_show_the_offending_value(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gram(*arguments, **options)
