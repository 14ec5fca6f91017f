"""edit_values in C++: as accurate as torch, the same bits for every thread count."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from thread_counts import assert_same_bits_on_any_threads
from tolerances import assert_as_accurate

from pyeditfast.backends import backend
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.ops import RunningMoments, edit_values

extension = load_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=extension_status())

SIXTEEN_AND_32_BITS = (torch.bfloat16, torch.float16, torch.float32)


def case(*sizes, dtype=torch.float32, grad_dtype=None):
    """Return keys, gradients and their moments; sizes [..., n, d_in, d_out]."""
    *lead, n, d_in, d_out = sizes
    keys = random_rows(*lead, n, d_in, seed=1, dtype=dtype)
    grads = random_rows(*lead, n, d_out, seed=2, dtype=grad_dtype or dtype, scale=0.1)
    moments = RunningMoments(d_in + d_out)
    moments.update(random_rows(50, d_in + d_out, seed=3, scale=2.0) + 0.5)
    return keys, grads, moments


@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("grad_dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 13, 31), (2, 3, 17, 11), (3, 2051, 1025)])
def test_as_accurate_as_torch(dtype, grad_dtype, sizes):
    keys, grads, moments = case(*sizes, dtype=dtype, grad_dtype=grad_dtype)
    with backend("torch"):
        naive = edit_values(keys, grads, moments, 1e-6)
    with backend("cpp"):
        result = edit_values(keys, grads, moments, 1e-6)
    mean, scale = moments.mean_and_scale(torch.device("cpu"))
    d_in = keys.shape[-1]
    keys_hat = (keys.double() - mean[:d_in].double()) * scale[:d_in].double()
    grads_hat = (grads.double() - mean[d_in:].double()) * scale[d_in:].double()
    exact = -1e-6 * keys_hat.square().sum(-1, keepdim=True) * grads_hat
    assert_as_accurate(result, naive, exact, d_in)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    keys, grads, moments = case(2, 9, 1037, 61, dtype=torch.bfloat16)
    with backend("cpp"):
        expected = edit_values(keys, grads, moments, 1e-6)
        views = lay_out(keys, layout)[0], lay_out(grads, layout)[0]
        assert same_bits(edit_values(*views, moments, 1e-6), expected)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 5), (3, 5, 0), (0, 0, 5)])
def test_empty(sizes):
    n, d_in, d_out = sizes
    moments = RunningMoments(d_in + d_out)
    moments.update(random_rows(9, d_in + d_out))
    with backend("cpp"):
        values = edit_values(torch.ones(n, d_in), torch.ones(n, d_out), moments, 1e-6)
    assert values.shape == (n, d_out)
    # A key without features has the square 0.
    assert (values == 0).all()


def test_thread_counts_give_the_same_bits():
    keys, grads, moments = case(300, 1031, 257, dtype=torch.bfloat16)
    with backend("cpp"):
        assert_same_bits_on_any_threads(lambda: edit_values(keys, grads, moments, 1e-6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "got -1 and 5"),
        ({"d_in": -1}, "got 3 and -1"),
        ({"d_out": -2}, "got 3 and -2"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"mean": 0}, "mean is a null pointer, but has 12 elements"),
        ({"scale": 0}, "scale is a null pointer, but has 12 elements"),
        ({"keys": (0, 5, 1, 0)}, "keys is a null pointer"),
        ({"grads": (64, -7, 1, 0)}, "grads has strides -7 and 1"),
        ({"values": (64, 6, 1, 0)}, "values has strides 6 and 1: its 3 x 7 elements"),
    ],
)
def test_the_compiled_function_refuses_bad_arguments(changes, message):
    keys, grads, values = torch.ones(3, 5), torch.ones(3, 7), torch.ones(3, 7)
    numbers = torch.ones(12)
    arguments = {
        "values": (values.data_ptr(), 7, 1, extension.FLOAT32),
        "keys": (keys.data_ptr(), 5, 1, extension.FLOAT32),
        "grads": (grads.data_ptr(), 7, 1, extension.FLOAT32),
        **{"mean": numbers.data_ptr(), "scale": numbers.data_ptr()},
        **{"rows": 3, "d_in": 5, "d_out": 7, "lr": 1.0, "threads": 2},
    }
    with pytest.raises(ValueError, match=message):
        extension.edit_values(**{**arguments, **changes})
    assert (values == 1).all()
