"""activation_gap: how far the outputs of side memories lie from the main memory's, per query."""

from __future__ import annotations

import importlib
import logging
import math
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from memories import ACTIVATIONS, assert_gaps_as_accurate, exact_gaps, random_mask, random_memories
from tolerances import floor, largest_error

from pyeditfast import backend, backends
from pyeditfast.backends import explain
from pyeditfast.ops import activation_gap
from pyeditfast.ops.memories import taking
from pyeditfast.reference.activation_gap import query_gap, token_gaps

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.activation_gap")

FORMS = ("auto", "torch", "reference")

# batch, tokens, d_in, d_out
SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 13, 5),
    (3, 1, 31, 17),
    (5, 11, 101, 37),
    (2, 100, 7, 3),
    (2, 101, 3, 7),
]


@pytest.fixture(params=FORMS)
def form(request):
    """Run the test once with every form that needs no GPU; auto takes C++ where it was built."""
    with backend(request.param):
        yield request.param


def queries(
    batch: int, tokens: int, d_in: int, dtype: torch.dtype = torch.float32, seed: int = 9
) -> torch.Tensor:
    return random_rows(batch, tokens, d_in, dtype=dtype, seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_torch(form, dtype, shape):
    batch, tokens, d_in, d_out = shape
    x = queries(batch, tokens, d_in, dtype)
    main, sides = random_memories(d_out, d_in, 3, dtype)
    bias = random_rows(1, d_out, dtype=dtype, seed=5)[0]
    gaps = activation_gap(x, main, sides, bias=bias, activation="silu")
    assert gaps.shape == (batch, 3)
    assert_gaps_as_accurate(gaps, x, main, sides, bias=bias, activation="silu")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(form, activation, biased):
    x = queries(3, 5, 19, torch.float64)
    main, sides = random_memories(11, 19, 2, torch.float64)
    options = {"bias": random_rows(1, 11, dtype=torch.float64, seed=5)[0] if biased else None}
    gaps = activation_gap(x, main, sides, activation=activation, **options)
    exact = exact_gaps(x, main, sides, activation=activation, **options)
    assert largest_error(gaps, exact) <= floor(torch.float64, 19)
    others = set(ACTIVATIONS) - {activation}
    assert all(
        largest_error(gaps, exact_gaps(x, main, sides, activation=other, **options)) > 1e-5
        for other in others
    )


# Counted tokens on both sides of the 100 after which "auto" takes the largest, among 130.
COUNTS = (0, 1, 2, 99, 100, 101, 130)


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
def test_reductions_go_by_counted_tokens(form, reduction):
    x = queries(len(COUNTS), 130, 3, torch.float64)
    main, sides = random_memories(5, 3, 2, torch.float64)
    order = torch.rand(len(COUNTS), 130, generator=torch.Generator().manual_seed(1)).argsort(-1)
    mask = order < torch.tensor(COUNTS)[:, None]
    assert mask.sum(-1).tolist() == list(COUNTS)
    gaps = activation_gap(x, main, sides, reduction=reduction, mask=mask)
    exact = exact_gaps(x, main, sides, reduction=reduction, mask=mask)
    assert largest_error(gaps, exact) <= floor(torch.float64, 130)
    assert gaps[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("tokens", "expected"), [(100, "mean"), (101, "max")])
def test_without_a_mask_every_token_counts(form, tokens, expected):
    x = queries(2, tokens, 3, torch.float64)
    main, sides = random_memories(5, 3, 2, torch.float64)
    gaps = activation_gap(x, main, sides)
    assert torch.equal(gaps, activation_gap(x, main, sides, reduction=expected))
    other = "max" if expected == "mean" else "mean"
    assert not torch.equal(gaps, activation_gap(x, main, sides, reduction=other))
    everything = torch.ones(2, tokens, dtype=torch.bool)
    assert torch.equal(gaps, activation_gap(x, main, sides, mask=everything))


def test_token_gaps_and_query_gap_by_hand():
    main, side = torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([[3.0, 4.0], [1.0, 4.0]])
    assert token_gaps(main, side, None).tolist() == [5.0, 5.0]
    assert token_gaps(main, side, "relu").tolist() == [5.0, 4.0]
    gaps = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert query_gap(gaps, "mean", mask).tolist() == [1.5, 0.0]
    assert query_gap(gaps, "max", mask).tolist() == [2.0, 0.0]
    assert query_gap(gaps, "mean").tolist() == [4.0, 5.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_left_alone(form, dtype, layout):
    memory_layout = "transposed" if layout == "rows first" else layout
    plain_x, plain_mask = queries(3, 5, 23, dtype), random_mask(3, 5)
    plain_main, plain_sides = random_memories(7, 23, 2, dtype)
    plain_bias = random_rows(7, 1, dtype=dtype, seed=5)
    x, x_storage = lay_out(plain_x, layout)
    laid_out = [lay_out(memory, memory_layout) for memory in (plain_main, *plain_sides)]
    (main, *sides), storages = zip(*laid_out, strict=True)
    bias, bias_storage = lay_out(plain_bias, memory_layout)
    mask = torch.stack([plain_mask, ~plain_mask], -1)[..., 0]
    storages = [x_storage, bias_storage, mask, *storages]
    before = [storage.clone() for storage in storages]
    gaps = activation_gap(x, main, sides, bias=bias[:, 0], activation="silu", mask=mask)
    options = {"bias": plain_bias[:, 0], "activation": "silu", "mask": plain_mask}
    assert_gaps_as_accurate(gaps, plain_x, plain_main, plain_sides, **options)
    assert all(same_bits(s, copy) for s, copy in zip(storages, before, strict=True))


def test_expanded_inputs(form):
    row = queries(1, 1, 17)
    main, (side,) = random_memories(5, 17, 1)
    gaps = activation_gap(row.expand(3, 4, 17), main, [side, side])
    assert largest_error(gaps, exact_gaps(row, main, [side, side]).expand(3, 2)) <= floor(
        torch.float32, 17
    )


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_what_masked_tokens_hold_does_not_matter(form, activation, reduction, junk):
    x = queries(3, 130, 7)
    main, sides = random_memories(5, 7, 2)
    mask = random_mask(3, 130)
    mask[1, :110], mask[2, :120] = False, True
    assert [count > 100 for count in mask.sum(-1).tolist()] == [False, False, True]
    options = {"activation": activation, "reduction": reduction, "mask": mask}
    clean = activation_gap(x, main, sides, **options)
    assert clean.isfinite().all()
    assert same_bits(
        activation_gap(x.masked_fill(~mask[..., None], junk), main, sides, **options), clean
    )


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
def test_a_nan_that_counts_is_seen_in_its_row_alone(form, reduction):
    x = queries(3, 5, 7)
    main, sides = random_memories(5, 7, 2)
    clean = activation_gap(x, main, sides, reduction=reduction)
    x[1, 2, 3] = math.nan
    gaps = activation_gap(x, main, sides, reduction=reduction)
    assert gaps[1].isnan().all()
    assert same_bits(gaps[::2], clean[::2])


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
def test_no_token_counts(form, reduction):
    x, mask = queries(2, 5, 7), torch.zeros(2, 5, dtype=torch.bool)
    main, sides = random_memories(3, 7, 2)
    gaps = activation_gap(x, main, sides, reduction=reduction, mask=mask)
    assert same_bits(gaps, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
@pytest.mark.parametrize(
    ("batch", "tokens", "count"), [(0, 5, 2), (2, 0, 2), (0, 0, 2), (2, 5, 0), (0, 5, 0)]
)
def test_empty(form, batch, tokens, count, reduction, masked, dtype):
    main, sides = random_memories(3, 7, count, dtype)
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    x = queries(batch, tokens, 7, dtype)
    gaps = activation_gap(x, main, sides, reduction=reduction, mask=mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(gaps, torch.zeros(batch, count, dtype=wide))


@pytest.mark.parametrize(("d_out", "d_in"), [(0, 7), (3, 0), (0, 0)])
def test_memories_without_entries_have_no_gap(form, d_out, d_in):
    main, sides = torch.zeros(d_out, d_in), [torch.zeros(d_out, d_in)] * 2
    assert same_bits(activation_gap(queries(2, 5, d_in), main, sides), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_of_the_main_memory_has_gap_zero(form, dtype):
    main, (side,) = random_memories(11, 29, 1, dtype)
    gaps = activation_gap(queries(3, 7, 29, dtype), main, [main.clone(), side], activation="gelu")
    assert gaps[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert (gaps[:, 1] > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_does_not_depend_on_its_neighbours(form, dtype):
    x = queries(5, 11, 53, dtype)
    main, sides = random_memories(17, 53, 2, dtype)
    together = activation_gap(x, main, sides, activation="silu")
    apart = [activation_gap(row[None], main, sides, activation="silu") for row in x]
    assert largest_error(together, torch.cat(apart).double()) <= 2 * floor(dtype, 53)
    # A longer neighbour pads the row on either side.
    padded = torch.cat([queries(5, 4, 53, dtype, seed=2), x, queries(5, 3, 53, dtype, seed=3)], 1)
    mask = torch.zeros(5, 18, dtype=torch.bool)
    mask[:, 4:15] = True
    gaps = activation_gap(padded, main, sides, activation="silu", mask=mask)
    assert largest_error(gaps, together.double()) <= 2 * floor(dtype, 53)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(form, dtype):
    x, mask = queries(4, 61, 101, dtype), random_mask(4, 61)
    main, sides = random_memories(37, 101, 3, dtype)
    options = {"activation": "silu", "mask": mask}
    assert same_bits(
        activation_gap(x, main, sides, **options), activation_gap(x, main, sides, **options)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_computes_16_bit_inputs_in_float32(dtype):
    x, (main, sides) = queries(3, 7, 29, dtype), random_memories(11, 29, 2, dtype)
    with backend("reference"):
        gaps = activation_gap(x, main, sides, activation="silu")
    exact = exact_gaps(x, main, sides, activation="silu")
    assert largest_error(gaps, exact) <= 2 * floor(torch.float32, 29)


# Gradients.


def formula(x, main, side, bias, activation, reduction, mask):
    """The gaps of one side memory, for autograd."""
    act = {None: lambda x: x, "silu": lambda x: x * torch.sigmoid(x)}[activation]
    difference = act(x @ side.T + bias) - act(x @ main.T + bias)
    gaps = (difference * difference).sum(-1).sqrt()
    rows = [row[counted] for row, counted in zip(gaps, mask, strict=True)]
    return torch.stack([row.max() if reduction == "max" else row.mean() for row in rows])


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_are_those_of_the_formula(form, activation, reduction):
    x, mask = queries(3, 5, 13, torch.float64), random_mask(3, 5)
    main, sides = random_memories(7, 13, 2, torch.float64)
    bias = random_rows(1, 7, dtype=torch.float64, seed=5)[0]
    weights = random_rows(3, 2, dtype=torch.float64, seed=6)
    leaves = [tensor.requires_grad_() for tensor in (x, main, *sides, bias)]
    gaps = activation_gap(
        x, main, sides, bias=bias, activation=activation, reduction=reduction, mask=mask
    )
    result = torch.autograd.grad((weights * gaps).sum(), leaves)
    columns = [formula(x, main, side, bias, activation, reduction, mask) for side in sides]
    expected = torch.autograd.grad((weights * torch.stack(columns, -1)).sum(), leaves)
    for gradient, wanted in zip(result, expected, strict=True):
        # Without an activation the bias cancels.
        assert wanted.abs().max() > 1e-3 or (gradient.shape == (7,) and activation is None)
        assert (gradient - wanted).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_gap_of_zero_is_zero(form, dtype):
    # The first step of an edit: the side memory is still the main memory.
    main, _ = random_memories(7, 13, 0, dtype)
    side = main.clone().requires_grad_()
    gaps = activation_gap(queries(3, 5, 13, dtype), main, [side], activation="silu")
    (gradient,) = torch.autograd.grad(gaps.sum(), side)
    assert same_bits(gradient, torch.zeros_like(main))


# Backends.


def test_more_memories_than_a_kernel_takes(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"activation_gap"}))
    backends._logged.clear()
    x, (main, sides) = queries(2, 3, 7, torch.float64), random_memories(5, 7, 9, torch.float64)
    reason = "its kernels take up to 8 side memories, not 9"
    with caplog.at_level(logging.INFO, logger="pyeditfast.backends"):
        gaps = activation_gap(x, main, sides)
    reasons = f"cuda not used: {reason}; triton not used: {reason}"
    assert caplog.messages[0].startswith(f"activation_gap on cpu: torch ({reasons}")
    assert largest_error(gaps, exact_gaps(x, main, sides)) <= floor(torch.float64, 7)
    with backend("triton"), pytest.raises(ValueError, match=re.escape(reason)):
        activation_gap(x, main, sides)
    # On a GPU that has the kernel, eight memories are taken and nine are not.
    cuda, narrow = torch.device("cuda"), [main.float()] * 9
    choice = explain("activation_gap", taking(op.CANDIDATES, narrow[0], narrow[:8]), cuda)
    assert choice.backend == "triton"
    choice = explain("activation_gap", taking(op.CANDIDATES, narrow[0], narrow), cuda)
    assert choice.backend == "torch" and f"triton not used: {reason}" in choice.reason
    choice = explain("activation_gap", taking(op.CANDIDATES, narrow[0], []), cuda)
    assert "triton not used: there is no side memory" in choice.reason
    choice = explain("activation_gap", taking(op.CANDIDATES, main, sides[:1]), cuda)
    assert "triton not used: its kernels take bfloat16, float16 and float32, not" in choice.reason


# Errors.

X, MAIN = torch.ones(2, 3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is a list, not a torch.Tensor"),
        ({"x": X.long()}, TypeError, "x has dtype torch.int64; a floating-point dtype is needed"),
        ({"x": X[0]}, ValueError, "x has shape (3, 4); [batch, tokens, 4] is needed"),
        ({"x": X[..., :3]}, ValueError, "x has shape (2, 3, 3); [batch, tokens, 4] is needed"),
        ({"x": X.double()}, ValueError, "x is torch.float64 and main torch.float32"),
        ({"x": X.to("meta")}, ValueError, "x is on meta and main on cpu"),
        ({"main": None}, TypeError, "main is a NoneType, not a torch.Tensor"),
        ({"main": MAIN.int()}, TypeError, "main has dtype torch.int32"),
        ({"main": MAIN[0]}, ValueError, "main has shape (4,)"),
        ({"main": MAIN[None]}, ValueError, "main has shape (1, 5, 4); [d_out, d_in] is needed"),
        (
            {"sides": [MAIN, MAIN[:4]]},
            ValueError,
            "sides[1] is torch.float32 (4, 4); main is torch.float32 (5, 4)",
        ),
        (
            {"sides": [MAIN.half()]},
            ValueError,
            "sides[0] is torch.float16 (5, 4); main is torch.float32 (5, 4)",
        ),
        ({"sides": MAIN}, ValueError, "sides[0] is torch.float32 (4,)"),
        ({"sides": [MAIN, 0.5]}, TypeError, "sides[1] is a float, not a torch.Tensor"),
        ({"sides": [MAIN.to("meta")]}, ValueError, "sides[0] is on meta and main on cpu"),
        ({"bias": [0.0] * 5}, TypeError, "bias is a list, not a torch.Tensor"),
        (
            {"bias": torch.ones(4)},
            ValueError,
            "bias is torch.float32 (4,); torch.float32 (5,) is needed",
        ),
        (
            {"bias": torch.ones(5).bfloat16()},
            ValueError,
            "bias is torch.bfloat16 (5,); torch.float32 (5,) is needed",
        ),
        ({"bias": torch.ones(5, device="meta")}, ValueError, "bias is on meta and main on cpu"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation is 'tanh'; choose one of None, 'silu', 'gelu', 'gelu_tanh', 'relu'",
        ),
        (
            {"reduction": "median"},
            ValueError,
            "reduction is 'median'; choose one of mean, max, auto",
        ),
        ({"mask": [[True] * 3] * 2}, TypeError, "mask is a list, not a torch.Tensor"),
        (
            {"mask": torch.ones(2, 3)},
            ValueError,
            "mask is torch.float32 (2, 3); torch.bool (2, 3) is needed",
        ),
        (
            {"mask": torch.ones(3, 2, dtype=torch.bool)},
            ValueError,
            "mask is torch.bool (3, 2); torch.bool (2, 3) is needed",
        ),
        (
            {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "mask is on meta and x on cpu",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_show_the_offending_value(changes, error, message):
    arguments = {"x": X, "main": MAIN, "sides": [MAIN], **changes}
    with pytest.raises(error, match=re.escape(message)):
        activation_gap(**arguments)
