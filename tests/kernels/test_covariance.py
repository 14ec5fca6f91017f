"""covariance: the kernel against ``C + Kᵀ K`` in float64."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, bits, empty_storage, random_rows, same_bits, view_of
from ops.tolerances import UNIT_ROUNDOFF, assert_as_accurate
from torch import Tensor
from truncation import truncate_dots

from pyeditfast import reference
from pyeditfast.ops import covariance
from pyeditfast_kernels import covariance as kernels
from pyeditfast_kernels.launch import Config, interprets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CONFIGS = (kernels.SMALL, kernels.LARGE, kernels.FINE)

CASES = [(config, dtype) for config in CONFIGS for dtype in DTYPES]
CASES = [case for case in CASES if case[0] is kernels.FINE or case[1] != torch.float32]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Config) else str(value)


def assert_equals_formula(result: Tensor, keys: Tensor, before: Tensor | None = None) -> None:
    """Require the accuracy of plain float32, and symmetry bit for bit."""
    keys = keys.cpu()
    before = None if before is None else before.cpu()
    assert same_bits(result, result.mT)
    assert_as_accurate(
        result.cpu(),
        reference.covariance(keys.float(), before),
        reference.covariance(keys.double(), None if before is None else before.double()),
        keys.shape[-2],
    )


def whole_numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers whose products and sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-99, 100, shape, generator=generator).to(device, dtype)


def symmetric(*shape: int, device: torch.device, scale: float = 10.0) -> Tensor:
    rows = random_rows(*shape, shape[-1], seed=7, scale=scale).to(device)
    return rows + rows.mT


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (7, 1),
        (1, 7),
        (101, 31),
        (128, 64),
        (96, 80),
        (127, 65),
        (67, 130),
        (1, 29, 17),
        (2, 64, 64),
        (3, 1100, 5),
        (2, 3, 11, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(device, dtype, shape):
    keys = random_rows(*shape, dtype=dtype).to(device)
    assert_equals_formula(covariance(keys), keys)
    before = symmetric(*shape[:-2], shape[-1], device=device)
    out = before.clone()
    assert covariance(keys, out) is out
    assert_equals_formula(out, keys, before)


@pytest.mark.parametrize("d", [64, 127, 257])
@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_every_configuration(device, config, dtype, d):
    keys = random_rows(2, 208, d, dtype=dtype).to(device)
    before = symmetric(2, d, device=device)
    assert_equals_formula(kernels.covariance(keys, before.clone(), config), keys, before)


@settings(deadline=None, max_examples=25)
@given(
    modules=st.integers(1, 3),
    n=st.integers(1, 200),
    d=st.integers(1, 70),
    case=st.sampled_from(CASES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_any_shape(device, modules, n, d, case, layouts):
    config, dtype = case
    keys = view_of(empty_storage((modules, n, d), dtype, layouts[0]).to(device), layouts[0])
    keys.copy_(random_rows(modules, n, d, dtype=dtype, seed=n))
    before = symmetric(modules, d, device=device)
    out = view_of(empty_storage((modules, d, d), torch.float32, layouts[1]).to(device), layouts[1])
    out.copy_(before)
    assert_equals_formula(kernels.covariance(keys, out, config), keys, before)


# Digits.


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_sums_of_exact_products_are_exact_in_any_parts(device, config, dtype):
    keys = whole_numbers(2, 331, 29, device=device, dtype=dtype)
    exact = (keys.double().mT @ keys.double()).float()
    for lengths in ((331,), (1, 330), (100, 0, 231)):
        out = torch.zeros(2, 29, 29, device=device)
        for part in keys.split(lengths, dim=1):
            kernels.covariance(part, out, config)
        assert torch.equal(out, exact)


def test_a_product_of_float32_keys_keeps_their_digits(device):
    # One term an entry: without any one of the six products of parts some are off by 2⁻¹⁸.
    keys = random_rows(1, 67).to(device)
    exact = keys.double().mT @ keys.double()
    error = ((covariance(keys) - exact) / exact).abs().max().item()
    assert error <= 3 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_truncating_tensor_cores_cost_nothing(device, config, dtype, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    keys = random_rows(1, 14336, 5, dtype=dtype).to(device)
    out = torch.zeros(1, 5, 5, device=device)
    assert_equals_formula(kernels.covariance(keys, out, config), keys)


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
    keys = random_rows(67, 11, dtype=torch.float64).clamp(-4, 4).mul(scale).to(device, dtype)
    assert_equals_formula(covariance(keys), keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dominant_direction(device, dtype):
    keys = random_rows(301, 37)
    keys[:, 5] = 1e4
    keys = keys.to(device, dtype)
    assert_equals_formula(covariance(keys), keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(device, dtype):
    keys = whole_numbers(2, 33, 70, device=device, dtype=dtype)
    expected = covariance(keys)
    keys[1, 3, 66] = math.nan
    result = covariance(keys)
    others = torch.arange(70, device=device) != 66
    assert result[1, 66].isnan().all() and result[1, :, 66].isnan().all()
    assert same_bits(result[1][others][:, others], expected[1][others][:, others])
    assert same_bits(result[0], expected[0])


def test_many_small_updates_round_one_by_one(device):
    # A stream of a hundred turns; each turn is rounded once into out.
    keys = random_rows(300, 40, dtype=torch.bfloat16).to(device)
    out = torch.zeros(40, 40, device=device)
    for part in keys.split(3):
        covariance(part, out)
    assert_equals_formula(out, keys)


# Bits.


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=name_of)
def test_gives_the_same_bits_twice_and_in_any_company(device, config, dtype):
    keys = random_rows(3, 200, 70, dtype=dtype).to(device)
    before = symmetric(3, 70, device=device)
    first, second = (kernels.covariance(keys, before.clone(), config) for _ in range(2))
    assert same_bits(first, second)
    for module in range(3):
        one = slice(module, module + 1)
        alone = kernels.covariance(keys[one], before[one].clone(), config)
        assert same_bits(alone, first[one])


# Layouts, and the bytes around out.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_keys_are_read_and_not_written(device, dtype, layout):
    plain = random_rows(3, 47, 19, dtype=dtype).to(device)
    storage = empty_storage(plain.shape, dtype, layout).to(device)
    keys = view_of(storage, layout)
    keys.copy_(plain)
    before = storage.clone()
    assert same_bits(covariance(keys), covariance(plain))
    assert same_bits(storage, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_strided_out_and_the_bytes_around_it(device, layout, lead):
    keys = random_rows(*lead, 47, 70).to(device)
    plain = symmetric(*lead, 70, device=device)
    storage = empty_storage(plain.shape, torch.float32, layout).to(device)
    out = view_of(storage, layout)
    out.copy_(plain)
    before = storage.clone()
    assert covariance(keys, out) is out
    assert same_bits(out, covariance(keys, plain))
    for memory in (storage, before):
        view_of(memory, layout).zero_()
    assert torch.equal(bits(storage), bits(before))


def test_leading_dimensions_that_cannot_be_joined(device):
    keys = random_rows(3, 5, 47, 19).to(device)
    out = torch.zeros(5, 3, 19, 19, device=device).transpose(0, 1)
    covariance(keys.transpose(0, 1).contiguous().transpose(0, 1), out)
    assert same_bits(out, covariance(keys))


def test_expanded_keys(device):
    row = whole_numbers(2, 1, 23, device=device, dtype=torch.bfloat16)
    expanded = row.expand(2, 9, 23)
    assert same_bits(covariance(expanded), covariance(expanded.contiguous()))


@pytest.mark.parametrize("shape", [(5, 0), (0, 0), (4, 6, 0), (0, 3, 6), (2, 0, 3, 6)], ids=str)
def test_empty_keys(device, shape):
    result = covariance(torch.zeros(shape, device=device))
    assert result.shape == (*shape[:-2], shape[-1], shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_leave_out_as_it_is(device, dtype):
    out = symmetric(2, 5, device=device)
    before = out.clone()
    covariance(torch.zeros(2, 0, 5, dtype=dtype, device=device), out)
    assert same_bits(out, before)
    assert not covariance(torch.zeros(2, 0, 5, dtype=dtype, device=device)).any()


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    keys = FarTensor(1 << 50, (3, 34, 65), torch.bfloat16, (1 << 45, 1 << 30, 1 << 36))
    out = FarTensor(1 << 60, (3, 65, 65), torch.float32, (1 << 48, 1 << 30, 1))
    kernels.covariance(keys, out, kernels.FINE)
    rows = itertools.product(range(3), range(34), range(65))
    places = {out.address(*index) for index in itertools.product(range(3), range(65), range(65))}
    assert seen.stored == places
    assert seen.loaded - places == {keys.address(*index) for index in rows}


# Which configuration, and what is refused.


def test_few_features_take_small_tiles():
    assert kernels.choose_config(1024, torch.bfloat16, True) is kernels.SMALL
    assert kernels.choose_config(1025, torch.float16, True) is kernels.LARGE
    assert kernels.choose_config(1025, torch.bfloat16, False) is kernels.FINE
    assert kernels.choose_config(1025, torch.float32, True) is kernels.FINE


@pytest.mark.parametrize("which", ["keys", "out"])
def test_float64_is_refused(device, which):
    keys, out = torch.ones(2, 3, device=device), torch.zeros(3, 3, device=device)
    keys, out = (keys.double(), out) if which == "keys" else (keys, out.double())
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        covariance(keys, out)
    assert not out.any()
