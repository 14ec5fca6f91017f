"""routed_linear, the route decided: outputs, routes and gaps of whole prompts against float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from decode_inputs import ACTIVATIONS, DTYPES
from error_bounds import assert_within, gap_bound, output_bound
from gated_inputs import without_gate, without_ties
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, empty_storage, random_rows, same_bits, view_of
from query_inputs import CONFIGS, SMALL, Queries, queries
from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops import choose_route, routed_linear
from pyeditfast.reference.choose_route import MAIN
from pyeditfast_kernels import activation_gap as gap_kernels
from pyeditfast_kernels import memory_products as products
from pyeditfast_kernels import routed_linear as kernels

NEVER, ALWAYS = math.inf, -math.inf


def thresholds_of(inputs: Queries, *values: float) -> Tensor:
    return torch.tensor(values, device=inputs.x.device).expand(len(inputs.sides))


def launch(
    inputs: Queries, thresholds: Tensor, activation=None, gate_activation="silu", config=SMALL
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.routed_linear(
        inputs.x,
        inputs.main,
        inputs.sides,
        thresholds,
        inputs.bias,
        activation,
        "auto",
        inputs.mask,
        inputs.gate,
        gate_activation,
        config,
    )


def formula(inputs: Queries, gate_activation: str | None, **options) -> reference.Routed:
    """Return the formula in float64, for inputs that ``without_ties`` returned."""
    exact, _ = without_gate(inputs, gate_activation)
    thresholds = torch.zeros(len(inputs.sides))
    return reference.routed_linear(
        exact.x, exact.main, exact.sides, thresholds, bias=exact.bias, mask=exact.mask, **options
    )


def assert_outputs_equal_formula(output, inputs: Queries, route, gate_activation="silu") -> None:
    assert output.device == inputs.x.device and output.is_contiguous()
    assert output.dtype == inputs.x.dtype
    exact = formula(inputs, gate_activation, route=route.cpu()).output
    assert_within(output.cpu(), exact, output_bound(inputs, route, gate_activation))


def middle(gaps: Tensor) -> Tensor:
    """Return thresholds that about half of the gaps lie above."""
    return gaps.median(0).values


def assert_equals_formula(
    inputs: Queries, activation=None, gate_activation="silu", config=SMALL
) -> Tensor:
    """Check everything for thresholds that some queries pass; return the routes."""
    inputs = without_ties(inputs, gate_activation)
    exact = formula(inputs, gate_activation, activation=activation).gaps
    thresholds = middle(exact).float().to(inputs.x.device)
    output, route, gaps = launch(inputs, thresholds, activation, gate_activation, config)
    assert gaps.dtype == torch.float32 and route.dtype == torch.int64
    assert_within(gaps.cpu(), exact, gap_bound(inputs, activation, "auto", gate_activation))
    assert torch.equal(route, choose_route(gaps, thresholds))
    assert_outputs_equal_formula(output, inputs, route, gate_activation)
    return route


# The values.


@pytest.mark.parametrize(
    ("batch", "tokens", "d_in", "d_out", "sides"),
    [
        (1, 1, 1, 1, 1),
        (5, 1, 31, 33, 1),
        (4, 7, 64, 48, 3),
        (3, 9, 101, 29, 2),
        (2, 19, 37, 31, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, batch, tokens, d_in, d_out, sides):
    shape = (batch, tokens, d_in, d_out, sides, dtype, device)
    assert_equals_formula(queries(*shape), config=None)
    assert_equals_formula(queries(*shape, bias=True, masked=True, gated=True), "silu")


def test_several_blocks_of_outputs_are_moved(device):
    tokens, columns = (kernels.SELECT.sizes[f"BLOCK_{name}"] for name in ("TOKENS", "COLUMNS"))
    inputs = queries(3, tokens + 1, 5, columns + 7, 2, torch.bfloat16, device)
    route = assert_equals_formula(inputs, config=products.HOPPER[0])
    assert len(set(route.tolist())) > 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration(device, config):
    rows, columns, depth = (config.sizes[f"BLOCK_{name}"] for name in ("ROWS", "COLUMNS", "K"))
    gated = config in products.HOPPER_GATED
    for dtype in DTYPES if config in products.FINE else DTYPES[:1]:
        inputs = queries(
            3, rows // 3 + 1, depth + 5, columns + 3, 2, dtype, device, bias=True, gated=gated
        )
        assert len(set(assert_equals_formula(inputs, "silu", config=config).tolist())) > 1


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 30),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    sides=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    masked=st.booleans(),
    gated=st.booleans(),
)
def test_any_shape(
    device, batch, tokens, d_in, d_out, sides, dtype, activation, bias, masked, gated
):
    inputs = queries(
        batch, tokens, d_in, d_out, sides, dtype, device, bias=bias, masked=masked, gated=gated
    )
    assert_equals_formula(inputs, activation)


@pytest.mark.parametrize("gate_activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(device, dtype, gate_activation):
    inputs = queries(3, 5, 47, 29, 2, dtype, device, gated=True)
    assert_equals_formula(inputs, "silu", gate_activation)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_and_gated_inputs_are_rounded_to_nearest(device, dtype):
    # One product an output: float32 holds it exactly, and torch rounds it once.
    inputs = queries(3, 7, 1, 70, 1, dtype, device, gated=True)
    gated = (inputs.gate.relu().float() * inputs.x.float()).to(dtype).float()
    for threshold, memory in ((NEVER, inputs.main), (ALWAYS, inputs.sides[0])):
        thresholds = thresholds_of(inputs, threshold)
        output, _, _ = launch(inputs, thresholds, gate_activation="relu")
        assert torch.equal(output, (gated * memory.mT.float()).to(dtype))


def test_by_hand(device):
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[0.0, 0.0]]], device=device)
    main, side = (torch.tensor([row], device=device) for row in ([1.0, 1.0], [1.0, 3.0]))
    bias = torch.tensor([0.5], device=device)
    inputs = Queries(x, main, [side], bias)
    output, route, gaps = launch(inputs, thresholds_of(inputs, 5.0))
    assert gaps.tolist() == [[4.0], [8.0], [0.0]]
    assert route.tolist() == [MAIN, 0, MAIN]
    assert output.flatten().tolist() == [3.5, 15.5, 0.5]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.float16, 1e4),
        (torch.float16, 1e-2),
    ],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale):
    inputs = queries(2, 3, 37, 29, 2, dtype, device, gated=True)
    inputs = inputs.but(x=(inputs.x.double().clamp(-4, 4) * scale).to(dtype))
    for gate in (None, inputs.gate.clamp(-1, 1)):
        assert_equals_formula(inputs.but(gate=gate), "silu")


# The decision.


def test_infinite_thresholds_force_the_route(device):
    inputs = queries(3, 5, 37, 29, 3, torch.bfloat16, device)
    for number in (0, 1, 2, MAIN):
        thresholds = torch.full((3,), NEVER, device=device)
        if number != MAIN:
            thresholds[number] = ALWAYS
        output, route, _ = launch(inputs, thresholds)
        assert route.tolist() == [number] * 3
        assert_outputs_equal_formula(output, inputs, route)


def test_of_equal_gaps_the_first_is_chosen(device):
    inputs = queries(3, 5, 37, 29, 1, torch.bfloat16, device)
    inputs = inputs.but(sides=[inputs.main, *inputs.sides, *inputs.sides])
    _, route, gaps = launch(inputs, thresholds_of(inputs, 0.0))
    assert route.tolist() == [1, 1, 1] and same_bits(gaps[:, 1], gaps[:, 2])
    assert launch(inputs, thresholds_of(inputs, ALWAYS))[1].tolist() == [1, 1, 1]


def test_the_gap_has_to_be_above_its_threshold(device):
    inputs = queries(3, 5, 37, 29, 1, torch.float32, device)
    gaps = launch(inputs, thresholds_of(inputs, NEVER))[2]
    thresholds = gaps[1].clone()
    below = torch.nextafter(thresholds, torch.zeros_like(thresholds))
    assert launch(inputs, thresholds)[1][1] == MAIN
    assert launch(inputs, below)[1][1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gap_that_is_no_number_is_above_no_threshold(device, bad):
    inputs = queries(3, 5, 37, 29, 2, torch.bfloat16, device)
    expected, _, _ = launch(inputs, thresholds_of(inputs, ALWAYS))
    inputs.x[1, 3, 7] = bad
    output, route, gaps = launch(inputs, thresholds_of(inputs, ALWAYS))
    assert gaps[1].isnan().all() and route[1] == MAIN
    assert not output[1, 3].isfinite().any()
    assert same_bits(output[[0, 2]], expected[[0, 2]])


def test_gaps_are_those_of_activation_gap(device):
    inputs = queries(3, 11, 37, 29, 2, torch.float16, device, bias=True, masked=True)
    gaps = gap_kernels.activation_gap(
        inputs.x, inputs.main, inputs.sides, inputs.bias, "silu", "auto", inputs.mask, SMALL
    )
    assert same_bits(launch(inputs, thresholds_of(inputs, 1.0), "silu")[2], gaps)


def test_thresholds_of_any_stride(device):
    inputs = queries(3, 5, 37, 29, 2, torch.bfloat16, device)
    thresholds = torch.tensor([[NEVER, 0.0], [ALWAYS, 0.0]], device=device)[:, 0]
    assert launch(inputs, thresholds)[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_tokens_do_not_leak(device, bad):
    inputs = queries(3, 21, 37, 19, 2, torch.bfloat16, device, masked=True)
    thresholds = middle(launch(inputs, thresholds_of(inputs, NEVER), "silu")[2])
    output, route, gaps = launch(inputs, thresholds, "silu")
    x = torch.where(inputs.mask[..., None], inputs.x, bad)
    again, route_again, gaps_again = launch(inputs.but(x=x), thresholds, "silu")
    assert same_bits(gaps_again, gaps) and torch.equal(route_again, route)
    assert same_bits(again[inputs.mask], output[inputs.mask])


# Bits.


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.bfloat16, CONFIGS[0]), (torch.float16, SMALL), (torch.float32, None)],
)
def test_gives_the_same_bits_twice(device, dtype, config):
    inputs = queries(3, 11, 40, 37, 3, dtype, device, bias=True, masked=True, gated=True)
    first, second = (
        launch(inputs, thresholds_of(inputs, 0.5), "gelu", config=config) for _ in range(2)
    )
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_gives_the_same_bits_beside_any_others(device, dtype):
    inputs = queries(4, 7, 37, 45, 2, dtype, device)
    thresholds = thresholds_of(inputs, 0.0)
    expected = launch(inputs, thresholds, "silu")
    others = torch.arange(4, device=device) != 2
    inputs.x[others] = random_rows(3, 7, 37, seed=99, scale=50.0).to(device, dtype)
    inputs.x[0] = math.nan
    result = launch(inputs, thresholds, "silu")
    assert all(same_bits(new[2], old[2]) for new, old in zip(result, expected, strict=True))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_batch_in_parts_gives_the_same_bits(device, at_once, monkeypatch):
    inputs = queries(5, 7, 37, 21, 2, torch.float16, device, masked=True, gated=True)
    # Whole numbers, whose sums do not depend on where in a tile a row stands.
    main, *sides = ((8 * memory).round() for memory in (inputs.main, *inputs.sides))
    inputs = inputs.but(x=inputs.x.round(), gate=inputs.gate.sign(), main=main, sides=sides)
    thresholds = middle(launch(inputs, thresholds_of(inputs, NEVER), None, "relu")[2])
    whole = launch(inputs, thresholds, None, "relu")
    assert len(set(whole[1].tolist())) > 1
    monkeypatch.setattr(kernels, "MOST_BESIDE", at_once * 2 * 7 * 21 * 2)
    assert all(map(same_bits, launch(inputs, thresholds, None, "relu"), whole))


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_read_and_not_written(device, layout):
    inputs = queries(3, 7, 37, 29, 2, torch.bfloat16, device, bias=True, masked=True, gated=True)
    thresholds = middle(launch(inputs, thresholds_of(inputs, NEVER), "silu")[2])
    expected = launch(inputs, thresholds, "silu")
    views, storages = [], []
    for tensor in (inputs.x, inputs.gate, inputs.main, *inputs.sides):
        storages.append(empty_storage(tensor.shape, tensor.dtype, layout).to(device))
        views.append(view_of(storages[-1], layout).copy_(tensor))
    before = [storage.clone() for storage in storages]
    bias = torch.stack([inputs.bias, inputs.bias], 1)[:, 1]
    strided = Queries(views[0], views[2], views[3:], bias, inputs.mask, views[1])
    assert all(map(same_bits, launch(strided, thresholds, "silu"), expected))
    assert all(map(same_bits, storages, before))


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 7, 2), (2, 0, 5, 7, 2), (2, 3, 0, 7, 2), (2, 3, 5, 0, 2)], ids=str
)
def test_empty_inputs(device, shape):
    inputs = queries(*shape, torch.float32, device, bias=True)
    for threshold, number in ((0.0, MAIN), (-1.0, 0)):
        thresholds = thresholds_of(inputs, threshold)
        output, route, gaps = launch(inputs, thresholds, "silu", config=None)
        assert torch.equal(gaps, torch.zeros(shape[0], 2, device=device))
        assert route.tolist() == [number] * shape[0]
        assert torch.equal(output, inputs.bias.expand(*shape[:2], shape[3]))


def test_no_side_memory(device):
    inputs = queries(2, 5, 37, 29, 0, torch.bfloat16, device)
    output, route, gaps = launch(inputs, torch.empty(0, device=device))
    assert route.tolist() == [MAIN, MAIN] and gaps.shape == (2, 0)
    assert_outputs_equal_formula(output, inputs, route)


# The op.


def test_the_op_takes_the_kernel(device):
    inputs = queries(2, 5, 37, 29, 2, torch.float16, device, bias=True, masked=True, gated=True)
    thresholds = thresholds_of(inputs, 0.0)
    found = routed_linear(
        inputs.x,
        inputs.main,
        inputs.sides,
        thresholds,
        bias=inputs.bias,
        activation="silu",
        mask=inputs.mask,
        gate=inputs.gate,
    )
    assert all(map(same_bits, found, launch(inputs, thresholds, "silu", config=None)))


def test_float64_is_refused(device):
    inputs = queries(2, 5, 37, 29, 1, torch.float64, device)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        routed_linear(inputs.x, inputs.main, inputs.sides, thresholds_of(inputs, 0.0))
