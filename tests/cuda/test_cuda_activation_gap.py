"""The CUDA kernels of activation_gap for decoding, emulated: ``‖ act(W' x + b) − act(W x + b) ‖₂``
of single tokens; and what both ops for decoding refuse.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from decode_calls import assert_gaps, decode_inputs, gaps_of, part
from decode_inputs import ACTIVATIONS, DTYPES, EXTREMES, strided
from ops.layouts import LAYOUTS, same_bits

from pyeditfast.ops import activation_gap, routed_linear

pytestmark = pytest.mark.usefixtures("cuda", "guarded_memory")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(dtype, activation):
    for d_in in (152, 150):
        inputs = decode_inputs(5, 2, 37, d_in, dtype, bias=True)
        assert_gaps(inputs, activation)
        assert_gaps(inputs.but(x=6.0 * inputs.x, bias=None), activation)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (16, 8, 64, 128), (2, 1, 1029, 17), (1, 2, 33, 1032), (9, 1, 530, 24)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape(dtype, shape):
    inputs = decode_inputs(*shape, dtype)
    assert_gaps(inputs)
    assert_gaps(inputs, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_may_run_in_any_order(dtype, block_order):
    assert_gaps(decode_inputs(9, 3, 70, 600, dtype, bias=True), "gelu", splits=2)


@pytest.mark.parametrize("splits", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cut(dtype, splits):
    inputs = decode_inputs(9, 2, 70, 1800, dtype, bias=True)
    assert_gaps(inputs, "gelu", splits)
    whole = gaps_of(inputs, "gelu", splits)
    for rows in (slice(0, 1), slice(1, 9)):
        assert same_bits(gaps_of(part(inputs, rows), "gelu", splits), whole[rows])


@pytest.mark.parametrize(
    ("dtype", "scale", "weight_scale"),
    [(dtype, *(math.sqrt(scale) for scale in scales)) for dtype, *scales in EXTREMES],
    ids=str,
)
def test_extreme_magnitudes(dtype, scale, weight_scale):
    for d_in in (136, 131):
        assert_gaps(decode_inputs(5, 2, 57, d_in, dtype, scale=scale, weight_scale=weight_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_do_not_drift(dtype):
    """The matrix unit cuts off what does not fit, and of positive terms that adds up."""
    inputs = decode_inputs(2, 1, 9, 8192, dtype)
    side, x = inputs.sides[0].abs(), inputs.x.abs()
    inputs = inputs.but(x=x, main=torch.zeros_like(side), sides=[side])
    exact = (x[:, 0].double() @ side.double().mT).norm(dim=-1, keepdim=True)
    # Each of 32 additions cuts off half a digit of a sum that is half as long: 12 units in all. Of
    # 128 additions in one go it would be 48.
    error = (gaps_of(inputs, splits=1).double() - exact).abs()
    assert bool((error <= 20 * 2.0**-24 * exact).all())


def test_a_memory_like_main_has_gap_zero():
    inputs = decode_inputs(3, 1, 70, 144, torch.bfloat16)
    inputs = inputs.but(sides=[*inputs.sides, inputs.main.clone()])
    gaps = gaps_of(inputs, "gelu")
    assert torch.equal(gaps[:, 1], torch.zeros(3)) and bool((gaps[:, 0] > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_number_stays_in_its_memory_and_row(dtype):
    for d_in in (136, 130):
        inputs = decode_inputs(4, 3, 37, d_in, dtype)
        expected = gaps_of(inputs, "silu")
        inputs.sides[1][36, d_in - 1] = math.nan
        inputs.x[2, 0, 0] = math.nan
        result = gaps_of(inputs, "silu")
        bad = torch.zeros(4, 3, dtype=torch.bool)
        bad[2], bad[:, 1] = True, True
        assert torch.equal(result.isnan(), bad)
        assert same_bits(result[~bad], expected[~bad])


def test_masked_rows_have_gap_zero():
    inputs = decode_inputs(4, 2, 37, 136, torch.bfloat16)
    expected = gaps_of(inputs)
    inputs.x[1] = math.nan
    inputs.x[2] = math.inf
    far = torch.tensor([[True], [False], [False], [True]]).expand(4, 3).contiguous()
    gaps = gaps_of(inputs.but(mask=far[:, :1]))
    assert same_bits(gaps[[0, 3]], expected[[0, 3]])
    assert torch.equal(gaps[1:3], torch.zeros(2, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_not_written(dtype, layout):
    inputs = decode_inputs(5, 2, 29, 83, dtype, bias=True)
    (x, main, *sides), storages = strided([inputs.x, inputs.main, *inputs.sides], layout)
    far_bias = torch.full((29, 3), math.nan, dtype=dtype)
    far_bias[:, 1] = inputs.bias
    before = [storage.clone() for storage in storages]
    views = inputs.but(x=x, main=main, sides=sides, bias=far_bias[:, 1])
    assert same_bits(gaps_of(views, "silu"), gaps_of(inputs, "silu"))
    assert all(map(same_bits, storages, before))


@pytest.mark.parametrize("sizes", [(0, 7, 5), (3, 0, 5), (3, 7, 0)], ids=str)
def test_nothing_to_add(sizes):
    batch, d_out, d_in = sizes
    inputs = decode_inputs(batch, 2, d_out, d_in, torch.float16)
    inputs = inputs.but(bias=torch.ones(d_out, dtype=torch.float16))
    assert torch.equal(gaps_of(inputs, "silu"), torch.zeros(batch, 2))


def test_no_memory():
    gaps = gaps_of(decode_inputs(3, 0, 7, 5, torch.float32))
    assert gaps.shape == (3, 0) and gaps.dtype == torch.float32


@pytest.mark.parametrize("d_in", [520, 301])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_in_every_batch(dtype, d_in):
    inputs = decode_inputs(16, 2, 33, d_in, dtype)
    whole = gaps_of(inputs, "silu")
    assert same_bits(gaps_of(inputs, "silu"), whole)
    for rows in (slice(3, 4), slice(8, 16), slice(5, 16)):
        assert same_bits(gaps_of(part(inputs, rows), "silu"), whole[rows])


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
def test_the_op_takes_the_kernels(reduction):
    inputs = decode_inputs(3, 2, 29, 40, torch.bfloat16, bias=True)
    mask = torch.tensor([[True], [False], [True]])
    gaps = activation_gap(
        inputs.x,
        inputs.main,
        inputs.sides,
        bias=inputs.bias,
        activation="gelu",
        reduction=reduction,
        mask=mask,
    )
    assert same_bits(gaps, gaps_of(inputs.but(mask=mask), "gelu"))


# What does not fit.

X, MAIN = torch.ones(2, 1, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.ones(2, 3, 4)}, "it takes up to 16 queries of one token, not 2 of 3"),
        ({"x": torch.ones(17, 1, 4)}, "it takes up to 16 queries of one token, not 17 of 1"),
        ({"sides": []}, "there is no side memory"),
        ({"sides": [MAIN] * 9}, "its kernels take up to 8 side memories, not 9"),
        ({"x": X.clone().requires_grad_()}, "it has no backward pass"),
        ({"sides": [MAIN.clone().requires_grad_()]}, "it has no backward pass"),
        ({"bias": torch.ones(5, requires_grad=True)}, "it has no backward pass"),
        (
            {"x": X.double(), "main": MAIN.double(), "sides": [MAIN.double()]},
            "the CUDA form takes bfloat16, float16 and float32, not torch.float64",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_ops_say_what_the_kernels_do_not_take(changes, reason):
    arguments = {"x": X, "main": MAIN, "sides": [MAIN], **changes}
    message = re.escape(f"cuda not used: {reason}")
    with pytest.raises(ValueError, match=message):
        activation_gap(**arguments)
    with pytest.raises(ValueError, match=message):
        routed_linear(**arguments, thresholds=torch.zeros(len(arguments["sides"])))


def test_routed_linear_says_more():
    gate = torch.ones(2, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="cuda not used: it has no backward pass"):
        routed_linear(X, MAIN, [MAIN], torch.zeros(1), gate=gate)
    with torch.no_grad():
        routed_linear(X, MAIN, [MAIN], torch.zeros(1), gate=gate)
    wide = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=re.escape("it takes float32 thresholds, not torch.float64")
    ):
        routed_linear(X, MAIN, [MAIN], wide)
    route = torch.zeros(2, dtype=torch.int64)
    assert routed_linear(X, MAIN, [MAIN], wide, route=route).output.tolist() == [[[4.0] * 5]] * 2


@pytest.fixture
def call(emulated_module):
    """A valid call; arguments can be replaced."""
    held = {name: torch.ones(2, 4) for name in ("x", "gate")}
    held |= {name: torch.ones(5, 4) for name in ("main", "side")}
    held |= {"bias": torch.ones(5), "output": torch.zeros(2, 5), "gaps": torch.zeros(2, 1)}
    held |= {"workspace": torch.zeros(4096), "thresholds": torch.zeros(1)}
    held |= {"route": torch.zeros(2, dtype=torch.int64)}

    def called(function, **changes):
        place = {name: tensor.data_ptr() for name, tensor in held.items()}
        decode = {name: (place[name], 4, 1, 0) for name in ("x", "gate", "main")}
        decode |= {"sides": [(place["side"], 4, 1, 0)], "bias": (place["bias"], 5, 1, 0)}
        decode |= {"gate_activation": 2, "batch": 2, "d_out": 5, "d_in": 4, "splits": 0}
        others = {"workspace": place["workspace"], "stream": (0, 0)}
        if function != "cuda_routed_linear_with_route":
            others |= {"activation": 2, "mask": (0, 0), "gaps": place["gaps"]}
        if function == "cuda_routed_linear":
            others |= {"thresholds": (place["thresholds"], 1), "route": place["route"]}
        elif function == "cuda_routed_linear_with_route":
            others |= {"route": (place["route"], 1)}
        if function != "cuda_activation_gap":
            others |= {"output": place["output"]}
        for name, value in changes.items():
            chosen = decode if name in decode else others
            assert name in chosen
            chosen[name] = value
        getattr(emulated_module, function)(emulated_module.Decode(**decode), **others)

    return called


FUNCTIONS = ("cuda_routed_linear", "cuda_routed_linear_with_route", "cuda_activation_gap")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 17}, "batch must be from 0 to 16, got 17"),
        ({"batch": -1}, "batch must be from 0 to 16, got -1"),
        ({"d_out": -5}, "d_out and d_in must be from 0 to 2^30, got -5 and 4"),
        ({"d_in": 2**31}, "d_out and d_in must be from 0 to 2^30, got 5 and 2147483648"),
        ({"splits": 33}, "splits must be from 0 to 32, got 33"),
        ({"sides": [(4096, 4, 1, 0)] * 9}, "there are 9 side memories; 0 to 8 are taken"),
        ({"x": (0, 4, 1, 0)}, "x is a null pointer, but has 2 x 4 elements"),
        ({"x": (4096, 4, 1, 1)}, "x has element type 1, main has 0"),
        ({"gate": (4098, 4, 1, 0)}, "gate is at 0x1002, which is no multiple of 4"),
        ({"gate_activation": 5}, "gate_activation must be from 0 to 4, got 5"),
        ({"main": (4096, 4, 1, 3)}, "main has element type 3; 0 (float32)"),
        ({"main": (4096, -4, 1, 0)}, "main has strides -4 and 1; 0 or more is needed"),
        ({"sides": [(0, 4, 1, 0)]}, "sides[0] is a null pointer"),
        ({"sides": [(4096, 4, 1, 2)]}, "sides[0] has element type 2, main has 0"),
        ({"bias": (0, 1, 1, 0)}, "bias is a null pointer, but has 1 x 5 elements"),
        ({"workspace": 0}, "workspace is at "),
        ({"workspace": 4104}, "workspace is at 0x1008; a multiple of 16 is needed"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(call, function, changes, message):
    call(function)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(function, **changes)


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("cuda_routed_linear", {"output": 0}, "output is a null pointer, but has 2 x 5 elements"),
        ("cuda_routed_linear", {"route": 0}, "route is a null pointer"),
        ("cuda_routed_linear", {"thresholds": (0, 1)}, "thresholds is a null pointer"),
        ("cuda_routed_linear", {"gaps": 0}, "gaps is a null pointer, but has 2 x 1 elements"),
        ("cuda_routed_linear", {"activation": 7}, "activation must be from 0 to 4, got 7"),
        ("cuda_routed_linear_with_route", {"route": (0, 1)}, "route is a null pointer"),
        ("cuda_routed_linear_with_route", {"output": 0}, "output is a null pointer"),
        ("cuda_activation_gap", {"gaps": 0}, "gaps is a null pointer"),
        ("cuda_activation_gap", {"activation": -1}, "activation must be from 0 to 4, got -1"),
    ],
    ids=str,
)
def test_what_one_function_refuses(call, function, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(function, **changes)
