"""routed_linear, the route given: the kernel for whole prompts against ``W_r x + b`` in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from decode_inputs import ACTIVATIONS, DTYPES, routes
from error_bounds import assert_within, output_bound
from far_memory import Addresses, FarTensor
from gated_inputs import without_gate, without_ties
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, empty_storage, random_rows, same_bits, view_of
from query_inputs import Queries, queries
from torch import Tensor
from truncation import truncate_dots

from pyeditfast import reference
from pyeditfast.ops import routed_linear
from pyeditfast_kernels import routed_product as kernels
from pyeditfast_kernels.launch import Config, interprets

CONFIGS = (
    kernels.WIDE,
    kernels.NARROW,
    kernels.FEW_ROWS,
    kernels.FEW_ROWS_GATED,
    kernels.FINE,
)

SMALL = Config(
    "small",
    {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32, "BLOCK_K": 32},
    num_warps=4,
    num_stages=2,
    why="small inputs have several tiles",
)


def launch(inputs: Queries, route: Tensor, gate_activation="silu", config=SMALL) -> Tensor:
    return kernels.routed_linear_with_route(
        inputs.x,
        inputs.main,
        inputs.sides,
        route,
        inputs.bias,
        inputs.gate,
        gate_activation,
        config,
    )


def assert_equals_formula(inputs, route, gate_activation="silu", config=SMALL) -> None:
    inputs = without_ties(inputs, gate_activation)
    result = launch(inputs, route, gate_activation, config)
    assert result.device == inputs.x.device and result.is_contiguous()
    assert result.dtype == inputs.x.dtype
    exact, _ = without_gate(inputs, gate_activation)
    thresholds = torch.zeros(len(inputs.sides))
    expected = reference.routed_linear(
        exact.x, exact.main, exact.sides, thresholds, bias=exact.bias, route=route.cpu()
    )
    assert_within(result.cpu(), expected.output, output_bound(inputs, route, gate_activation))


# The values.


@pytest.mark.parametrize(
    ("batch", "tokens", "d_in", "d_out", "sides"),
    [
        (1, 1, 1, 1, 1),
        (19, 1, 31, 33, 2),
        (5, 7, 64, 32, 3),
        (3, 23, 101, 29, 2),
        (11, 5, 37, 31, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, batch, tokens, d_in, d_out, sides):
    route = routes(batch, sides, device)
    shape = (batch, tokens, d_in, d_out, sides, dtype, device)
    assert_equals_formula(queries(*shape), route)
    assert_equals_formula(queries(*shape, bias=True, gated=True), route, config=None)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration(device, dtype, config):
    rows, columns, depth = (config.sizes[f"BLOCK_{name}"] for name in ("ROWS", "COLUMNS", "K"))
    if dtype == torch.float32 and config is not kernels.FINE:
        pytest.skip("it takes float32 in finer tiles")
    inputs = queries(
        4, rows // 4 + 3, depth + 5, columns + 3, 2, dtype, device, bias=True, gated=True
    )
    assert_equals_formula(inputs, routes(4, 2, device), config=config)


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 6),
    tokens=st.integers(1, 30),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    sides=st.integers(0, 8),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    gated=st.booleans(),
)
def test_any_shape(device, batch, tokens, d_in, d_out, sides, dtype, bias, gated):
    inputs = queries(batch, tokens, d_in, d_out, sides, dtype, device, bias=bias, gated=gated)
    assert_equals_formula(inputs, routes(batch, sides, device))


@pytest.mark.parametrize("gate_activation", ACTIVATIONS, ids=str)
def test_gates(device, gate_activation):
    inputs = queries(3, 5, 47, 29, 2, torch.float32, device, gated=True)
    assert_equals_formula(inputs, routes(3, 2, device), gate_activation)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_and_gated_inputs_are_rounded_to_nearest(device, dtype):
    # One product an output: float32 holds it exactly, and torch rounds it once.
    inputs = queries(3, 7, 1, 70, 2, dtype, device, gated=True)
    route = torch.tensor([1, -1, 0], device=device)
    gated = (inputs.gate.relu().float() * inputs.x.float()).to(dtype).float()
    memories = torch.stack([inputs.main, *inputs.sides])[route + 1]
    expected = (gated * memories.mT.float()).to(dtype)
    assert torch.equal(launch(inputs, route, "relu"), expected)


def test_by_hand(device):
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]], device=device)
    main, first, second = (
        torch.tensor([row], device=device) for row in ([1, 1.0], [1, 0.0], [0, 1.0])
    )
    bias = torch.tensor([0.5], device=device)
    route = torch.tensor([1, -1, 0], device=device)
    result = launch(Queries(x, main, [first, second], bias), route)
    assert result.flatten().tolist() == [2.5, 7.5, 5.5]


def test_float32_keeps_its_digits_where_tensor_cores_truncate(device, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    inputs = queries(2, 2, 3000, 13, 1, torch.float32, device)
    assert_equals_formula(inputs, routes(2, 1, device))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
        (torch.float16, 1e-3),
    ],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale):
    inputs = queries(3, 3, 37, 29, 2, dtype, device)
    inputs = inputs.but(x=(inputs.x.double().clamp(-4, 4) * scale).to(dtype))
    assert_equals_formula(inputs, routes(3, 2, device))


# The route.


def test_a_route_to_no_memory_is_one_to_the_main_memory(device):
    inputs = queries(4, 5, 37, 29, 2, torch.bfloat16, device)
    main = launch(inputs, torch.full((4,), -1, device=device))
    assert same_bits(launch(inputs, torch.tensor([2, -7, 9, 2**40], device=device)), main)


@pytest.mark.parametrize("number", [-1, 0, 2])
def test_nan_in_memories_that_are_not_in_use_does_not_leak(device, number):
    inputs = queries(3, 5, 37, 29, 3, torch.bfloat16, device, bias=True)
    route = torch.full((3,), number, device=device)
    expected = launch(inputs, route)
    for other, memory in enumerate((inputs.main, *inputs.sides), -1):
        if other != number:
            memory.fill_(math.nan)
    assert same_bits(launch(inputs, route), expected) and expected.isfinite().all()


def test_a_bad_number_stays_in_its_row(device):
    inputs = queries(3, 7, 37, 45, 2, torch.bfloat16, device)
    route = routes(3, 2, device)
    expected = launch(inputs, route)
    inputs.x[1, 3, 7] = math.nan
    result = launch(inputs, route)
    assert result[1, 3].isnan().all()
    expected[1, 3] = result[1, 3]
    assert same_bits(result, expected)


def test_routes_of_any_stride(device):
    inputs = queries(3, 7, 37, 45, 2, torch.bfloat16, device)
    route = torch.tensor([[0, 5], [-1, 5], [1, 5]], device=device)[:, 0]
    assert same_bits(launch(inputs, route), launch(inputs, route.contiguous()))


# Bits.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice_and_beside_any_others(device, dtype):
    inputs = queries(4, 7, 37, 45, 2, dtype, device, gated=True)
    route = torch.tensor([0, -1, 1, 0], device=device)
    expected = launch(inputs, route)
    assert same_bits(launch(inputs, route), expected)
    others = torch.arange(4, device=device) != 2
    inputs.x[others] = random_rows(3, 7, 37, seed=99, scale=50.0).to(device, dtype)
    route[others] = torch.tensor([-1, 1, 1], device=device)
    assert same_bits(launch(inputs, route)[2], expected[2])


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_read_and_not_written(device, layout):
    inputs = queries(3, 7, 37, 29, 2, torch.bfloat16, device, gated=True)
    route = routes(3, 2, device)
    views, storages = [], []
    for tensor in (inputs.x, inputs.gate, inputs.main, *inputs.sides):
        storages.append(empty_storage(tensor.shape, tensor.dtype, layout).to(device))
        views.append(view_of(storages[-1], layout).copy_(tensor))
    before = [storage.clone() for storage in storages]
    strided = Queries(views[0], views[2], views[3:], gate=views[1])
    assert same_bits(launch(strided, route), launch(inputs, route))
    assert all(map(same_bits, storages, before))


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 7, 2), (2, 0, 5, 7, 2), (2, 3, 0, 7, 2), (2, 3, 5, 0, 2)], ids=str
)
def test_empty_inputs(device, shape):
    inputs = queries(*shape, torch.float32, device, bias=True)
    output = launch(inputs, routes(shape[0], 2, device), config=None)
    assert torch.equal(output, inputs.bias.expand(*shape[:2], shape[3]))


def test_addresses_beyond_32_bits_and_of_the_memory_in_use_alone(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not. Loads give zeros: a route to
    # the first side memory.
    strides = ((1 << 30) + 64, (1 << 30) + 1, 1 << 27)
    x, gate = (FarTensor(number << 60, (3, 9, 18), torch.bfloat16, strides) for number in (1, 2))
    memories = [
        FarTensor(number << 55, (17, 18), torch.bfloat16, strides[1:]) for number in range(1, 10)
    ]
    route = torch.zeros(3, dtype=torch.int64)
    tiny = Config("tiny", dict.fromkeys(SMALL.sizes, 16), num_warps=4, num_stages=2, why="tiles")
    kernels.routed_linear_with_route(x, memories[0], memories[1:], route, None, gate, "silu", tiny)
    far = {address for address in seen.loaded if address >= 1 << 55}
    expected = {memories[1].address(*index) for index in itertools.product(range(17), range(18))}
    for tensor in (x, gate):
        expected |= {tensor.address(*index) for index in itertools.product(*map(range, x.shape))}
    assert far == expected


# Which configuration, and the op.


def test_few_rows_and_few_tiles_take_small_tiles():
    def config(rows, d_out, dtype=torch.bfloat16, is_aligned=True, gated=False):
        return kernels.choose_routed_config(rows, d_out, dtype, is_aligned, gated)

    assert config(64, 4096) is kernels.FEW_ROWS
    assert config(64, 4096, gated=True) is kernels.FEW_ROWS_GATED
    assert config(128, 4096) is kernels.NARROW and config(512, 4096) is kernels.WIDE
    assert config(512, 4096, torch.float32) is config(512, 4096, is_aligned=False) is kernels.FINE


def test_the_op_takes_the_kernel(device):
    inputs = queries(2, 5, 37, 29, 2, torch.float16, device, bias=True, gated=True)
    route, thresholds = routes(2, 2, device), torch.zeros(2, device=device)
    found = routed_linear(
        inputs.x,
        inputs.main,
        inputs.sides,
        thresholds,
        bias=inputs.bias,
        route=route,
        gate=inputs.gate,
    )
    assert found.gaps is None and found.route is route
    assert same_bits(found.output, launch(inputs, route, config=None))
