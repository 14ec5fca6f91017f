"""routed_linear: every query answered by the memory that its gap chooses."""

from __future__ import annotations

import math

import pytest
import torch
from layouts import DTYPES, random_rows, same_bits
from memories import (
    ACTIVATIONS,
    PLAIN,
    assert_gaps_as_accurate,
    exact_gaps,
    exact_output,
    exact_route,
    far_thresholds,
    gated,
    plain_output,
    random_mask,
    routing_case,
)
from tolerances import UNIT_ROUNDOFF, assert_as_accurate, floor, largest_error

from pyeditfast import backend
from pyeditfast.ops import Routed, activation_gap, choose_route, routed_linear

FORMS = ("auto", "torch", "reference")


@pytest.fixture(params=FORMS)
def form(request):
    """Run the test once with every form that needs no GPU; auto takes C++ for the gaps."""
    with backend(request.param):
        yield request.param


# batch, tokens, d_in, d_out, memories
SHAPES = [
    (2, 1, 1, 1, 1),
    (5, 1, 31, 17, 1),
    (6, 7, 13, 5, 3),
    (7, 11, 53, 29, 2),
    (3, 101, 7, 3, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_torch(form, dtype, shape):
    x, main, sides, bias = routing_case(*shape, dtype)
    gaps = exact_gaps(x, main, sides, bias=bias, activation="silu")
    thresholds = far_thresholds(gaps)
    expected = exact_route(gaps.tolist(), thresholds.tolist())
    routed = routed_linear(x, main, sides, thresholds, bias=bias, activation="silu")
    assert isinstance(routed, Routed)
    assert same_bits(routed.route, torch.tensor(expected))
    assert_gaps_as_accurate(routed.gaps, x, main, sides, bias=bias, activation="silu")
    assert_as_accurate(
        routed.output,
        plain_output(x, main, sides, expected, bias),
        exact_output(x.double(), main, sides, expected, bias),
        shape[2],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaps_and_route_are_those_of_their_ops(form, dtype):
    x, main, sides, bias = routing_case(7, 11, 53, 29, 3, dtype)
    mask = random_mask(7, 11)
    options = {"bias": bias, "activation": "gelu", "reduction": "max", "mask": mask}
    gaps = activation_gap(x, main, sides, **options)
    thresholds = gaps.float().median(0).values
    routed = routed_linear(x, main, sides, thresholds, **options)
    assert same_bits(routed.gaps, gaps)
    assert same_bits(routed.route, choose_route(gaps, thresholds))


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_reductions(form, activation, reduction):
    x, main, sides, bias = routing_case(4, 103, 7, 5, 2, torch.float64)
    mask = random_mask(4, 103)
    mask[0] = True
    options = {"bias": bias, "activation": activation, "reduction": reduction, "mask": mask}
    gaps = exact_gaps(x, main, sides, **options)
    thresholds = far_thresholds(gaps)
    expected = exact_route(gaps.tolist(), thresholds.tolist())
    routed = routed_linear(x, main, sides, thresholds, **options)
    assert largest_error(routed.gaps, gaps) <= floor(torch.float64, 103)
    assert routed.route.tolist() == expected
    exact = exact_output(x, main, sides, expected, bias)
    assert largest_error(routed.output, exact) <= floor(torch.float64, 7)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("gate_activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(form, dtype, gate_activation, given):
    x, main, sides, bias = routing_case(5, 3, 29, 11, 2, dtype)
    gate = random_rows(5, 3, 29, dtype=dtype, seed=8)
    inputs = gated(x, gate, gate_activation)
    gaps = exact_gaps(inputs, main, sides, bias=bias)
    thresholds = far_thresholds(gaps)
    expected = exact_route(gaps.tolist(), thresholds.tolist())
    route = torch.tensor(expected) if given else None
    options = {"bias": bias, "gate": gate, "gate_activation": gate_activation, "route": route}
    routed = routed_linear(x, main, sides, thresholds, **options)
    assert routed.route.tolist() == expected
    assert_as_accurate(
        routed.output,
        plain_output(PLAIN[gate_activation](gate) * x, main, sides, expected, bias),
        exact_output(inputs, main, sides, expected, bias),
        29,
    )
    if not given:
        # Each product is rounded to 16 bits, then each output.
        wide = routed.gaps.dtype
        granted = floor(wide, 29) + (2.0 * UNIT_ROUNDOFF[dtype] if dtype != wide else 0.0)
        assert largest_error(routed.gaps, gaps) <= granted


def test_the_gate_is_silu_unless_named():
    x, main, sides, _ = routing_case(3, 2, 7, 5, 1, torch.float64)
    gate, thresholds = random_rows(3, 2, 7, dtype=torch.float64, seed=8), torch.zeros(1)
    silu = routed_linear(x, main, sides, thresholds, gate=gate, gate_activation="silu")
    assert same_bits(routed_linear(x, main, sides, thresholds, gate=gate).output, silu.output)


# Routes that are given.

ROUTES = [
    [-1, 0, 1, 2, -1, 2, 0],
    [2, 2, 0, 2, 0, 2, 2],
    [-1] * 7,
    [0] * 7,
    [2] * 7,
    [-1, -1, -1, 1, -1, -1, -1],
]


@pytest.mark.parametrize(("tokens", "biased"), [(1, True), (5, False)])
@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_route(form, dtype, route, biased, tokens):
    x, main, sides, bias = routing_case(7, tokens, 31, 13, 3, dtype)
    bias = bias if biased else None
    # A decided route would be another one, and nothing is decided.
    given = torch.tensor(route)
    routed = routed_linear(x, main, sides, torch.full((3,), -math.inf), bias=bias, route=given)
    assert routed.gaps is None
    assert same_bits(routed.route, torch.tensor(route))
    assert_as_accurate(
        routed.output,
        plain_output(x, main, sides, route, bias),
        exact_output(x.double(), main, sides, route, bias),
        31,
    )


@pytest.mark.parametrize("route", [[-1, -1, -1], [0, -1, 0], [0, 0, 0]], ids=str)
def test_memories_that_answer_no_query_are_not_read(form, route):
    x, main, sides, bias = routing_case(3, 5, 7, 11, 2, torch.float32)
    sides[1].fill_(math.nan)
    if -1 not in route:
        main.fill_(math.nan)
    routed = routed_linear(x, main, sides, torch.zeros(2), bias=bias, route=torch.tensor(route))
    exact = exact_output(x.double(), main, sides, route, bias)
    assert largest_error(routed.output, exact) <= floor(torch.float32, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_route_that_was_decided_gives_the_same_output(form, dtype):
    x, main, sides, bias = routing_case(5, 7, 53, 29, 3, dtype)
    thresholds = far_thresholds(exact_gaps(x, main, sides))
    decided = routed_linear(x, main, sides, thresholds, bias=bias)
    kept = routed_linear(x, main, sides, thresholds, bias=bias, route=decided.route)
    error = largest_error(kept.output, decided.output.double())
    assert error <= 2.0 * floor(dtype, 53)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_computes_16_bit_inputs_in_float32(dtype):
    x, main, sides, bias = routing_case(4, 7, 29, 11, 2, dtype)
    gaps = exact_gaps(x, main, sides, bias=bias)
    thresholds = far_thresholds(gaps)
    with backend("reference"):
        routed = routed_linear(x, main, sides, thresholds, bias=bias)
    assert routed.gaps.dtype == torch.float32 and routed.output.dtype == dtype
    assert largest_error(routed.gaps, gaps) <= 2 * floor(torch.float32, 29)
    exact = exact_output(x.double(), main, sides, routed.route.tolist(), bias)
    assert largest_error(routed.output, exact) <= UNIT_ROUNDOFF[dtype] + floor(torch.float32, 29)


@pytest.mark.parametrize("route", ROUTES[:4], ids=str)
def test_under_autocast_it_answers_as_a_linear_module_does(route):
    x, main, sides, bias = routing_case(7, 3, 31, 13, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_output(x, main, sides, route, bias)
        routed = routed_linear(x, main, sides, torch.zeros(3), bias=bias, route=torch.tensor(route))
        decided = routed_linear(x, main, sides, torch.zeros(3), bias=bias)
    assert expected.dtype == torch.bfloat16
    exact = exact_output(x.double(), main, sides, route, bias)
    assert_as_accurate(routed.output, expected, exact, 31)
    assert decided.output.dtype == torch.bfloat16 and decided.gaps.dtype == torch.float32


# Gradients.


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
def test_gradients_are_those_of_the_memory_that_answers(form, with_gate, given):
    x, main, sides, bias = routing_case(5, 3, 13, 7, 3, torch.float64)
    gate = random_rows(5, 3, 13, dtype=torch.float64, seed=8) if with_gate else None
    gaps = exact_gaps(gated(x, gate, "silu"), main, sides, bias=bias)
    # The second memory answers no query.
    thresholds = far_thresholds(gaps[:, [0, 2]])
    thresholds = torch.tensor([thresholds[0], math.inf, thresholds[1]])
    route = exact_route(gaps.tolist(), thresholds.tolist())
    assert set(route) == {-1, 0, 2}
    leaves = [x, main, *sides, bias] + ([gate] if with_gate else [])
    for leaf in leaves:
        leaf.requires_grad_()
    weights = random_rows(5, 3, 7, dtype=torch.float64, seed=6)
    routed = routed_linear(
        *(x, main, sides, thresholds),
        bias=bias,
        gate=gate,
        route=torch.tensor(route) if given else None,
    )
    assert routed.route.tolist() == route
    result = torch.autograd.grad((weights * routed.output).sum(), leaves, allow_unused=True)
    inputs = x if gate is None else gate * torch.sigmoid(gate) * x
    chosen = torch.stack([main if number < 0 else sides[number] for number in route])
    output = torch.einsum("bti,boi->bto", inputs, chosen) + bias
    expected = torch.autograd.grad((weights * output).sum(), leaves, allow_unused=True)
    assert expected[3] is None
    for leaf, gradient, wanted in zip(leaves, result, expected, strict=True):
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        assert (gradient - wanted).abs().max() <= 1e-13 * (1 + wanted.abs().max())
    assert all(wanted.abs().max() > 0.1 for wanted in expected if wanted is not None)


def test_gaps_have_gradients_too(form):
    x, main, sides, bias = routing_case(3, 5, 13, 7, 2, torch.float64)
    sides[0].requires_grad_()
    options = {"bias": bias, "activation": "silu"}
    gaps = routed_linear(x, main, sides, torch.zeros(2), **options).gaps
    (gradient,) = torch.autograd.grad(gaps.sum(), sides[0])
    expected = activation_gap(x, main, sides, **options)
    (wanted,) = torch.autograd.grad(expected.sum(), sides[0])
    assert wanted.abs().max() > 0.1
    assert largest_error(gradient, wanted) <= floor(torch.float64, 13)
