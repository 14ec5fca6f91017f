"""routed_decode: the kernels against ``W_r x + b`` in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from decode_inputs import ACTIVATIONS, DTYPES, EXTREMES, routes, strided, tokens, weights_of
from error_bounds import assert_within, output_bound
from far_memory import Addresses, FarTensor
from gated_inputs import without_gate, without_ties
from ops.layouts import LAYOUTS, random_rows, same_bits
from query_inputs import Queries

from pyeditfast import reference
from pyeditfast.ops import routed_linear
from pyeditfast_kernels import decode_configs as configs
from pyeditfast_kernels import routed_decode as kernels
from pyeditfast_kernels.launch import interprets
from pyeditfast_kernels.routed_decode import routed_decode

CONFIGS = (configs.WIDE, configs.TALL, configs.GATED, configs.FINE, configs.ODD)


def assert_equals_formula(
    x, main, sides, route, bias=None, gate=None, gate_activation=None, config=None, splits=None
) -> None:
    inputs = without_ties(Queries(x, main, sides, bias, gate=gate), gate_activation)
    result = routed_decode(
        inputs.x, main, sides, route, bias, gate, gate_activation, config, splits
    )
    assert result.device == x.device and result.is_contiguous()
    assert result.dtype == x.dtype
    exact, _ = without_gate(inputs, gate_activation)
    expected = reference.routed_linear(
        exact.x,
        exact.main,
        exact.sides,
        torch.zeros(len(sides)),
        bias=exact.bias,
        route=route.cpu(),
    )
    assert_within(result.cpu(), expected.output, output_bound(inputs, route, gate_activation))


# The values.


@pytest.mark.parametrize(
    ("batch", "memories", "d_out", "d_in"),
    [
        (1, 1, 1, 1),
        (1, 2, 67, 131),
        (2, 1, 64, 128),
        (5, 3, 130, 37),
        (16, 2, 33, 1030),
        (17, 2, 31, 257),
        (35, 4, 31, 65),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, batch, memories, d_out, d_in):
    main, sides = weights_of(memories, d_out, d_in, dtype, device)
    x, route = tokens(batch, d_in, dtype, device), routes(batch, memories, device)
    assert_equals_formula(x, main, sides, route)
    bias = random_rows(d_out, seed=3).to(device, dtype)
    gate = tokens(batch, d_in, dtype, device, seed=8)
    assert_equals_formula(x, main, sides, route, bias, gate, "silu")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_and_split(device, dtype, config, splits):
    main, sides = weights_of(2, 131, 150, dtype, device)
    x, route = tokens(6, 150, dtype, device), routes(6, 2, device)
    bias = random_rows(131, seed=3).to(device, dtype)
    assert_equals_formula(x, main, sides, route, bias, config=config, splits=splits)


@pytest.mark.parametrize("gate_activation", ACTIVATIONS)
def test_gates(device, gate_activation):
    main, sides = weights_of(1, 31, 67, torch.float32, device)
    x, gate = (tokens(3, 67, torch.float32, device, seed=seed) for seed in (7, 8))
    assert_equals_formula(x, main, sides, routes(3, 1, device), None, gate, gate_activation)


def test_by_hand(device):
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]], device=device)
    main, first, second = (
        torch.tensor([row], device=device) for row in ([1, 1.0], [1, 0.0], [0, 1.0])
    )
    route = torch.tensor([1, -1, 0], device=device)
    bias = torch.tensor([0.5], device=device)
    result = routed_decode(x, main, [first, second], route, bias, None, None)
    assert torch.equal(result.cpu(), torch.tensor([[[2.5]], [[7.5]], [[5.5]]]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_and_gated_inputs_are_rounded_to_nearest(device, dtype):
    # One product a result: float32 holds it exactly, and torch rounds it once.
    main, sides = weights_of(1, 70, 1, dtype, device)
    x, gate = (tokens(16, 1, dtype, device, seed=seed) for seed in (7, 8))
    route = routes(16, 1, device)
    result = routed_decode(x, main, sides, route, None, gate, "relu")
    rounded = (gate.relu().float() * x.float()).to(dtype).float()
    memories = torch.stack([main, *sides])[route + 1]
    assert torch.equal(result, (rounded * memories.mT.float()).to(dtype))


@pytest.mark.parametrize("number", [-1, 0, 7])
def test_all_rows_of_one_memory(device, number):
    main, sides = weights_of(8, 70, 140, torch.bfloat16, device)
    route = torch.full((16,), number, device=device)
    assert_equals_formula(tokens(16, 140, torch.bfloat16, device), main, sides, route)


def test_each_row_of_another_memory(device):
    main, sides = weights_of(8, 70, 140, torch.bfloat16, device)
    route = torch.tensor([7, 2, -1, 0, 5, 1, 6, 3, 4], device=device)
    assert_equals_formula(tokens(9, 140, torch.bfloat16, device), main, sides, route)


def test_no_side_memory(device):
    main, _ = weights_of(0, 70, 140, torch.float16, device)
    route = torch.full((3,), -1, device=device)
    assert_equals_formula(tokens(3, 140, torch.float16, device), main, [], route)


def test_a_route_to_no_memory_is_one_to_the_main_memory(device):
    main, sides = weights_of(2, 7, 19, torch.float32, device)
    x = tokens(4, 19, torch.float32, device)
    odd = torch.tensor([2, -2, 2**40, -(2**40)], device=device)
    result = routed_decode(x, main, sides, odd, None, None, None)
    plain = routed_decode(x, main, sides, torch.full_like(odd, -1), None, None, None)
    assert same_bits(result, plain)


@pytest.mark.parametrize(("dtype", "scale", "weight_scale"), EXTREMES, ids=str)
def test_extreme_magnitudes(device, dtype, scale, weight_scale):
    main, sides = weights_of(2, 57, 131, dtype, device, weight_scale)
    x = tokens(5, 131, dtype, device, scale=scale)
    assert_equals_formula(x, main, sides, routes(5, 2, device), splits=2)


# What must not leak.


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_in_a_memory_that_no_row_uses(device, splits):
    main, sides = weights_of(3, 37, 130, torch.bfloat16, device)
    x = tokens(4, 130, torch.bfloat16, device)
    route = torch.tensor([1, 1, -1, 1], device=device)
    expected = routed_decode(x, main, sides, route, None, None, None, splits=splits)
    sides[0].fill_(math.nan)
    sides[2].fill_(math.inf)
    result = routed_decode(x, main, sides, route, None, None, None, splits=splits)
    assert same_bits(result, expected) and not result.isnan().any()


@pytest.mark.parametrize("row", [0, 2, 3])
@pytest.mark.parametrize("where", ["x", "gate"])
def test_a_bad_number_stays_in_its_row(device, row, where):
    main, sides = weights_of(2, 37, 130, torch.float32, device)
    x, gate = (tokens(4, 130, torch.float32, device, seed=seed) for seed in (7, 8))
    route = torch.tensor([1, 1, -1, 1], device=device)
    others = [other for other in range(4) if other != row]
    expected = routed_decode(x, main, sides, route, None, gate, "silu")
    (x if where == "x" else gate)[row, 0, 129] = math.nan
    result = routed_decode(x, main, sides, route, None, gate, "silu")
    assert result[row].isnan().all()
    assert same_bits(result[others], expected[others])


def test_only_the_memory_in_use_is_read_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not. All that is loaded is zero, so
    # the route of every row is the first side memory.
    x = FarTensor(1 << 50, (3, 1, 70), torch.bfloat16, (1 << 36, 1, 1 << 29))
    gate = FarTensor(1 << 51, (3, 1, 70), torch.bfloat16, (1 << 36, 1, 1 << 28))
    route = FarTensor(1 << 52, (3,), torch.int64, (1 << 30,))
    shape, strides = (66, 70), (1 << 30, 1 << 37)
    main, first, second = (
        FarTensor(base << 50, shape, torch.bfloat16, strides) for base in (8, 16, 32)
    )
    routed_decode(x, main, [first, second], route, None, gate, "relu", configs.ODD, 1)
    columns = range(70)
    expected = {
        tensor.address(row, 0, k) for tensor in (x, gate) for row in range(3) for k in columns
    }
    expected |= {route.address(row) for row in range(3)}
    expected |= {first.address(*index) for index in itertools.product(range(66), columns)}
    assert seen.loaded == expected


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [1, 2])
def test_strided_inputs_are_read_and_not_written(device, layout, splits):
    main, sides = weights_of(2, 29, 83, torch.bfloat16, device)
    x, gate = (tokens(5, 83, torch.bfloat16, device, seed=seed) for seed in (7, 8))
    bias = random_rows(29, seed=3).to(device, torch.bfloat16)
    route = routes(5, 2, device)
    (x_view, gate_view, main_view, *side_views), storages = strided([x, gate, main, *sides], layout)
    far_route = torch.full((10,), -7, device=device)
    far_route[::2] = route
    far_bias = torch.full((29, 3), math.nan, dtype=torch.bfloat16, device=device)
    far_bias[:, 1] = bias
    before = [storage.clone() for storage in storages]
    how = ("silu", configs.ODD, splits)
    expected = routed_decode(x, main, sides, route, bias, gate, *how)
    result = routed_decode(
        x_view, main_view, side_views, far_route[::2], far_bias[:, 1], gate_view, *how
    )
    assert same_bits(result, expected)
    assert all(map(same_bits, storages, before))


def test_memories_of_different_layouts(device):
    main, sides = weights_of(2, 64, 128, torch.bfloat16, device)
    x, route = tokens(5, 128, torch.bfloat16, device), routes(5, 2, device)
    expected = routed_decode(x, main, sides, route, None, None, None, configs.ODD)
    mixed = [sides[0].mT.contiguous().mT, sides[1]]
    assert configs.choose_config([x], [main, *mixed]) is configs.ODD
    assert same_bits(routed_decode(x, main, mixed, route, None, None, None), expected)


def test_one_row_for_all(device):
    main, sides = weights_of(2, 31, 67, torch.float32, device)
    x, route = tokens(1, 67, torch.float32, device), routes(3, 2, device)
    expected = routed_decode(x.repeat(3, 1, 1), main, sides, route, None, None, None)
    assert same_bits(
        routed_decode(x.expand(3, 1, 67), main, sides, route, None, None, None), expected
    )


@pytest.mark.parametrize("sizes", [(0, 7, 5), (3, 0, 5), (0, 0, 0)], ids=str)
def test_empty_outputs(device, sizes):
    batch, d_out, d_in = sizes
    main, sides = weights_of(2, d_out, d_in, torch.float16, device)
    x = tokens(batch, d_in, torch.float16, device)
    result = routed_decode(x, main, sides, routes(batch, 2, device), None, None, None)
    assert result.shape == (batch, 1, d_out) and result.dtype == torch.float16


def test_no_inputs_leave_the_bias(device):
    main, sides = weights_of(1, 7, 0, torch.float32, device)
    x, bias = tokens(2, 0, torch.float32, device), torch.arange(7.0, device=device)
    result = routed_decode(x, main, sides, routes(2, 1, device), bias, None, None)
    assert torch.equal(result.cpu(), torch.arange(7.0).expand(2, 1, 7))


# Repeatability.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(device, dtype):
    main, sides = weights_of(2, 33, 301, dtype, device)
    x, route = tokens(16, 301, dtype, device), routes(16, 2, device)
    first, second = (
        routed_decode(x, main, sides, route, None, None, None, splits=2) for _ in range(2)
    )
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_whatever_the_others_are(device, dtype):
    main, sides = weights_of(2, 33, 301, dtype, device)
    x, route = tokens(18, 301, dtype, device), routes(18, 2, device)
    whole = routed_decode(x, main, sides, route, None, None, None, splits=2)
    for part in (slice(3, 4), slice(15, 18)):
        alone = routed_decode(x[part], main, sides, route[part], None, None, None, splits=2)
        assert same_bits(alone, whole[part])


# Which configuration, and who calls.


def test_configurations(device):
    def chosen(dtype, d_out, d_in, layout="Linear", skew=0, inputs=1):
        x = torch.zeros(2, 1, d_in, dtype=dtype)
        main = torch.zeros(d_out, d_in + skew, dtype=dtype)[:, skew:]
        main = main if layout == "Linear" else main.mT.contiguous().mT
        side = main.clone(memory_format=torch.preserve_format)
        return configs.choose_config([x] * inputs, [main, side])

    assert chosen(torch.bfloat16, 64, 128) is configs.WIDE
    assert chosen(torch.float16, 64, 128, "Conv1D") is configs.TALL
    assert chosen(torch.float16, 64, 128, inputs=2) is configs.GATED
    assert chosen(torch.float32, 64, 128) is configs.FINE
    assert chosen(torch.float32, 64, 128, inputs=2) is configs.FINE
    assert chosen(torch.bfloat16, 64, 127) is configs.ODD
    assert chosen(torch.bfloat16, 64, 128, skew=1) is configs.ODD


def test_few_tiles_are_split_until_they_fill_the_chip():
    at_once = configs.PROGRAMS_AT_ONCE
    assert configs.choose_splits(64, 14336) == 4
    assert configs.choose_splits(1, configs.FEWEST_COLUMNS) == 1
    assert configs.choose_splits(at_once, 14336) == 1
    for tiles in range(1, 2 * at_once, 13):
        for d_in in (0, 64, 1024, 4096, 14336, 100_000):
            splits = configs.choose_splits(tiles, d_in)
            assert 1 <= splits <= configs.MOST_SPLITS
            assert splits == 1 or d_in // splits >= configs.FEWEST_COLUMNS


@pytest.mark.parametrize("batch", [1, 16])
def test_the_op_decodes_with_these_kernels(device, batch, monkeypatch):
    calls = []
    plain = kernels.routed_decode
    monkeypatch.setattr(kernels, "routed_decode", lambda *args: calls.append(1) or plain(*args))
    main, sides = weights_of(2, 31, 67, torch.float32, device)
    x, route = tokens(batch, 67, torch.float32, device), routes(batch, 2, device)
    routed = routed_linear(x, main, sides, torch.zeros(2, device=device), route=route)
    assert calls == [1] and routed.gaps is None and same_bits(routed.route, route)
    assert same_bits(routed.output, plain(x, main, sides, route, None, None, None))
