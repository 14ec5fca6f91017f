"""edit_values: the kernel against ``v = −lr · ‖k̂‖² · ĝ`` in float64."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, lay_out, random_rows, same_bits
from ops.tolerances import assert_as_accurate
from torch import Tensor

from pyeditfast.ops import RunningMoments, edit_values
from pyeditfast_kernels import edit_values as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

EPSILON = 2.0**-23

# Roundings beside those of the sum: mean, scale, difference and product of a key, counted twice for
# its square, and of a gradient; the square, the learning rate and the last product.
STEPS = 15


def moments_of(d_in: int, d_out: int, device: torch.device) -> RunningMoments:
    """Return moments of features with different means and deviations, one of them constant."""
    size = d_in + d_out
    count = 50
    spread = 0.5 + torch.rand(size, dtype=torch.float64, generator=torch.manual_seed(3))
    spread[size // 2] = 0.0
    moments = RunningMoments(size, device=device)
    moments.load_state_dict(
        {
            "count": torch.tensor(count),
            "mean": random_rows(size, dtype=torch.float64, seed=5),
            "squares": (count - 1) * spread.square(),
        }
    )
    return moments


def formula(
    keys: Tensor, grads: Tensor, moments: RunningMoments, lr: float, dtype: torch.dtype
) -> Tensor:
    """Return the values by the plain formula in ``dtype``, on the CPU."""
    rows = torch.cat([keys.cpu().to(dtype), grads.cpu().to(dtype)], -1)
    rows = (rows - moments.mean.cpu().to(dtype)) / (moments.std.cpu().to(dtype) + EPSILON)
    keys_hat, grads_hat = rows.split([keys.shape[-1], grads.shape[-1]], -1)
    return -lr * keys_hat.norm(dim=-1, keepdim=True).square() * grads_hat


def constant_features_at_their_mean(keys: Tensor, grads: Tensor, moments: RunningMoments) -> None:
    """Let the constant feature be its mean, as it is in a real turn; otherwise eps rules all."""
    at = moments.size // 2
    part, column = (keys, at) if at < keys.shape[-1] else (grads, at - keys.shape[-1])
    part[..., column] = moments.mean[at].to(part)
    moments._mean[at] = part[..., column].flatten()[0].double()


def inputs(
    *sizes: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> tuple[Tensor, Tensor, RunningMoments]:
    """Return keys ``[..., n, d_in]``, gradients ``[..., n, d_out]`` and moments of both."""
    *rows, d_in, d_out = sizes
    moments = moments_of(d_in, d_out, device)
    keys = (scale * (1.0 + random_rows(*rows, d_in, scale=2.0))).to(device, dtype)
    grads = random_rows(*rows, d_out, seed=1, scale=scale).to(device, dtype)
    if keys.shape[:-1].numel():
        constant_features_at_their_mean(keys, grads, moments)
    return keys, grads, moments


def assert_equals_formula(keys: Tensor, grads: Tensor, moments: RunningMoments, lr=1e-6) -> None:
    result = edit_values(keys, grads, moments, lr)
    assert result.device == keys.device
    assert_as_accurate(
        result.cpu(),
        formula(keys, grads, moments, lr, torch.float32),
        formula(keys, grads, moments, lr, torch.float64),
        keys.shape[-1] + STEPS,
    )


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1),
        (1, 7, 2),
        (5, 1, 7),
        (31, 101, 53),
        (2, 4096, 4096),
        (3, 4097, 5),
        (3, 5, 4099),
        (2, 9001, 8209),
        (2, 3, 5, 7, 11),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(device, dtype, sizes):
    assert_equals_formula(*inputs(*sizes, dtype=dtype, device=device))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_rows_a_program(device, dtype, n, monkeypatch):
    monkeypatch.setattr(kernels, "FOUR_ROWS_FROM", 1)
    assert kernels.choose_config(n) is kernels.FOUR_ROWS
    assert_equals_formula(*inputs(n, 1500, 1031, dtype=dtype, device=device))


def test_few_rows_have_a_program_each():
    assert kernels.choose_config(kernels.FOUR_ROWS_FROM - 1) is kernels.ONE_ROW
    assert kernels.choose_config(kernels.FOUR_ROWS_FROM) is kernels.FOUR_ROWS


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 9),
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    lr=st.sampled_from([1e-6, 0.5, 3]),
)
def test_any_shape(device, n, d_in, d_out, dtype, lr):
    assert_equals_formula(*inputs(n, d_in, d_out, dtype=dtype, device=device), lr)


def test_by_hand(device):
    # Mean 0 and deviation 1 for all: the state of three rows with squares of 2.
    moments = RunningMoments(3, device=device)
    moments.load_state_dict(
        {"count": torch.tensor(3), "mean": torch.zeros(3), "squares": torch.full((3,), 2.0)}
    )
    keys, grads = torch.tensor([[3.0, 4.0]]), torch.tensor([[-2.0]])
    values = edit_values(keys.to(device), grads.to(device), moments, 0.1)
    # −0.1 · (9 + 16) · −2
    assert values.item() == pytest.approx(5.0, rel=1e-6)


def test_keys_and_gradients_of_different_dtypes(device):
    keys, grads, moments = inputs(5, 29, 17, dtype=torch.float32, device=device)
    moments._mean.zero_()
    keys[:, 23], moments._mean[23] = 0.0, 0.0
    assert_equals_formula(keys.bfloat16(), grads, moments)
    assert_equals_formula(keys, grads.half(), moments)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e9),
        (torch.float32, 1e-9),
        (torch.bfloat16, 1e9),
        (torch.bfloat16, 1e-9),
        (torch.float16, 6e3),
        (torch.float16, 1e-6),
    ],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale):
    assert_equals_formula(*inputs(9, 301, 57, dtype=dtype, device=device, scale=scale))


@pytest.mark.parametrize("row", [0, 3, 4])
def test_a_bad_number_stays_in_its_row(device, row, monkeypatch):
    monkeypatch.setattr(kernels, "FOUR_ROWS_FROM", 1)
    keys, grads, moments = inputs(5, 29, 17, dtype=torch.float32, device=device)
    expected = edit_values(keys, grads, moments, 1e-6)
    keys[row, 7] = float("nan")
    result = edit_values(keys, grads, moments, 1e-6)
    assert result[row].isnan().all()
    others = [other for other in range(5) if other != row]
    assert same_bits(result[others], expected[others])


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_and_not_written(device, dtype, layout):
    plain_keys, plain_grads, moments = inputs(13, 29, 17, dtype=dtype, device=device)
    keys, keys_storage = (part.to(device) for part in lay_out(plain_keys, layout))
    grads, grads_storage = (part.to(device) for part in lay_out(plain_grads, layout))
    before = keys_storage.clone(), grads_storage.clone()
    result = edit_values(keys, grads, moments, 1e-6)
    assert same_bits(result, edit_values(plain_keys, plain_grads, moments, 1e-6))
    assert same_bits(keys_storage, before[0]) and same_bits(grads_storage, before[1])


def test_leading_dimensions_that_cannot_be_joined(device):
    keys, grads, moments = inputs(3, 5, 29, 17, dtype=torch.float32, device=device)
    expected = edit_values(keys, grads, moments, 1e-6)
    swapped = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (keys, grads)]
    assert same_bits(edit_values(*swapped, moments, 1e-6), expected)


def test_parts_of_one_matrix(device):
    keys, grads, moments = inputs(13, 29, 17, dtype=torch.bfloat16, device=device)
    joined = torch.cat([keys, grads], -1)
    expected = edit_values(keys, grads, moments, 1e-6)
    assert same_bits(edit_values(joined[:, :29], joined[:, 29:], moments, 1e-6), expected)


def test_expanded_inputs(device):
    keys, grads, moments = inputs(1, 29, 17, dtype=torch.float32, device=device)
    once = edit_values(keys, grads, moments, 1e-6)
    result = edit_values(keys.expand(5, 29), grads.expand(5, 17), moments, 1e-6)
    assert same_bits(result, once.repeat(5, 1))


@pytest.mark.parametrize("sizes", [(0, 7, 3), (3, 0, 7, 3), (0, 2, 7, 3), (4, 7, 0)], ids=str)
def test_empty_inputs(device, sizes):
    *rows, d_in, d_out = sizes
    moments = RunningMoments(d_in + d_out, device=device)
    keys = torch.ones(*rows, d_in, device=device)
    result = edit_values(keys, torch.ones(*rows, d_out, device=device), moments, 1e-6)
    assert result.shape == (*rows, d_out) and result.dtype == torch.float32


def test_no_key_features(device):
    moments = RunningMoments(3, device=device)
    keys, grads = torch.ones(4, 0, device=device), torch.ones(4, 3, device=device)
    assert torch.equal(edit_values(keys, grads, moments, 1e-6), torch.zeros(4, 3, device=device))


# Repeatability, refusals.


@pytest.mark.parametrize("config", [kernels.ONE_ROW, kernels.FOUR_ROWS], ids=lambda c: c.name)
def test_gives_the_same_bits_twice(device, config, monkeypatch):
    monkeypatch.setattr(kernels, "choose_config", lambda n: config)
    keys, grads, moments = inputs(9, 1031, 517, dtype=torch.bfloat16, device=device)
    first, second = (edit_values(keys, grads, moments, 1e-6) for _ in range(2))
    assert same_bits(first, second)


def test_a_row_gives_the_same_bits_wherever_it_stands(device):
    keys, grads, moments = inputs(9, 1031, 517, dtype=torch.bfloat16, device=device)
    whole = edit_values(keys, grads, moments, 1e-6)
    assert same_bits(edit_values(keys[4:7], grads[4:7], moments, 1e-6), whole[4:7])


@pytest.mark.parametrize("which", [0, 1])
def test_float64_is_refused(device, which):
    parts = [torch.ones(2, 3, device=device), torch.ones(2, 4, device=device)]
    parts[which] = parts[which].double()
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        edit_values(*parts, RunningMoments(7, device=device), 1e-6)
