"""A matrix as what differs from another: every bit comes back, in less room."""

from __future__ import annotations

import pytest
import torch

from pyeditfast.editors.sparse_difference import decode, encode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (16, 24), (0, 3)])
def test_every_bit_comes_back(dtype, shape):
    torch.manual_seed(0)
    base = torch.randn(shape).to(dtype)
    matrix = torch.where(torch.rand(shape) < 0.3, torch.randn(shape).to(dtype), base)
    assert torch.equal(decode(encode(matrix, base), base), matrix)


def test_negative_zero_and_nan_are_kept():
    base = torch.tensor([[0.0, 1.0, 2.0, torch.nan]])
    matrix = torch.tensor([[-0.0, torch.nan, 2.0, torch.nan]])
    found = decode(encode(matrix, base), base)
    assert torch.equal(found.view(torch.int32), matrix.view(torch.int32))
    assert encode(matrix, base)["values"].numel() == 2


def test_transposed_matrices():
    base = torch.randn(6, 5).T
    matrix = base + torch.eye(5, 6)
    assert torch.equal(decode(encode(matrix, base), base), matrix)


def test_takes_a_quarter_of_the_room_where_a_fifth_differs():
    torch.manual_seed(0)
    base = torch.randn(512, 512).bfloat16()
    matrix = torch.where(torch.rand(512, 512) < 0.2, base + 1, base)
    room = sum(part.numel() * part.element_size() for part in encode(matrix, base).values())
    assert room < 0.28 * matrix.numel() * matrix.element_size()


def test_the_base_is_left_alone():
    base = torch.zeros(3, 3)
    decode(encode(torch.ones(3, 3), base), base)
    assert torch.equal(base, torch.zeros(3, 3))


def test_refuses_parts_that_do_not_fit():
    base = torch.zeros(4, 4)
    encoded = encode(torch.eye(4), base)
    with pytest.raises(ValueError, match=r"does not fit a matrix \(5, 5\)"):
        decode(encoded, torch.zeros(5, 5))
    with pytest.raises(ValueError, match="float32"):
        decode(encoded, base.double())
    with pytest.raises(ValueError, match="3 values for 4 places"):
        decode({**encoded, "values": encoded["values"][:3]}, base)
