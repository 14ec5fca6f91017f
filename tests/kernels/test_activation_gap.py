"""activation_gap: the kernels against ``‖ act(W' x_t + b) − act(W x_t + b) ‖`` in float64."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from decode_inputs import ACTIVATIONS, DTYPES
from error_bounds import assert_within, gap_bound
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, empty_storage, random_rows, same_bits, view_of
from ops.tolerances import assert_as_accurate
from query_inputs import CONFIGS, LARGE, REDUCTIONS, SMALL, Queries, config_of, queries
from torch import Tensor
from truncation import truncate_dots

from pyeditfast import backend, reference
from pyeditfast.ops import activation_gap
from pyeditfast_kernels import activation_gap as kernels
from pyeditfast_kernels import memory_products as products
from pyeditfast_kernels.launch import interprets


def launch(inputs: Queries, activation=None, reduction="auto", config=SMALL) -> Tensor:
    first = inputs.x, inputs.main, inputs.sides, inputs.bias
    return kernels.activation_gap(*first, activation, reduction, inputs.mask, config)


def formula(inputs: Queries, activation: str | None, reduction: str, dtype: torch.dtype) -> Tensor:
    inputs = inputs.to(torch.device("cpu")).to(dtype)
    return reference.activation_gap(
        inputs.x,
        inputs.main,
        inputs.sides,
        bias=inputs.bias,
        activation=activation,
        reduction=reduction,
        mask=inputs.mask,
    )


def assert_equals_formula(inputs, activation=None, reduction="auto", config=SMALL) -> None:
    result = launch(inputs, activation, reduction, config)
    assert result.device == inputs.x.device and result.dtype == torch.float32
    exact = formula(inputs, activation, reduction, torch.float64)
    assert_within(result.cpu(), exact, gap_bound(inputs, activation, reduction))


# The values.


@pytest.mark.parametrize(
    ("batch", "tokens", "d_in", "d_out", "sides"),
    [
        (1, 1, 1, 1, 1),
        (1, 1, 37, 5, 2),
        (5, 1, 31, 33, 1),
        (2, 7, 64, 48, 3),
        (3, 13, 101, 53, 2),
        (1, 67, 130, 31, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, batch, tokens, d_in, d_out, sides):
    shape = (batch, tokens, d_in, d_out, sides, dtype, device)
    assert_equals_formula(queries(*shape), config=None)
    assert_equals_formula(queries(*shape, bias=True, masked=True), "silu", "max")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration(device, config):
    # Over the edge of every tile; float32 has sums of its own.
    rows, columns, depth = (config.sizes[f"BLOCK_{name}"] for name in ("ROWS", "COLUMNS", "K"))
    shape = (1, rows + 3, depth + 5, columns + 3, 2)
    for dtype in DTYPES if config in products.FINE else DTYPES[:1]:
        inputs = queries(*shape, dtype, device, bias=True, masked=True)
        assert_equals_formula(inputs, "silu", "mean", config)


@pytest.mark.parametrize("sides", range(1, 9))
def test_every_number_of_memories(device, sides):
    assert_equals_formula(queries(2, 9, 33, 37, sides, torch.bfloat16, device))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(device, dtype, activation):
    inputs = queries(2, 11, 47, 29, 2, dtype, device, bias=True, scale=5.0)
    assert_equals_formula(inputs, activation)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 129, 530])
def test_reductions(device, tokens, masked, reduction):
    # Up to 128 tokens one program's block is small, beyond it is large; 530 take two of them.
    inputs = queries(3, tokens, 5, 3, 2, torch.float32, device, masked=masked)
    assert_equals_formula(inputs, None, reduction, LARGE)


def test_beyond_100_counted_tokens_the_maximum_counts(device):
    inputs = queries(2, 120, 5, 3, 1, torch.float32, device)
    mask = torch.zeros(2, 120, dtype=torch.bool, device=device)
    mask[0, 10:110] = True
    mask[1, 10:111] = True
    inputs = inputs.but(mask=mask)
    mean, largest, auto = (launch(inputs, None, reduction, LARGE) for reduction in REDUCTIONS)
    assert auto.tolist() == [mean[0].tolist(), largest[1].tolist()]
    assert (largest > 1.5 * mean).all()


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 80),
    d_out=st.integers(1, 80),
    sides=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    reduction=st.sampled_from(REDUCTIONS),
    bias=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape(
    device, batch, tokens, d_in, d_out, sides, dtype, activation, reduction, bias, masked
):
    shape = (batch, tokens, d_in, d_out, sides, dtype, device)
    assert_equals_formula(queries(*shape, bias=bias, masked=masked), activation, reduction)


def test_by_hand(device):
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=device)
    main = torch.zeros(2, 2, device=device)
    first = torch.tensor([[3.0, 0.0], [4.0, 1.0]], device=device)
    result = launch(Queries(x, main, [first, main]), "relu", "mean")
    assert result.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_truncating_tensor_cores_cost_less_than_rounding_outputs(device, dtype, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    inputs = queries(1, 3, 2000, 13, 2, dtype, device)
    result = launch(inputs, "silu").cpu()
    with backend("torch"):
        rounded = activation_gap(inputs.x, inputs.main, inputs.sides, activation="silu").cpu()
    exact = formula(inputs, "silu", "auto", torch.float64)
    assert_as_accurate(result, rounded, exact, 1)


def test_float32_keeps_its_digits_where_tensor_cores_truncate(device, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    inputs = queries(1, 3, 2000, 13, 1, torch.float32, device)
    assert_equals_formula(inputs, "silu")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.float16, 1e4),
        (torch.float16, 1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_extreme_magnitudes(device, dtype, scale, activation):
    inputs = queries(2, 3, 37, 29, 2, dtype, device)
    inputs = inputs.but(x=(inputs.x.double().clamp(-4, 4) * scale).to(dtype))
    assert_equals_formula(inputs, activation)


# What does not count, and what is not a number.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_tokens_do_not_leak(device, bad, reduction):
    inputs = queries(3, 21, 37, 19, 2, torch.bfloat16, device, masked=True)
    expected = launch(inputs, "silu", reduction)
    x = torch.where(inputs.mask[..., None], inputs.x, bad)
    assert same_bits(launch(inputs.but(x=x), "silu", reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_query_without_counted_tokens_has_gap_0(device, reduction):
    inputs = queries(3, 21, 37, 19, 2, torch.float32, device, masked=True)
    inputs.mask[1] = False
    inputs.x[1] = math.nan
    result = launch(inputs, "silu", reduction)
    assert result[1].tolist() == [0.0, 0.0] and (result[[0, 2]] > 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [21, 101])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_nan_in_a_counted_token_stays_in_its_query(device, activation, tokens, reduction):
    inputs = queries(3, tokens, 19, 11, 2, torch.bfloat16, device)
    expected = launch(inputs, activation, reduction, LARGE)
    inputs.x[1, 20, 18] = math.nan
    result = launch(inputs, activation, reduction, LARGE)
    assert result[1].isnan().all()
    assert same_bits(result[[0, 2]], expected[[0, 2]])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_infinite_difference_is_an_infinite_gap(device):
    # Not in float32, whose parts make NaN of infinity.
    x, one = (torch.full((1, 1, 1), value, device=device).half() for value in (math.inf, 1.0))
    one = one[0]
    assert launch(Queries(x, one, [-one])).tolist() == [[math.inf]]


def test_nan_in_a_side_memory_stays_in_its_gaps(device):
    inputs = queries(3, 5, 37, 19, 3, torch.bfloat16, device)
    expected = launch(inputs)
    inputs.sides[1][7, 7] = expected[:, 1] = math.nan
    assert torch.equal(launch(inputs).nan_to_num(-1.0), expected.nan_to_num(-1.0))


# Bits.


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.bfloat16, CONFIGS[0]), (torch.float16, SMALL), (torch.float32, None)],
)
def test_gives_the_same_bits_twice(device, dtype, config):
    inputs = queries(3, 11, 40, 37, 3, dtype, device, bias=True, masked=True)
    first, second = (launch(inputs, "gelu", config=config) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_gives_the_same_bits_beside_any_others(device, dtype):
    inputs = queries(4, 7, 37, 45, 2, dtype, device)
    expected = launch(inputs, "silu")
    others = torch.arange(4, device=device) != 2
    inputs.x[others] = random_rows(3, 7, 37, seed=99, scale=50.0).to(device, dtype)
    assert same_bits(launch(inputs, "silu")[2], expected[2])


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_not_written(device, dtype, layout):
    inputs = queries(3, 7, 37, 29, 2, dtype, device, bias=True, masked=True)
    expected = launch(inputs, "silu")
    views, storages = [], []
    for tensor in (inputs.x, inputs.main, *inputs.sides):
        storages.append(empty_storage(tensor.shape, dtype, layout).to(device))
        views.append(view_of(storages[-1], layout).copy_(tensor))
    before = [storage.clone() for storage in storages]
    bias = torch.stack([inputs.bias, inputs.bias], 1)[:, 1]
    mask = inputs.mask.mT.contiguous().mT
    result = launch(Queries(views[0], views[1], views[2:], bias, mask), "silu")
    assert same_bits(result, expected)
    assert all(map(same_bits, storages, before))


def test_memories_of_different_strides(device):
    inputs = queries(3, 7, 37, 29, 2, torch.bfloat16, device)
    transposed = inputs.sides[1].mT.contiguous().mT
    result = launch(inputs.but(sides=[inputs.sides[0], transposed]))
    assert same_bits(result, launch(inputs))


def test_expanded_inputs(device):
    inputs = queries(1, 1, 37, 29, 2, torch.bfloat16, device, bias=True)
    inputs = inputs.but(x=inputs.x.expand(3, 7, 37), bias=inputs.bias[:1].expand(29))
    whole = inputs.but(x=inputs.x.contiguous(), bias=inputs.bias.contiguous())
    assert same_bits(launch(inputs), launch(whole))


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 7, 2), (2, 0, 5, 7, 2), (2, 3, 0, 7, 2), (2, 3, 5, 0, 2)], ids=str
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_inputs_have_gap_0(device, shape, reduction):
    inputs = queries(*shape, torch.float32, device)
    result = launch(inputs, "silu", reduction, config=None)
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.zeros(shape[0], 2, device=device))


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    strides = ((1 << 30) + 64, (1 << 30) + 1, 1 << 27)
    x = FarTensor(1 << 60, (3, 9, 18), torch.bfloat16, strides)
    memories = [
        FarTensor(number << 55, (17, 18), torch.bfloat16, strides[1:]) for number in range(1, 10)
    ]
    tiny = config_of(16, 16, 16)
    kernels.activation_gap(x, memories[0], memories[1:], None, None, "mean", None, tiny)
    far = {address for address in seen.loaded if address >= 1 << 55}
    everywhere = (
        (tensor, itertools.product(*map(range, tensor.shape))) for tensor in (x, *memories)
    )
    assert far == {tensor.address(*index) for tensor, indices in everywhere for index in indices}


def test_distances_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    distances = FarTensor(1 << 55, (3, 2, 1 << 32), torch.float32)
    kernels.query_gaps(distances, 2, 3, "mean", None, torch.empty(2, 2))
    everywhere = itertools.product(range(3), range(2), range(6))
    assert seen.loaded == {distances.address(*index) for index in everywhere}


# Which configuration, and what is refused.


def test_tiles_are_as_wide_as_registers_and_the_chip_allow():
    def columns(rows, memories, activation=None, hopper=False, gated=False, d_out=4096):
        config = products.choose_config(
            rows, d_out, memories, torch.bfloat16, True, activation, gated, hopper
        )
        sizes = config.sizes
        return sizes["BLOCK_ROWS"], sizes["BLOCK_COLUMNS"], sizes["BLOCK_K"]

    assert columns(64, 3) == (64, 32, 64) and columns(64, 5) == (64, 16, 64)
    assert columns(64, 3, gated=True) == (64, 32, 32)
    assert columns(512, 3, hopper=True) == (128, 128, 64)
    assert columns(512, 3, "gelu", hopper=True) == (128, 64, 64)
    assert columns(512, 3, hopper=True, gated=True) == (128, 128, 32)
    assert columns(512, 4, hopper=True) == (128, 64, 64)
    assert columns(512, 9, hopper=True) == (128, 32, 64)
    assert columns(512, 2) == (128, 128, 32) and columns(512, 2, "gelu") == (128, 64, 32)
    assert columns(512, 3) == (128, 64, 32) and columns(512, 9) == (128, 16, 32)
    # One row of tiles: narrow ones, so that there are 128 of them.
    assert columns(128, 2) == (128, 32, 32) and columns(256, 2) == (128, 64, 32)
    assert columns(100, 2, d_out=64) == (128, 16, 32)
    for memories in (3, 9):
        for dtype, is_aligned in ((torch.float32, True), (torch.float16, False)):
            chosen = products.choose_config(
                512, 4096, memories, dtype, is_aligned, None, False, True
            )
            assert chosen is products.FINE[memories > 4]


def test_seven_memories_take_the_room_of_eight():
    rooms = [products.groups(memories) for memories in range(1, 10)]
    pairs = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 0), (8, 0), (8, 1)]
    assert rooms == pairs


def test_the_op_takes_the_kernel(device):
    inputs = queries(2, 5, 37, 29, 2, torch.float16, device, bias=True, masked=True)
    options = {"bias": inputs.bias, "activation": "silu", "mask": inputs.mask}
    result = activation_gap(inputs.x, inputs.main, inputs.sides, **options)
    assert same_bits(result, launch(inputs, "silu", config=None))


def test_more_than_8_sides_are_refused(device):
    inputs = queries(2, 5, 37, 29, 9, torch.float16, device)
    with pytest.raises(ValueError, match="there are 9 side memories; a kernel takes 8"):
        launch(inputs)


def test_float64_is_refused(device):
    inputs = queries(2, 5, 37, 29, 1, torch.float64, device)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        activation_gap(inputs.x, inputs.main, inputs.sides)
