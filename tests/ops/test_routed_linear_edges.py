"""routed_linear: views, empty and masked queries, NaN, thresholds out of reach, neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from memories import (
    exact_gaps,
    exact_output,
    exact_route,
    far_thresholds,
    gated,
    growing_queries,
    plain_output,
    random_mask,
    random_memories,
    routing_case,
)
from tolerances import assert_as_accurate, floor, largest_error
from torch.nn import functional

from pyeditfast import backend
from pyeditfast.ops import routed_linear

FORMS = ("auto", "torch", "reference")

NEVER, ALWAYS = math.inf, -math.inf


@pytest.fixture(params=FORMS)
def form(request):
    """Run the test once with every form that needs no GPU; auto takes C++ for the gaps."""
    with backend(request.param):
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_strided_inputs_are_read_and_left_alone(form, given, dtype, layout):
    memory_layout = "transposed" if layout == "rows first" else layout
    x, main, sides, bias = routing_case(4, 5, 23, 7, 2, dtype)
    gate = random_rows(4, 5, 23, dtype=dtype, seed=8)
    plain = [x, gate, main, *sides, bias[:, None]]
    layouts = [layout] * 2 + [memory_layout] * 4
    laid_out = [lay_out(*pair) for pair in zip(plain, layouts, strict=True)]
    (x_view, gate_view, main_view, *side_views, bias_view), storages = zip(*laid_out, strict=True)
    mask = torch.stack([random_mask(4, 5), ~random_mask(4, 5)], -1)[..., 0]
    inputs = gated(x, gate, "silu")
    gaps = exact_gaps(inputs, main, sides, bias=bias, mask=mask)
    thresholds = far_thresholds(gaps).repeat_interleave(2)[::2]
    expected = exact_route(gaps.tolist(), thresholds.tolist())
    route = torch.tensor(expected).repeat_interleave(2)[::2]
    watched = [*storages, mask, thresholds, route]
    before = [tensor.clone() for tensor in watched]
    routed = routed_linear(
        x_view,
        main_view,
        side_views,
        thresholds,
        bias=bias_view[:, 0],
        mask=mask,
        gate=gate_view,
        route=route if given else None,
    )
    assert routed.route.tolist() == expected
    assert_as_accurate(
        routed.output,
        plain_output(functional.silu(gate) * x, main, sides, expected, bias),
        exact_output(inputs, main, sides, expected, bias),
        23,
    )
    assert all(same_bits(t, copy) for t, copy in zip(watched, before, strict=True))
    routed.output.fill_(math.nan)
    assert all(same_bits(t, copy) for t, copy in zip(watched, before, strict=True))


def test_expanded_queries(form):
    row = growing_queries(1, 1, 17)
    main, sides = random_memories(5, 17, 2)
    route = [1, -1, 0, 1]
    x, given = row.expand(4, 3, 17), torch.tensor(route)
    exact = exact_output(x.double(), main, sides, route, None)
    routed = routed_linear(x, main, sides, torch.zeros(2), route=given)
    assert largest_error(routed.output, exact) <= floor(torch.float32, 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "memories"), [(0, 5, 2), (3, 0, 2), (0, 0, 2)])
def test_empty_queries(form, batch, tokens, memories, given, dtype):
    main, sides = random_memories(3, 7, memories, dtype)
    x, route = growing_queries(batch, tokens, 7, dtype), torch.full((batch,), -1)
    routed = routed_linear(x, main, sides, torch.zeros(2), route=route if given else None)
    assert same_bits(routed.output, torch.zeros(batch, tokens, 3, dtype=dtype))
    assert same_bits(routed.route, route)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert given or same_bits(routed.gaps, torch.zeros(batch, memories, dtype=wide))


@pytest.mark.parametrize("given", [False, True])
def test_without_side_memories_the_main_one_answers(form, given):
    x, main, sides, bias = routing_case(3, 5, 7, 11, 0, torch.float64)
    route = torch.full((3,), -1) if given else None
    routed = routed_linear(x, main, sides, torch.zeros(0), bias=bias, route=route)
    exact = exact_output(x, main, sides, [-1] * 3, bias)
    assert largest_error(routed.output, exact) <= floor(torch.float64, 7)
    assert routed.route.tolist() == [-1] * 3
    assert given or routed.gaps.shape == (3, 0)


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ([NEVER, NEVER], -1),
        ([ALWAYS, ALWAYS], 1),
        ([ALWAYS, NEVER], 0),
        ([math.nan, math.nan], -1),
        ([0.0, math.nan], 0),
    ],
)
def test_thresholds_out_of_reach(form, thresholds, expected):
    x, main, sides, _ = routing_case(3, 5, 7, 11, 2, torch.float32)
    routed = routed_linear(x, main, sides, torch.tensor(thresholds))
    assert routed.route.tolist() == [expected] * 3
    exact = exact_output(x.double(), main, sides, [expected] * 3, None)
    assert largest_error(routed.output, exact) <= floor(torch.float32, 7)


def test_of_equal_memories_the_first_answers(form):
    x, main, (side, other), _ = routing_case(3, 5, 7, 11, 2, torch.float32)
    route = routed_linear(x, main, [main, side, side.clone()], torch.zeros(3)).route
    assert route.tolist() == [1, 1, 1]
    # The second is the same, and its threshold is the lower one.
    thresholds = torch.tensor([NEVER, 0.0, 0.0])
    assert routed_linear(x, main, [other, side, side.clone()], thresholds).route.tolist() == [1] * 3
    thresholds = torch.tensor([0.0, NEVER, 0.0])
    assert routed_linear(x, main, [main, side, side.clone()], thresholds).route.tolist() == [2] * 3


def test_a_query_of_masked_tokens_has_no_gap_but_an_output(form):
    x, main, sides, _ = routing_case(3, 5, 7, 11, 2, torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    routed = routed_linear(x, main, sides, torch.zeros(2), mask=mask)
    assert routed.gaps[1].tolist() == [0.0, 0.0]
    assert routed.route.tolist() == [1, -1, 1]
    exact = exact_output(x, main, sides, [1, -1, 1], None)
    assert largest_error(routed.output, exact) <= floor(torch.float64, 7)
    below = routed_linear(x, main, sides, torch.full((2,), ALWAYS), mask=mask)
    assert below.route.tolist() == [1, 0, 1]


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("gate_junk", [False, True])
def test_what_masked_tokens_hold_does_not_matter(form, gate_junk, junk):
    x, main, sides, bias = routing_case(4, 7, 23, 11, 2, torch.float32)
    gate, mask = random_rows(4, 7, 23, seed=8), random_mask(4, 7)
    thresholds = far_thresholds(exact_gaps(gated(x, gate, "silu"), main, sides, mask=mask))
    options = {"bias": bias, "activation": None, "mask": mask}
    clean = routed_linear(x, main, sides, thresholds, gate=gate, **options)
    hidden = ~mask[..., None]
    if gate_junk:
        gate = gate.masked_fill(hidden, junk)
    else:
        x = x.masked_fill(hidden, junk)
    routed = routed_linear(x, main, sides, thresholds, gate=gate, **options)
    assert same_bits(routed.gaps, clean.gaps)
    assert same_bits(routed.route, clean.route)
    assert same_bits(routed.output[mask], clean.output[mask])


def test_a_nan_gap_routes_its_row_to_the_main_memory(form):
    x, main, sides, _ = routing_case(3, 5, 7, 11, 2, torch.float32)
    thresholds = torch.full((2,), ALWAYS)
    clean = routed_linear(x, main, sides, thresholds)
    x[1, 2, 3] = math.nan
    routed = routed_linear(x, main, sides, thresholds)
    assert routed.gaps[1].isnan().all()
    assert routed.route.tolist() == [1, -1, 1]
    assert same_bits(routed.output[::2], clean.output[::2])
    # The tokens of the row that are numbers are the main memory's.
    exact = exact_output(x[1:2, :2].double(), main, sides, [-1], None)
    assert largest_error(routed.output[1:2, :2], exact) <= floor(torch.float32, 7)
    assert routed.output[1, 2].isnan().all() and routed.output[1, 3:].isfinite().all()


def test_a_broken_memory_is_left_out(form):
    x, main, sides, _ = routing_case(3, 5, 7, 11, 2, torch.float32)
    sides[1][4, 3] = math.nan
    routed = routed_linear(x, main, sides, torch.zeros(2))
    assert routed.route.tolist() == [0, 0, 0]
    exact = exact_output(x.double(), main, sides, [0] * 3, None)
    assert largest_error(routed.output, exact) <= floor(torch.float32, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_does_not_depend_on_its_neighbours(form, dtype):
    x, main, sides, bias = routing_case(5, 11, 53, 29, 3, dtype)
    thresholds = far_thresholds(exact_gaps(x, main, sides, bias=bias, activation="silu"))
    options = {"bias": bias, "activation": "silu"}
    together = routed_linear(x, main, sides, thresholds, **options)
    for b in range(5):
        for given in (None, together.route[b : b + 1]):
            alone = routed_linear(x[b : b + 1], main, sides, thresholds, route=given, **options)
            assert alone.route.tolist() == together.route[b : b + 1].tolist()
            own = together.output[b : b + 1].double()
            assert largest_error(alone.output, own) <= 2 * floor(dtype, 53)
    # In another order every row takes its own answer along.
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = routed_linear(x[order], main, sides, thresholds, **options)
    assert shuffled.route.tolist() == together.route[order].tolist()
    error = largest_error(shuffled.output, together.output[order].double())
    assert error <= 2 * floor(dtype, 53)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(form, dtype, given):
    x, main, sides, bias = routing_case(7, 11, 101, 37, 3, dtype)
    thresholds = far_thresholds(exact_gaps(x, main, sides))
    route = torch.tensor([0, 1, 2, -1, 2, 1, 0]) if given else None
    options = {"bias": bias, "mask": random_mask(7, 11), "route": route}
    first, second = (routed_linear(x, main, sides, thresholds, **options) for _ in range(2))
    assert same_bits(first.output, second.output)
    assert same_bits(first.route, second.route)
    assert given or same_bits(first.gaps, second.gaps)
