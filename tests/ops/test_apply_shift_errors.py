"""apply_shift_: what is refused; a refused weight is untouched."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from layouts import DTYPES, random_rows, same_bits
from shifts import dense_shift

from pyeditfast import backend
from pyeditfast.errors import NonFiniteError, ShiftOverflowError, UnsupportedWeightError
from pyeditfast.ops import Shift, apply_shift_

# The package exports a function of nearly the same name.
op = importlib.import_module("pyeditfast.ops.apply_shift")


def assert_refused(error, message, weight, shift, *arguments, **options) -> None:
    before = weight.clone()
    with pytest.raises(error, match=re.escape(message)):
        apply_shift_(weight, shift, *arguments, **options)
    assert same_bits(weight, before)
    remainder = options.get("remainder")
    assert remainder is None or not remainder.any()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_weight_that_cannot_be_edited(dtype):
    weight = torch.ones(2, 3).to(dtype)
    message = (
        f"weight has dtype {dtype}; bfloat16, float16, float32 or float64 is needed "
        "(load the model without quantization)"
    )
    with pytest.raises(UnsupportedWeightError, match=re.escape(message)):
        apply_shift_(weight, dense_shift(torch.ones(2, 3)))
    assert issubclass(UnsupportedWeightError, TypeError)
    assert torch.equal(weight.to(torch.complex64).real, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("weight_shape", "shift_shape"),
    [((2, 3), (3, 2)), ((2, 3), (1, 2, 3)), ((4, 2, 3), (2, 3)), ((3,), (3, 3)), ((2, 3), (1, 3))],
)
def test_shapes_that_differ(weight_shape, shift_shape):
    message = f"weight {weight_shape} and shift {shift_shape} differ"
    assert_refused(
        ValueError, message, torch.ones(weight_shape), dense_shift(torch.ones(shift_shape))
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("up",), {}, "rounding is 'up'; choose one of nearest, stochastic, compensated"),
        (("stochastic",), {}, 'rounding="stochastic" needs a seed'),
        (("nearest", 1), {}, 'a seed has no meaning for rounding="nearest"'),
        (("compensated", 0), {}, 'a seed has no meaning for rounding="compensated"'),
        (("compensated",), {}, 'rounding="compensated" needs a remainder'),
        (("stochastic", 2**64), {}, f"seed must be in [0, 2**64), got {2**64}"),
        (("stochastic", -1), {}, "seed must be in [0, 2**64), got -1"),
        (
            ("nearest",),
            {"remainder": torch.zeros(2, 3).bfloat16()},
            'a remainder has no meaning for rounding="nearest"',
        ),
        (
            ("stochastic", 1),
            {"remainder": torch.zeros(2, 3).bfloat16()},
            'a remainder has no meaning for rounding="stochastic"',
        ),
        (
            ("compensated",),
            {"remainder": torch.zeros(3, 2).bfloat16()},
            "remainder is torch.bfloat16 (3, 2); weight is torch.bfloat16 (2, 3)",
        ),
        (
            ("compensated",),
            {"remainder": torch.zeros(2, 3)},
            "remainder is torch.float32 (2, 3); weight is torch.bfloat16 (2, 3)",
        ),
    ],
)
def test_arguments_that_do_not_go_together(arguments, options, message):
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    assert_refused(
        ValueError, message, weight, dense_shift(torch.ones(2, 3)), *arguments, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stochastic_is_for_16_bit_weights(dtype):
    message = f'rounding="stochastic" is for 16-bit weights, not {dtype}'
    weight = torch.ones(2, 3, dtype=dtype)
    assert_refused(ValueError, message, weight, dense_shift(torch.ones(2, 3)), "stochastic", 1)


def test_another_device():
    shift = dense_shift(torch.ones(2, 3, device="meta"))
    assert_refused(ValueError, "weight is on cpu and shift on meta", torch.ones(2, 3), shift)
    with pytest.raises(ValueError, match="weight is on cpu and remainder on meta"):
        apply_shift_(
            torch.ones(2, 3),
            dense_shift(torch.ones(2, 3)),
            "compensated",
            remainder=torch.zeros(2, 3, device="meta"),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["left", "right", "matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", ["auto", "torch", "reference"])
def test_shift_that_is_not_finite(chosen, dtype, where, value, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 4)
    parts = {"left": torch.zeros(2, 3), "right": torch.ones(2, 4)}
    if where == "matrix":
        parts = {"matrix": torch.zeros(3, 4)}
    parts[where][-1, -1] = value
    shift = Shift("primal" if where == "matrix" else "dual", 2, **parts)
    weight = random_rows(3, 4, dtype=dtype)
    with backend(chosen):
        assert_refused(NonFiniteError, "the shift (3, 4) holds NaN or infinity", weight, shift)
        assert_refused(
            NonFiniteError,
            "the shift (3, 4) holds NaN or infinity",
            weight,
            shift,
            "compensated",
            remainder=torch.zeros_like(weight),
        )


@pytest.mark.parametrize(
    ("start", "value"), [(6e4, 6e3), (-6e4, -6e3), (0.0, 7e4), (65504.0, 16.0), (65500.0, 60.0)]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("chosen", ["auto", "torch"])
def test_float16_overflow_is_refused(chosen, rounding, start, value, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 3)
    with backend(chosen):
        refuse_float16_overflow(rounding, start, value)


def refuse_float16_overflow(rounding, start, value):
    weight = torch.zeros(3, 3, dtype=torch.float16)
    weight[2, 2] = start
    matrix = torch.zeros(3, 3)
    matrix[2, 2] = value
    options = {}
    if rounding == "stochastic":
        options = {"seed": 1}
    if rounding == "compensated":
        options = {"remainder": torch.zeros_like(weight)}
    message = (
        f"a shift of up to {abs(value):.3g} on a torch.float16 weight of up to "
        f"{abs(weight[2, 2].item()):.3g} could exceed 6.55e+04"
    )
    assert_refused(ShiftOverflowError, message, weight, dense_shift(matrix), rounding, **options)
    # The remainder counts as well.
    weight[2, 2], matrix[2, 2] = 6.5e4, 4e2
    apply_shift_(weight.clone(), dense_shift(matrix))
    full = torch.zeros_like(weight)
    full[2, 2] = 4e2
    with pytest.raises(ShiftOverflowError):
        apply_shift_(weight, dense_shift(matrix), "compensated", remainder=full)
    assert weight[2, 2] == 6.5e4


@pytest.mark.parametrize("chosen", ["auto", "torch", "reference"])
def test_a_float16_weight_near_its_limit_takes_a_shift_that_fits(chosen):
    # The norm of a row of the shift would not fit, and no entry of it is that large.
    weight = torch.full((3, 900), 65440.0, dtype=torch.float16)
    with backend(chosen):
        apply_shift_(weight, dense_shift(torch.full((3, 900), 32.0)))
        assert (weight == 65472.0).all()
        apply_shift_(weight, dense_shift(torch.full((3, 900), 2.0)))
    assert (weight == 65472.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_overflow_of_wider_ranges_is_refused(dtype):
    weight = torch.full((2, 3), 3e38, dtype=dtype)
    shift = Shift("dual", 1, left=torch.full((1, 2), 1e19), right=torch.full((1, 3), 1e19))
    message = f"could exceed {torch.finfo(dtype).max:.3g}"
    assert_refused(ShiftOverflowError, message, weight, shift)
    assert_refused(ShiftOverflowError, message, weight, dense_shift(torch.full((2, 3), 1e38)))


def test_float16_up_to_its_limit_is_fine():
    weight = torch.full((2, 3), 6e4, dtype=torch.float16)
    apply_shift_(weight, dense_shift(torch.full((2, 3), 4992.0)))
    assert weight.tolist() == [[64992.0] * 3] * 2
