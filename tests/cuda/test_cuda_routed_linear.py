"""The CUDA kernels of routed_linear for decoding, emulated: each row by the memory of its route."""

from __future__ import annotations

import math

import pytest
import torch
from activation_error import activation_error
from decode_calls import assert_follows, decide, decode_inputs, follow, gaps_of, part
from decode_inputs import ACTIVATIONS, DTYPES, EXTREMES, routes, strided
from error_bounds import assert_within
from ops.layouts import LAYOUTS, same_bits
from ops.tolerances import UNIT_ROUNDOFF, largest_error

from bench.gpu.case import cases
from pyeditfast import reference
from pyeditfast.ops import routed_linear
from pyeditfast.reference.activation_gap import ACTIVATIONS as ACTIVATIONS_IN_TORCH

pytestmark = pytest.mark.usefixtures("cuda", "guarded_memory")

CPU = torch.device("cpu")

# Batch, sides, d_out, d_in. Those with a multiple of 8 columns are loaded 16 bytes at a time.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 67, 131),
    (2, 1, 64, 8),
    (5, 3, 130, 37),
    (16, 2, 33, 1030),
    (8, 2, 100, 1200),
    (16, 1, 100, 1200),
    (3, 8, 40, 264),
    (12, 2, 31, 24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(dtype, shape):
    inputs = decode_inputs(*shape, dtype, bias=True, gated=True)
    route = routes(*shape[:2], CPU)
    assert_follows(inputs, route, "silu")
    assert_follows(inputs.but(bias=None, gate=None), route)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cut(dtype, splits):
    """Eight rows: all parts in a block, where they fit; more rows: parts that are added later."""
    inputs = decode_inputs(10, 2, 70, 1096, dtype, bias=True)
    route = routes(10, 2, CPU)
    assert_follows(inputs, route, splits=splits)
    whole = follow(inputs, route, splits=splits)
    for rows in (slice(0, 8), slice(9, 10)):
        alone = follow(part(inputs, rows), route[rows], splits=splits)
        assert same_bits(alone, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_may_run_in_any_order(dtype, block_order):
    inputs = decode_inputs(10, 2, 70, 1096, dtype, bias=True, gated=True)
    assert_follows(inputs, routes(10, 2, CPU), "gelu", splits=3)
    routed = decide(inputs, torch.zeros(2), "silu", "gelu", splits=3)
    assert same_bits(routed.output, follow(inputs, routed.route, "gelu", splits=3))


@pytest.mark.parametrize("gate_activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(dtype, gate_activation):
    for d_in in (72, 67):
        inputs = decode_inputs(3, 1, 31, d_in, dtype, gated=True)
        inputs = inputs.but(gate=3.0 * inputs.gate)
        assert_follows(inputs, routes(3, 1, CPU), gate_activation)


@pytest.mark.parametrize("gate_activation", ACTIVATIONS)
def test_gates_keep_the_digits_of_small_results(gate_activation):
    """The memory is the identity: the outputs are the gated inputs themselves."""
    inputs = decode_inputs(16, 1, 64, 64, torch.float32, gated=True)
    gate = torch.linspace(-20.0, 20.0, 1024).reshape(16, 1, 64)
    inputs = inputs.but(x=torch.ones(16, 1, 64), gate=gate, main=torch.eye(64))
    result = follow(inputs, torch.full((16,), -1), gate_activation).double()
    exact = ACTIVATIONS_IN_TORCH[gate_activation](gate.double())
    assert_within(result, exact, activation_error(gate.double(), gate_activation))


def test_by_hand():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
    main, first, second = (torch.tensor([row]) for row in ([1, 1.0], [1, 0.0], [0, 1.0]))
    inputs = decode_inputs(3, 2, 1, 2, torch.float32).but(x=x, main=main, sides=[first, second])
    inputs = inputs.but(bias=torch.tensor([0.5]))
    result = follow(inputs, torch.tensor([1, -1, 0]))
    assert torch.equal(result, torch.tensor([[[2.5]], [[7.5]], [[5.5]]]))


@pytest.mark.parametrize("d_in", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_and_gated_inputs_are_rounded_to_nearest(dtype, d_in):
    # One product a result: float32 holds it exactly, and torch rounds it once.
    inputs = decode_inputs(16, 1, 70, d_in, dtype, gated=True)
    inputs.x[..., : d_in - 1] = 0.0
    route = routes(16, 1, CPU)
    result = follow(inputs, route, "relu")
    rounded = (inputs.gate.relu().float() * inputs.x.float()).to(dtype).float()
    memories = torch.stack([inputs.main, *inputs.sides])[route + 1]
    assert torch.equal(result, (rounded[..., -1:] * memories[..., -1].float()[:, None]).to(dtype))


@pytest.mark.parametrize("number", [-1, 0, 7])
def test_all_rows_of_one_memory(number):
    inputs = decode_inputs(16, 8, 70, 144, torch.bfloat16)
    assert_follows(inputs, torch.full((16,), number))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_of_another_memory(dtype):
    inputs = decode_inputs(9, 8, 70, 144, dtype)
    assert_follows(inputs, torch.tensor([7, 2, -1, 0, 5, 1, 6, 3, 4]))


@pytest.mark.parametrize("d_in", [48, 19])
def test_a_route_to_no_memory_is_one_to_the_main_memory(d_in):
    inputs = decode_inputs(4, 2, 7, d_in, torch.float32)
    odd = torch.tensor([2, -2, 2**40, -(2**63)])
    assert same_bits(follow(inputs, odd), follow(inputs, torch.full_like(odd, -1)))


def test_no_side_memory():
    inputs = decode_inputs(3, 0, 70, 144, torch.float16)
    assert_follows(inputs, torch.full((3,), -1))


@pytest.mark.parametrize(("dtype", "scale", "weight_scale"), EXTREMES, ids=str)
def test_extreme_magnitudes(dtype, scale, weight_scale):
    for d_in in (136, 131):
        inputs = decode_inputs(5, 2, 57, d_in, dtype, scale=scale, weight_scale=weight_scale)
        assert_follows(inputs, routes(5, 2, CPU))


# What must not leak.


@pytest.mark.parametrize("d_in", [136, 130])
@pytest.mark.parametrize("splits", [1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_memory_that_no_row_uses(dtype, splits, d_in):
    inputs = decode_inputs(4, 3, 37, 9 * d_in, dtype)
    route = torch.tensor([1, 1, -1, 1])
    expected = follow(inputs, route, splits=splits)
    inputs.sides[0].fill_(math.nan)
    inputs.sides[2].fill_(math.inf)
    result = follow(inputs, route, splits=splits)
    assert same_bits(result, expected) and not result.isnan().any()


@pytest.mark.parametrize("d_in", [136, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_memory_stays_with_its_rows(dtype, d_in):
    inputs = decode_inputs(10, 2, 37, d_in, dtype)
    route = routes(10, 2, CPU)
    expected = follow(inputs, route)
    inputs.sides[1][:, d_in // 2] = math.inf
    inputs.sides[1][3] = math.nan
    result = follow(inputs, route)
    assert same_bits(result[route != 1], expected[route != 1])
    assert not result[route == 1].isfinite().any()


@pytest.mark.parametrize("row", [0, 2, 9])
@pytest.mark.parametrize("where", ["x", "gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_number_stays_in_its_row(dtype, row, where):
    for d_in in (136, 130):
        inputs = decode_inputs(10, 2, 37, d_in, dtype, gated=True)
        route = routes(10, 2, CPU)
        others = [other for other in range(10) if other != row]
        expected = follow(inputs, route, "silu")
        getattr(inputs, where)[row, 0, d_in - 1] = math.nan
        result = follow(inputs, route, "silu")
        assert result[row].isnan().all()
        assert same_bits(result[others], expected[others])


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_not_written(dtype, layout):
    inputs = decode_inputs(5, 2, 29, 83, dtype, bias=True, gated=True)
    route = routes(5, 2, CPU)
    tensors = [inputs.x, inputs.gate, inputs.main, *inputs.sides]
    (x, gate, main, *sides), storages = strided(tensors, layout)
    far_route = torch.full((10,), -7)
    far_route[::2] = route
    far_bias = torch.full((29, 3), math.nan, dtype=dtype)
    far_bias[:, 1] = inputs.bias
    before = [storage.clone() for storage in storages]
    views = inputs.but(x=x, gate=gate, main=main, sides=sides, bias=far_bias[:, 1])
    for activation, here, there in (("silu", inputs, views), (None, plain(inputs), plain(views))):
        expected = follow(here, route, activation)
        assert same_bits(follow(there, far_route[::2], activation), expected)
    assert all(map(same_bits, storages, before))


def plain(inputs):
    return inputs.but(gate=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_input_that_is_not_aligned_is_packed(dtype):
    inputs = decode_inputs(5, 2, 29, 88, dtype)
    route = routes(5, 2, CPU)
    expected = follow(inputs, route)
    for width, first, step in ((90, 1, 1), (177, 0, 2), (91, 0, 1)):
        storage = torch.full((5, 1, width), math.nan, dtype=dtype)
        x = storage[..., first : first + 88 * step : step].copy_(inputs.x)
        assert same_bits(follow(inputs.but(x=x), route), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_memories_may_lie_apart(dtype):
    """They are still aligned to 16 bytes; what lies between them is not used."""
    inputs = decode_inputs(5, 2, 29, 88, dtype)
    route = routes(5, 2, CPU)

    def apart(memory):
        storage = torch.full((29, 104), math.nan, dtype=dtype)
        return storage[:, 8:96].copy_(memory)

    views = inputs.but(main=apart(inputs.main), sides=list(map(apart, inputs.sides)))
    assert same_bits(follow(views, route), follow(inputs, route))


def test_memories_of_different_layouts():
    inputs = decode_inputs(5, 2, 64, 128, torch.bfloat16)
    mixed = inputs.but(sides=[inputs.sides[0].mT.contiguous().mT, inputs.sides[1]])
    assert_follows(mixed, routes(5, 2, CPU))


@pytest.mark.parametrize("d_in", [72, 67])
def test_one_row_for_all(d_in):
    inputs = decode_inputs(1, 2, 31, d_in, torch.float32)
    route = routes(3, 2, CPU)
    expected = follow(inputs.but(x=inputs.x.repeat(3, 1, 1)), route)
    assert same_bits(follow(inputs.but(x=inputs.x.expand(3, 1, d_in)), route), expected)


@pytest.mark.parametrize("sizes", [(0, 7, 5), (3, 0, 5), (0, 0, 0)], ids=str)
def test_empty_outputs(sizes):
    batch, d_out, d_in = sizes
    inputs = decode_inputs(batch, 2, d_out, d_in, torch.float16)
    result = follow(inputs, routes(batch, 2, CPU))
    assert result.shape == (batch, 1, d_out) and result.dtype == torch.float16
    routed = decide(inputs, torch.full((2,), -1.0))
    assert routed.output.shape == (batch, 1, d_out)
    # Without outputs both gaps are zero, above their threshold, and the first counts.
    assert torch.equal(routed.gaps, torch.zeros(batch, 2)) and routed.route.tolist() == [0] * batch


def test_no_inputs_leave_the_bias():
    inputs = decode_inputs(2, 1, 7, 0, torch.float32).but(bias=torch.arange(7.0))
    expected = torch.arange(7.0).expand(2, 1, 7)
    assert torch.equal(follow(inputs, routes(2, 1, CPU)), expected)
    assert torch.equal(decide(inputs, torch.zeros(1)).output, expected)


# Repeatability.


@pytest.mark.parametrize("d_in", [520, 301])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_in_every_batch(dtype, d_in):
    inputs = decode_inputs(16, 2, 33, d_in, dtype)
    route = routes(16, 2, CPU)
    whole = follow(inputs, route)
    assert same_bits(follow(inputs, route), whole)
    for batch in range(1, 16):
        rows = slice(16 - batch, 16)
        assert same_bits(follow(part(inputs, rows), route[rows]), whole[rows])


# Without a route.


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (6, 2, 37, 1048), (16, 8, 33, 37)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gaps_choose_the_memory(dtype, shape):
    inputs = decode_inputs(*shape, dtype, bias=True)
    gaps = gaps_of(inputs, "silu")
    thresholds = gaps.mean(0)
    routed = decide(inputs, thresholds, "silu")
    assert same_bits(routed.gaps, gaps)
    assert routed.route.dtype == torch.int64
    assert torch.equal(routed.route, reference.choose_route(gaps, thresholds))
    assert same_bits(routed.output, follow(inputs, routed.route))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_take_part_in_the_choice(dtype):
    inputs = decode_inputs(5, 2, 29, 72, dtype, gated=True)
    rounded = (torch.nn.functional.silu(inputs.gate.float()) * inputs.x.float()).to(dtype)
    routed = decide(inputs, torch.zeros(2), None, "silu")
    by_hand = decide(inputs.but(x=rounded, gate=None), torch.zeros(2))
    assert torch.equal(routed.route, by_hand.route)
    assert bool(((routed.gaps - by_hand.gaps).abs() <= 1e-2 * by_hand.gaps).all())
    assert same_bits(routed.output, follow(inputs, routed.route, "silu"))


def test_ties_nan_and_thresholds_out_of_reach():
    inputs = decode_inputs(6, 4, 29, 40, torch.float32)
    side, bad = inputs.sides[1], torch.full_like(inputs.main, math.nan)
    sides = [inputs.main, side, bad, side.clone()]
    inputs = inputs.but(sides=sides)
    for thresholds, expected in (
        ([0.0, 0.0, 0.0, 0.0], 1),
        ([0.0, math.inf, 0.0, 0.0], 3),
        ([0.0, math.nan, 0.0, 0.0], 3),
        ([-1.0, math.inf, -math.inf, math.inf], 0),
        ([0.0, math.inf, -math.inf, math.inf], -1),
        ([-1.0, -math.inf, -math.inf, -math.inf], 1),
    ):
        routed = decide(inputs, torch.tensor(thresholds))
        assert routed.route.tolist() == [expected] * 6
        assert torch.equal(
            reference.choose_route(routed.gaps, torch.tensor(thresholds)), routed.route
        )
        assert same_bits(routed.output, follow(inputs, routed.route))


def test_masked_rows_have_gap_zero():
    inputs = decode_inputs(4, 2, 29, 40, torch.bfloat16)
    inputs = inputs.but(mask=torch.tensor([True, False, True, False]).repeat_interleave(2)[::2])
    inputs = inputs.but(mask=inputs.mask[:, None])
    inputs.x[1] = math.nan
    routed = decide(inputs, torch.full((2,), -1.0))
    assert routed.gaps[[1, 3]].tolist() == [[0.0, 0.0]] * 2 and routed.route[[1, 3]].sum() == 0
    assert bool((routed.gaps[[0, 2]] > 0).all()) and routed.output[1].isnan().all()
    assert routed.output[[0, 2, 3]].isfinite().all()
    high = decide(inputs, torch.zeros(2))
    assert high.route[[1, 3]].tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thresholds_of_any_stride_and_short_dtype(dtype):
    inputs = decode_inputs(6, 3, 29, 40, torch.float32)
    thresholds = gaps_of(inputs).mean(0).to(dtype)
    far = torch.full((3, 2), math.nan, dtype=dtype)
    far[:, 1] = thresholds
    routed = decide(inputs, far[:, 1])
    assert torch.equal(routed.route, reference.choose_route(routed.gaps, thresholds))
    assert len(set(routed.route.tolist())) > 1


# The op.


@pytest.mark.parametrize("given", [False, True])
def test_the_op_takes_the_kernels(given):
    inputs = decode_inputs(3, 2, 29, 40, torch.bfloat16, bias=True, gated=True)
    thresholds = torch.zeros(2)
    route = routes(3, 2, CPU) if given else None
    routed = routed_linear(
        inputs.x,
        inputs.main,
        inputs.sides,
        thresholds,
        bias=inputs.bias,
        activation="gelu",
        route=route,
        gate=inputs.gate,
    )
    assert (routed.gaps is None) == given
    if given:
        assert same_bits(routed.output, follow(inputs, route, "silu"))
    else:
        expected = decide(inputs, thresholds, "gelu", "silu")
        assert all(map(same_bits, routed, expected))


@pytest.mark.parametrize("name", ["routed_linear", "activation_gap"])
def test_the_gpu_check_runs_the_kernels(name):
    """In its cases of single tokens; the others are not for them."""
    ran = 0
    for case in cases(name, "tiny"):
        made = case.inputs(CPU, torch.Generator().manual_seed(0))
        if "cuda" in case.without:
            with pytest.raises(ValueError, match="it takes up to 16 queries of one token"):
                case.run(made)
            continue
        found, exact = case.run(made), case.exact(made)
        assert set(found) == set(exact)
        for output, value in found.items():
            error = largest_error(value, exact[output])
            assert error <= 4.0 * UNIT_ROUNDOFF.get(value.dtype, 0.0), (case.name, output)
        ran += 1
    assert ran >= 2
