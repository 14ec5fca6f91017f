"""The end of activation_gap in C++: as accurate as torch, differentiable through torch."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from thread_counts import assert_same_bits_on_any_threads
from tolerances import assert_as_accurate

from pyeditfast.backends import backend
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.reference.activation_gap import ACTIVATIONS, token_gaps

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.activation_gap")

extension = load_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=extension_status())

SIXTEEN_AND_32_BITS = (torch.bfloat16, torch.float16, torch.float32)


def gaps(main, side, activation):
    """Return the gaps of tokens: each is a query of its own."""
    queries = main.unsqueeze(-2), [side.unsqueeze(-2)]
    return op.gaps_of_outputs(*queries, activation, "mean", None).squeeze(-1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("shape", [(7, 31), (5, 1024), (3, 2051)])
@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
def test_as_accurate_as_torch(activation, dtype, shape, scale):
    main = random_rows(*shape, dtype=dtype, scale=scale)
    side = (main.double() + random_rows(*shape, seed=1, scale=0.3).double()).to(dtype)
    exact = token_gaps(main.double(), side.double(), activation)
    naive = token_gaps(main.float(), side.float(), activation)
    with backend("cpp"):
        assert_as_accurate(gaps(main, side, activation), naive, exact, shape[-1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single_outputs_over_the_whole_range(activation):
    """The activation itself: the gap between an output and 0, where every activation is 0."""
    x = torch.cat([torch.linspace(-12, 12, 24_001), torch.logspace(-15, 4, 1000)])
    x = torch.cat([x, -x]).unsqueeze(-1)
    exact = ACTIVATIONS[activation](x.double()).abs().squeeze(-1)
    with backend("cpp"):
        result = gaps(torch.zeros_like(x), x, activation)
    error = (result.double() - exact).abs()
    # Of the result, or of what is subtracted where it comes near 0.
    largest = torch.maximum(exact, x.double().abs().squeeze(-1) / 2)
    assert (error <= 2.0**-22 * largest).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [math.nan, 1e15])
def test_nan_and_large_numbers(activation, value):
    main, side = torch.zeros(3, 40), torch.zeros(3, 40)
    side[1, 17] = value
    with backend("cpp"):
        result = gaps(main, side, activation)
    expected = token_gaps(main.double(), side.double(), activation).float()
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    main, side = random_rows(2, 9, 1037), random_rows(2, 9, 1037, seed=1)
    with backend("cpp"):
        expected = gaps(main, side, "silu")
        views = lay_out(main, layout)[0], lay_out(side, layout)[0]
        assert same_bits(gaps(*views, "silu"), expected)


def test_mask_and_reductions():
    main, side = random_rows(4, 130, 33), random_rows(4, 130, 33, seed=1)
    mask = torch.ones(4, 130, dtype=torch.bool)
    mask[0, 60:] = False
    mask[1] = False
    side[0, 90] = math.nan
    for reduction in ("mean", "max", "auto"):
        with backend("torch"):
            expected = op.gaps_of_outputs(main, [side, main], "gelu", reduction, mask)
        with backend("cpp"):
            result = op.gaps_of_outputs(main, [side, main], "gelu", reduction, mask)
        torch.testing.assert_close(result, expected)
        assert (result[:, 1] == 0).all()


def test_thread_counts_give_the_same_bits():
    main, side = random_rows(300, 1031), random_rows(300, 1031, seed=1)
    with backend("cpp"):
        assert_same_bits_on_any_threads(lambda: gaps(main, side, "gelu"))


def test_gradients_go_through_torch():
    main, side = random_rows(3, 5), random_rows(3, 5, seed=1).requires_grad_()
    gaps(main, side, "silu").sum().backward()
    assert side.grad.abs().sum() > 0
    with backend("cpp"), pytest.raises(ValueError, match="the C\\+\\+ form has no backward pass"):
        gaps(main, side, "silu")
    with backend("cpp"), torch.no_grad():
        assert not gaps(main, side, "silu").requires_grad


def test_empty():
    with backend("cpp"):
        assert gaps(torch.ones(0, 5), torch.ones(0, 5), None).shape == (0,)
        assert gaps(torch.ones(3, 0), torch.ones(3, 0), "silu").tolist() == [0.0, 0.0, 0.0]


def test_float64_goes_through_torch():
    main, side = random_rows(3, 5, dtype=torch.float64), random_rows(3, 5, dtype=torch.float64)
    assert gaps(main, side, None).dtype == torch.float64
    with backend("cpp"), pytest.raises(ValueError, match=r"not torch\.float64"):
        gaps(main, side, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "got -1 and 5"),
        ({"d_out": -1}, "got 3 and -1"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"activation": 5}, "activation must be from 0 to 4, got 5"),
        ({"activation": -1}, "activation must be from 0 to 4, got -1"),
        ({"gaps": 0}, "gaps is a null pointer, but there are 3 tokens"),
        ({"main": (0, 5, 1, 0)}, "main is a null pointer"),
        ({"side": (64, 5, -1, 0)}, "side has strides 5 and -1"),
    ],
)
def test_the_compiled_function_refuses_bad_arguments(changes, message):
    main, side, out = torch.ones(3, 5), torch.ones(3, 5), torch.full((3,), 7.0)
    arguments = {
        "main": (main.data_ptr(), 5, 1, extension.FLOAT32),
        "side": (side.data_ptr(), 5, 1, extension.FLOAT32),
        **{"tokens": 3, "d_out": 5, "activation": 0, "gaps": out.data_ptr(), "threads": 2},
    }
    with pytest.raises(ValueError, match=message):
        extension.activation_gap(**{**arguments, **changes})
    assert (out == 7).all()
