"""decode_gap: the kernel against ``‖ act(W' x + b) − act(W x + b) ‖₂`` in float64."""

from __future__ import annotations

import math

import pytest
import torch
from decode_inputs import ACTIVATIONS, DTYPES, EXTREMES, strided, tokens, weights_of
from error_bounds import assert_within, gap_bound
from ops.layouts import LAYOUTS, random_rows, same_bits
from query_inputs import Queries
from truncation import truncate_dots

from pyeditfast import reference
from pyeditfast_kernels import decode_configs as configs
from pyeditfast_kernels.launch import interprets
from pyeditfast_kernels.routed_decode import decode_gap


def assert_equals_formula(
    x, main, sides, bias=None, activation=None, config=None, splits=None
) -> None:
    result = decode_gap(x, main, sides, bias, activation, config, splits)
    assert result.device == x.device and result.dtype == torch.float32
    inputs = Queries(x, main, sides, bias)
    exact = inputs.to(torch.device("cpu")).to(torch.float64)
    gaps = reference.activation_gap(
        exact.x, exact.main, exact.sides, bias=exact.bias, activation=activation
    )
    assert_within(result.cpu(), gaps, gap_bound(inputs, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, activation):
    main, sides = weights_of(2, 37, 150, dtype, device)
    x = tokens(5, 150, dtype, device)
    bias = random_rows(37, seed=3).to(device, dtype)
    assert_equals_formula(x, main, sides, bias, activation, splits=2)


@pytest.mark.parametrize(
    ("batch", "memories", "d_out", "d_in"),
    [(1, 1, 1, 1), (16, 8, 64, 128), (17, 2, 31, 257), (2, 1, 2053, 17), (1, 2, 33, 1030)],
    ids=str,
)
def test_any_shape(device, batch, memories, d_out, d_in):
    main, sides = weights_of(memories, d_out, d_in, torch.bfloat16, device)
    x = tokens(batch, d_in, torch.bfloat16, device)
    assert_equals_formula(x, main, sides)
    assert_equals_formula(x, main, sides, None, "silu")


@pytest.mark.parametrize(
    ("dtype", "scale", "weight_scale"),
    [(dtype, *(math.sqrt(scale) for scale in scales)) for dtype, *scales in EXTREMES],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale, weight_scale):
    main, sides = weights_of(2, 57, 131, dtype, device, weight_scale)
    assert_equals_formula(tokens(5, 131, dtype, device, scale=scale), main, sides)


def test_a_memory_like_main_has_gap_zero(device):
    main, sides = weights_of(1, 70, 140, torch.bfloat16, device)
    gaps = decode_gap(
        tokens(3, 140, torch.bfloat16, device), main, [*sides, main.clone()], None, "gelu"
    ).cpu()
    assert torch.equal(gaps[:, 1], torch.zeros(3)) and bool((gaps[:, 0] > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_do_not_drift(dtype, monkeypatch):
    length = 2048 if dtype == torch.float32 else 8192
    if not interprets():
        pytest.skip("a GPU's tensor cores cut off by themselves")
    truncate_dots(monkeypatch)
    device = torch.device("cpu")
    side = random_rows(9, length, seed=1, dtype=dtype).abs()
    x = tokens(2, length, dtype, device).abs()
    assert_equals_formula(x, torch.zeros_like(side), [side], splits=1)


def test_a_bad_number_stays_in_its_memory_and_row(device):
    main, sides = weights_of(3, 37, 130, torch.float32, device)
    x = tokens(4, 130, torch.float32, device)
    expected = decode_gap(x, main, sides, None, "silu")
    sides[1][36, 129] = math.nan
    x[2, 0, 0] = math.nan
    result = decode_gap(x, main, sides, None, "silu")
    bad = torch.zeros(4, 3, dtype=torch.bool, device=device)
    bad[2], bad[:, 1] = True, True
    assert torch.equal(result.isnan(), bad)
    assert same_bits(result[~bad], expected[~bad])


def test_no_memory(device):
    main, _ = weights_of(0, 7, 5, torch.float32, device)
    gaps = decode_gap(tokens(3, 5, torch.float32, device), main, [], None, None)
    assert gaps.shape == (3, 0) and gaps.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_read_and_not_written(device, layout):
    main, sides = weights_of(2, 29, 83, torch.bfloat16, device)
    x = tokens(5, 83, torch.bfloat16, device)
    bias = random_rows(29, seed=3).to(device, torch.bfloat16)
    (x_view, main_view, *side_views), storages = strided([x, main, *sides], layout)
    far_bias = torch.full((29, 3), math.nan, dtype=torch.bfloat16, device=device)
    far_bias[:, 1] = bias
    before = [storage.clone() for storage in storages]
    expected = decode_gap(x, main, sides, bias, "silu", configs.ODD, 2)
    gaps = decode_gap(x_view, main_view, side_views, far_bias[:, 1], "silu", configs.ODD, 2)
    assert same_bits(gaps, expected)
    assert all(map(same_bits, storages, before))


@pytest.mark.parametrize("sizes", [(0, 7, 5), (3, 0, 5), (3, 7, 0)], ids=str)
def test_nothing_to_add(device, sizes):
    batch, d_out, d_in = sizes
    main, sides = weights_of(2, d_out, d_in, torch.float16, device)
    bias = torch.ones(d_out, dtype=torch.float16, device=device)
    gaps = decode_gap(tokens(batch, d_in, torch.float16, device), main, sides, bias, "silu")
    assert torch.equal(gaps.cpu(), torch.zeros(batch, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(device, dtype):
    main, sides = weights_of(2, 33, 301, dtype, device)
    x = tokens(16, 301, dtype, device)
    first, second = (decode_gap(x, main, sides, None, "silu", splits=2) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_whatever_the_others_are(device, dtype):
    main, sides = weights_of(2, 33, 150, dtype, device)
    x = tokens(18, 150, dtype, device)
    whole = decode_gap(x, main, sides, None, None, splits=2)
    for part in (slice(3, 4), slice(15, 18)):
        assert same_bits(decode_gap(x[part], main, sides, None, None, splits=2), whole[part])
