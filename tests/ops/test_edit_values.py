"""edit_values: ``v = −lr · ‖k̂‖² · ĝ``."""

from __future__ import annotations

import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from tolerances import UNIT_ROUNDOFF, assert_as_accurate, largest_error
from torch import Tensor

from pyeditfast import backend, reference
from pyeditfast.ops import RunningMoments, edit_values

EPSILON = 2.0**-23

# Roundings beside those of the sum: mean, scale, difference and product of a key, counted twice for
# its square, and of a gradient; the square, the learning rate and the last product.
STEPS = 15

# [..., n, d_in, d_out]
SIZES = [
    (1, 1, 1),
    (5, 7, 1),
    (5, 1, 7),
    (31, 101, 53),
    (2, 13, 29, 17),
    (2, 3, 5, 7, 11),
    (400, 3000, 512),
]


def inputs(*sizes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return keys around 1 and gradients around 1e-3."""
    *rows, d_in, d_out = sizes
    keys = 1.0 + random_rows(*rows, d_in, scale=2.0)
    return keys.to(dtype), random_rows(*rows, d_out, seed=1, scale=1e-3).to(dtype)


def moments_of(keys: Tensor, grads: Tensor) -> RunningMoments:
    """Return the moments of these rows and of some that came before."""
    d_in, d_out = keys.shape[-1], grads.shape[-1]
    moments = RunningMoments(d_in + d_out)
    moments.update(*inputs(50, d_in, d_out))
    moments.update(keys, grads)
    return moments


def formula(
    keys: Tensor, grads: Tensor, moments: RunningMoments, lr: float, dtype: torch.dtype
) -> Tensor:
    """Return the values by the plain formula in ``dtype``."""
    rows = torch.cat([keys.to(dtype), grads.to(dtype)], -1)
    rows = (rows - moments.mean.to(dtype)) / (moments.std.to(dtype) + EPSILON)
    keys_hat, grads_hat = rows.split([keys.shape[-1], grads.shape[-1]], -1)
    return -lr * keys_hat.norm(dim=-1, keepdim=True).square() * grads_hat


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(dtype, sizes):
    keys, grads = inputs(*sizes, dtype=dtype)
    moments = moments_of(keys, grads)
    result = edit_values(keys, grads, moments, 1e-6)
    assert_as_accurate(
        result,
        formula(keys, grads, moments, 1e-6, torch.float32),
        formula(keys, grads, moments, 1e-6, torch.float64),
        sizes[-2] + STEPS,
    )


def test_by_hand():
    # Mean 0 and deviation 1 for all: the state of three rows with squares of 2.
    moments = RunningMoments(3)
    moments.load_state_dict(
        {"count": torch.tensor(3), "mean": torch.zeros(3), "squares": torch.full((3,), 2.0)}
    )
    values = edit_values(torch.tensor([[3.0, 4.0]]), torch.tensor([[-2.0]]), moments, 0.1)
    # −0.1 · (9 + 16) · −2
    assert values.item() == pytest.approx(5.0, rel=1e-6)


def test_values_point_against_the_normalized_gradient():
    keys, grads = inputs(31, 29, 17)
    moments = moments_of(keys, grads)
    normalized = moments.normalize(torch.cat([keys, grads], -1))[:, 29:]
    values = edit_values(keys, grads, moments, 1e-6)
    assert torch.equal(values.sign(), -normalized.sign())


def test_is_linear_in_the_learning_rate():
    keys, grads = inputs(9, 29, 17)
    moments = moments_of(keys, grads)
    once, twice = (edit_values(keys, grads, moments, lr) for lr in (2.0**-20, 2.0**-19))
    assert torch.equal(2 * once, twice)
    assert not edit_values(keys, grads, moments, 0.0).any()


def test_constant_features_count_for_nothing():
    keys, grads = inputs(31, 29, 17)
    padded_keys = torch.cat([keys, torch.full((31, 3), 0.1)], -1)
    padded_grads = torch.cat([grads, torch.full((31, 2), -0.3)], -1)
    moments, padded_moments = RunningMoments(46), RunningMoments(51)
    moments.update(keys, grads)
    padded_moments.update(padded_keys, padded_grads)
    values = edit_values(keys, grads, moments, 1e-6)
    padded = edit_values(padded_keys, padded_grads, padded_moments, 1e-6)
    assert not padded[:, 17:].any()
    assert largest_error(padded[:, :17], values.double()) <= 1e-5


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_scale_of_the_gradients_cancels_down_to_eps(scale):
    keys, grads = inputs(31, 29, 17)
    plain, scaled = RunningMoments(46), RunningMoments(46)
    plain.update(keys, grads)
    scaled.update(keys, scale * grads)
    expected = edit_values(keys, grads, plain, 1e-6)
    result = edit_values(keys, scale * grads, scaled, 1e-6)
    if scale > 1:
        # What eps was beside a deviation of 1e-3 it is no longer.
        share = EPSILON / plain.std[29:].min().item()
        assert largest_error(result, expected.double()) <= 1.1 * share
    else:
        # A gradient far below eps is noise, and is not blown up.
        assert result.abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("n", "lead"), [(0, ()), (0, (3,)), (4, (0,)), (4, (2, 0))])
def test_empty_inputs(n, lead):
    moments = moments_of(*inputs(5, 7, 3))
    result = edit_values(torch.ones(*lead, n, 7), torch.ones(*lead, n, 3), moments, 1e-6)
    assert result.shape == (*lead, n, 3) and result.dtype == torch.float32


def test_a_first_row_alone_gives_nothing():
    keys, grads = inputs(1, 7, 3)
    moments = RunningMoments(10)
    moments.update(keys, grads)
    assert not edit_values(keys, grads, moments, 1.0).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_not_written(dtype, layout):
    plain_keys, plain_grads = inputs(3, 13, 29, 17, dtype=dtype)
    keys, keys_storage = lay_out(plain_keys, layout)
    grads, grads_storage = lay_out(plain_grads, layout)
    before = keys_storage.clone(), grads_storage.clone()
    moments = moments_of(plain_keys, plain_grads)
    state = moments.state_dict()
    result = edit_values(keys, grads, moments, 1e-6)
    assert_as_accurate(
        result,
        formula(plain_keys, plain_grads, moments, 1e-6, torch.float32),
        formula(plain_keys, plain_grads, moments, 1e-6, torch.float64),
        29 + STEPS,
    )
    assert same_bits(keys_storage, before[0]) and same_bits(grads_storage, before[1])
    for name, value in moments.state_dict().items():
        assert same_bits(value, state[name])


def test_expanded_inputs():
    keys, grads = inputs(1, 29, 17)
    moments = moments_of(keys, grads)
    once = edit_values(keys, grads, moments, 1e-6)
    result = edit_values(keys.expand(5, 29), grads.expand(5, 17), moments, 1e-6)
    assert largest_error(result, once.double().repeat(5, 1)) <= 1e-6


def test_float32_inputs_that_need_no_conversion_are_not_overwritten():
    keys, grads = inputs(5, 7, 3)
    before = keys.clone(), grads.clone()
    edit_values(keys, grads, moments_of(keys, grads), 1e-6)
    assert same_bits(keys, before[0]) and same_bits(grads, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(dtype):
    keys, grads = inputs(61, 127, 31, dtype=dtype)
    moments = moments_of(keys, grads)
    first, second = (edit_values(keys, grads, moments, 1e-6) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("variance", ["unbiased", "published"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_float64_formula(dtype, variance):
    keys, grads = inputs(2, 13, 29, 17, dtype=dtype)
    moments, expected = RunningMoments(46, variance), reference.RunningMoments(46, variance)
    expected.update(keys.double().flatten(0, 1), grads.double().flatten(0, 1), segments=[10, 16])
    with backend("reference"):
        moments.update(keys, grads, segments=[10, 16])
        result = edit_values(keys, grads, moments, 1e-6)
    exact = reference.edit_values(keys.double(), grads.double(), expected, 1e-6)
    assert result.dtype == torch.float32
    assert largest_error(result, exact) <= 2 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize(
    ("keys", "grads", "error", "message"),
    [
        ([[1.0]], torch.ones(1, 1), TypeError, "keys is a list"),
        (torch.ones(2, 4), None, TypeError, "grads is a NoneType"),
        (torch.ones(2, 4).int(), torch.ones(2, 3), TypeError, "keys has dtype torch.int32"),
        (torch.ones(4), torch.ones(3), ValueError, "keys has shape (4,)"),
        (
            torch.ones(2, 4),
            torch.ones(3, 3),
            ValueError,
            "keys (2, 4) and grads (3, 3) differ before their last dimension",
        ),
        (
            torch.ones(2, 4),
            torch.ones(2, 4),
            ValueError,
            "keys (2, 4) and grads (2, 4) have 4 + 4 features; the moments have 7",
        ),
        (
            torch.ones(2, 4),
            torch.ones(2, 3, device="meta"),
            ValueError,
            "keys is on cpu and grads on meta",
        ),
    ],
)
def test_errors_show_the_offending_value(keys, grads, error, message):
    with pytest.raises(error, match=re.escape(message)):
        edit_values(keys, grads, RunningMoments(7), 1e-6)
