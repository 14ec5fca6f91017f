"""gram: the kernels against ``K Kᵀ + ridge · I`` in float64."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, empty_storage, random_rows, same_bits, view_of
from ops.tolerances import UNIT_ROUNDOFF, assert_as_accurate, largest_error
from torch import Tensor
from truncation import truncate_dots

from pyeditfast import reference
from pyeditfast.ops import gram
from pyeditfast_kernels import gram as kernels
from pyeditfast_kernels.launch import Config, interprets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]

CONFIGS = (kernels.SMALL, kernels.LARGE, kernels.FINE)

CASES = [(config, dtype) for config in CONFIGS for dtype in DTYPES]
CASES = [case for case in CASES if case[0] is kernels.FINE or case[1] != torch.float32]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Config) else str(value)


def assert_equals_formula(result: Tensor, keys: Tensor, ridge: float) -> None:
    """Require the accuracy of plain float32; plain 16-bit products are no yardstick."""
    keys = keys.cpu()
    assert result.shape == (*keys.shape[:-1], keys.shape[-2])
    assert_as_accurate(
        result.cpu(),
        reference.gram(keys.float(), ridge),
        reference.gram(keys.double(), ridge),
        keys.shape[-1],
    )


def whole_numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers whose products and sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-99, 100, shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 7),
        (7, 1),
        (31, 101),
        (64, 128),
        (80, 96),
        (65, 127),
        (130, 67),
        (1, 17, 29),
        (2, 64, 64),
        (3, 5, 1100),
        (2, 3, 5, 11),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(device, dtype, shape):
    keys = random_rows(*shape, dtype=dtype).to(device)
    assert_equals_formula(gram(keys, 0.7), keys, 0.7)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("n", [64, 127, 257])
@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_every_configuration(device, config, dtype, n, splits):
    keys = random_rows(2, n, 208, dtype=dtype).to(device)
    result = kernels.gram(keys, 0.7, config, splits)
    assert_equals_formula(result, keys, 0.7)
    assert same_bits(result, result.mT.contiguous())


@settings(deadline=None, max_examples=25)
@given(
    modules=st.integers(1, 3),
    n=st.integers(1, 70),
    d=st.integers(1, 300),
    case=st.sampled_from(CASES),
    splits=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(device, modules, n, d, case, splits, layout):
    config, dtype = case
    keys = view_of(empty_storage((modules, n, d), dtype, layout).to(device), layout)
    keys.copy_(random_rows(modules, n, d, dtype=dtype, seed=n))
    assert_equals_formula(kernels.gram(keys, 0.5, config, splits), keys, 0.5)


# Digits.


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_sums_of_exact_products_are_exact_for_every_split(device, config, dtype):
    keys = whole_numbers(2, 29, 331, device=device, dtype=dtype)
    exact = (keys.double() @ keys.double().mT).float()
    for splits in (1, 2, 5, 11):
        assert torch.equal(kernels.gram(keys, 0.0, config, splits), exact)


def test_a_product_of_float32_keys_keeps_their_digits(device):
    # One term an entry: without any one of the six products of parts some are off by 2⁻¹⁸.
    keys = random_rows(67, 1).to(device)
    exact = keys.double() @ keys.double().mT
    error = ((gram(keys) - exact) / exact).abs().max().item()
    assert error <= 3 * UNIT_ROUNDOFF[torch.float32]


def test_dropped_products_do_not_add_up(device):
    # They are below float32's rounding, but over 10,000 positive terms a bias would show.
    keys = 1.0 + random_rows(3, 10_000).abs().to(device)
    exact = reference.gram(keys.double())
    assert largest_error(gram(keys), exact) <= 4 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_truncating_tensor_cores_cost_nothing(device, config, dtype, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    keys = random_rows(1, 5, 14336, dtype=dtype).to(device)
    assert_equals_formula(kernels.gram(keys, 1.0, config, 1), keys, 1.0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 6e4 / 4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.bfloat16, 1e-20),
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.float32, 1e-18),
    ],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale):
    keys = random_rows(11, 67, dtype=torch.float64).clamp(-4, 4).mul(scale).to(device, dtype)
    assert_equals_formula(gram(keys), keys, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dominant_direction(device, dtype):
    # As large models have: one feature of 1e4 beside features of 1.
    keys = random_rows(37, 301)
    keys[:, 5] = 1e4
    keys = keys.to(device, dtype)
    assert_equals_formula(gram(keys, 1.0), keys, 1.0)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_the_largest_numbers(device):
    keys = torch.zeros(3, 2, device=device)
    keys[:, 1] = torch.tensor([3.4028235e38, 1e-30, 2.0])
    result = gram(keys)
    assert not result[0, 0].isfinite()
    for column, exact in ((1, 3.4028235e38 * 1e-30), (2, None)):
        if exact is not None:
            assert result[0, column].item() == pytest.approx(exact, rel=1e-6)
    assert result[2, 2].item() == 4.0
    assert result[1, 2].item() == pytest.approx(2e-30, rel=1e-6)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(device, dtype, splits):
    keys = whole_numbers(2, 70, 33, device=device, dtype=dtype)
    config = kernels.FINE
    expected = kernels.gram(keys, 1.0, config, splits)
    keys[1, 66, 3] = math.nan
    result = kernels.gram(keys, 1.0, config, splits)
    others = torch.arange(70, device=device) != 66
    assert result[1, 66].isnan().all() and result[1, :, 66].isnan().all()
    assert same_bits(result[1][others][:, others], expected[1][others][:, others])
    assert same_bits(result[0], expected[0])


@pytest.mark.parametrize("splits", [1, 2])
def test_ridge_is_added_to_the_diagonal_alone(device, splits):
    keys = random_rows(2, 70, 65).to(device)
    plain, ridged = (kernels.gram(keys, ridge, kernels.FINE, splits) for ridge in (0.0, 3.5))
    diagonal = torch.eye(70, dtype=torch.bool, device=device).expand(2, 70, 70)
    assert torch.equal(ridged[~diagonal], plain[~diagonal])
    assert torch.equal(ridged[diagonal], plain[diagonal] + 3.5)


# Bits.


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_gives_the_same_bits_twice_and_in_any_company(device, config, dtype, splits):
    keys = random_rows(3, 70, 200, dtype=dtype).to(device)
    first, second = (kernels.gram(keys, 1.0, config, splits) for _ in range(2))
    assert same_bits(first, second)
    for module in range(3):
        alone = kernels.gram(keys[module : module + 1], 1.0, config, splits)
        assert same_bits(alone, first[module : module + 1])


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_keys_are_read_and_not_written(device, dtype, layout):
    plain = random_rows(3, 19, 47, dtype=dtype).to(device)
    storage = empty_storage(plain.shape, dtype, layout).to(device)
    keys = view_of(storage, layout)
    keys.copy_(plain)
    before = storage.clone()
    assert same_bits(gram(keys, 1.0), gram(plain, 1.0))
    assert same_bits(storage, before)


def test_leading_dimensions_that_cannot_be_joined(device):
    keys = random_rows(3, 5, 19, 47).to(device)
    swapped = keys.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(gram(swapped, 1.0), gram(keys, 1.0))


def test_expanded_keys(device):
    row = whole_numbers(2, 1, 23, device=device, dtype=torch.bfloat16)
    expanded = row.expand(2, 9, 23)
    assert same_bits(gram(expanded, 0.5), gram(expanded.contiguous(), 0.5))


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (4, 0, 6), (0, 3, 6), (2, 0, 3, 6)], ids=str)
def test_empty_keys(device, shape):
    result = gram(torch.zeros(shape, device=device), 2.0)
    assert result.dtype == torch.float32 and result.shape == (*shape[:-1], shape[-2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_without_features_leave_the_ridge(device, dtype):
    result = gram(torch.zeros(2, 5, 0, dtype=dtype, device=device), 0.25)
    assert torch.equal(result.cpu(), 0.25 * torch.eye(5).expand(2, 5, 5))


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    keys = FarTensor(1 << 50, (3, 65, 34), torch.bfloat16, (1 << 45, 1 << 36, 1 << 30))
    kernels.gram(keys, 1.0, kernels.FINE, 1)
    everywhere = itertools.product(range(3), range(65), range(34))
    assert seen.loaded == {keys.address(*index) for index in everywhere}


# Which configuration, and what is refused.


def test_few_rows_take_small_tiles():
    assert kernels.choose_config(512, torch.bfloat16, True) is kernels.SMALL
    assert kernels.choose_config(513, torch.float16, True) is kernels.LARGE
    assert kernels.choose_config(513, torch.bfloat16, False) is kernels.FINE
    assert kernels.choose_config(513, torch.float32, True) is kernels.FINE


@pytest.mark.parametrize(("block", "most"), [(64, 528), (128, 132)])
def test_few_tiles_are_split_until_they_fill_the_chip(block, most):
    assert kernels.choose_splits(1, 511, block) == 1
    assert kernels.choose_splits(1, 14336, block) >= 16
    assert kernels.choose_splits(most, 14336, block) == 1
    assert kernels.choose_splits(100 * most, 14336, block) == 1
    for tiles in range(1, 2 * most, 13):
        for d in (64, 1024, 4096, 14336, 100_000):
            splits = kernels.choose_splits(tiles, d, block)
            assert 1 <= splits <= kernels.MOST_SPLITS
            assert splits == 1 or d // splits >= kernels.FEWEST_COLUMNS


def test_a_few_rows_are_split(device):
    keys = random_rows(3, 1100, dtype=torch.bfloat16).to(device)
    whole, halves = (kernels.gram(keys[None], 0.0, None, splits) for splits in (1, 2))
    assert kernels.choose_splits(1, 1100, 64) == 2
    assert same_bits(gram(keys), halves[0]) and not same_bits(gram(keys), whole[0])


@pytest.mark.parametrize("wanted", ["keys", "result"])
def test_float64_is_refused(device, wanted):
    keys = torch.ones(2, 3, device=device)
    keys, dtype = (keys.double(), torch.float32) if wanted == "keys" else (keys, torch.float64)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        gram(keys, dtype=dtype)
