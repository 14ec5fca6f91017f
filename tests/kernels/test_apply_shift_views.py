"""apply_shift: views of any strides, the bytes around them, and what surrounds the kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from far_memory import Addresses, FarTensor
from ops.layouts import LAYOUTS, bits, empty_storage, random_rows, same_bits, view_of
from shift_cases import CASES, DTYPES, FACTORS, make_shift, weight_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pyeditfast.ops import Shift, apply_shift_
from pyeditfast_kernels import apply_shift as kernels
from pyeditfast_kernels.launch import interprets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_strided_weight_and_the_bytes_around_it(device, dtype, rounding, layout):
    sizes = (3, 4, 13, 17)
    plain, shift = weight_of(sizes, dtype, device), make_shift(*sizes, device=device)
    seed = 5 if rounding == "stochastic" else None
    plain_remainder = None
    if rounding == "compensated":
        plain_remainder = random_rows(3, 13, 17, scale=1e-5, seed=9).to(device, dtype)
    storages, views = [], []
    for tensor in (plain, plain_remainder):
        if tensor is not None:
            storages.append(empty_storage(tensor.shape, dtype, layout).to(device))
            views.append(view_of(storages[-1], layout))
            views[-1].copy_(tensor)
    weight, remainder = views[0], views[1] if len(views) > 1 else None
    before = [storage.clone() for storage in storages]

    apply_shift_(weight, shift, rounding, seed, remainder=remainder)
    apply_shift_(plain, shift, rounding, seed, remainder=plain_remainder)

    assert same_bits(weight, plain)
    if remainder is not None:
        assert same_bits(remainder, plain_remainder)
    for storage, old in zip(storages, before, strict=True):
        for memory in (storage, old):
            view_of(memory, layout).zero_()
        assert torch.equal(bits(storage), bits(old))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("right", FACTORS, ids=str)
def test_strided_factors_are_read_and_not_written(device, layout, right):
    sizes = (3, 19, 13, 17)
    shift = make_shift(*sizes, device=device, right=right)
    views, storages = [], []
    for factor in (shift.left, shift.right):
        storages.append(empty_storage(factor.shape, factor.dtype, layout).to(device))
        views.append(view_of(storages[-1], layout))
        views[-1].copy_(factor)
    before = [storage.clone() for storage in storages]
    weight, plain = (weight_of(sizes, torch.bfloat16, device) for _ in range(2))
    apply_shift_(weight, Shift("dual", 19, left=views[0], right=views[1]))
    assert same_bits(weight, apply_shift_(plain, shift))
    assert all(same_bits(*pair) for pair in zip(storages, before, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_leading_dimensions_that_cannot_be_joined(device, rounding):
    sizes = (3, 2, 4, 13, 17)
    shift = make_shift(*sizes, device=device)
    plain = weight_of(sizes, torch.bfloat16, device)
    weight = plain.transpose(0, 1).contiguous().transpose(0, 1)
    seed = 5 if rounding == "stochastic" else None
    apply_shift_(weight, shift, rounding, seed)
    assert same_bits(weight, apply_shift_(plain, shift, rounding, seed))


@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_conv1d_weight_is_passed_as_its_transpose(device, dtype, rounding):
    # GPT-2's Conv1D keeps [d_in, d_out].
    shift = make_shift(9, 64, 80, device=device)
    linear = weight_of((9, 64, 80), dtype, device)
    conv = linear.mT.contiguous()
    seed = 5 if rounding == "stochastic" else None
    remainders = [None, None]
    if rounding == "compensated":
        remainders = [torch.zeros_like(linear), torch.zeros_like(conv).mT]
    apply_shift_(linear, shift, rounding, seed, remainder=remainders[0])
    apply_shift_(conv.mT, shift, rounding, seed, remainder=remainders[1])
    assert same_bits(conv.mT, linear)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_empty_weights_and_empty_shifts(device, rank, rounding):
    for lead, d_out, d_in in (((), 0, 5), ((), 5, 0), ((0,), 3, 4), ((2, 0), 3, 4), ((), 3, 4)):
        weight = random_rows(*lead, d_out, d_in).to(device, torch.bfloat16)
        before = weight.clone()
        left = torch.zeros(*lead, rank, d_out, device=device)
        right = torch.ones(*lead, rank, d_in, device=device)
        seed = 1 if rounding == "stochastic" else None
        remainder = torch.zeros_like(weight) if rounding == "compensated" else None
        shift = Shift("dual", rank, left=left, right=right)
        apply_shift_(weight, shift, rounding, seed, remainder=remainder)
        assert torch.equal(weight, before)


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    weight = FarTensor(1 << 60, (3, 65, 33), torch.bfloat16, (1 << 46, 1 << 30, 1 << 20))
    remainder = FarTensor(1 << 61, (3, 65, 33), torch.bfloat16, (1 << 46, 1 << 20, 1 << 30))
    left = FarTensor(1 << 59, (3, 34, 65), torch.float32, (1 << 46, 1 << 30, 1 << 36))
    right = FarTensor(1 << 58, (3, 34, 33), torch.bfloat16, (1 << 46, 1 << 36, 1 << 30))
    kernels.apply_shift_(
        weight, left, right, "compensated", remainder=remainder, config=kernels.FINE
    )
    places = {
        tensor.address(*index)
        for tensor in (weight, remainder)
        for index in itertools.product(range(3), range(65), range(33))
    }
    factors = {
        tensor.address(*index)
        for tensor in (left, right)
        for index in itertools.product(*map(range, tensor.shape))
    }
    assert seen.stored == places
    assert seen.loaded == places | factors


# What surrounds the kernel.


class LargestNewTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation returns, ``known`` left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_no_temporary_of_the_size_of_the_weight(device, rounding):
    weight = weight_of((2, 300, 100), torch.bfloat16, device)
    shift = make_shift(2, 300, 100, device=device)
    remainder = torch.zeros_like(weight) if rounding == "compensated" else None
    known = [weight] if remainder is None else [weight, remainder]
    seed = 1 if rounding == "stochastic" else None
    with LargestNewTensor(*known, shift.left, shift.right) as seen:
        apply_shift_(weight, shift, rounding, seed, remainder=remainder)
    # The factors in float64, for the bound of the shift.
    assert seen.nbytes <= 2 * 300 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameter_that_requires_grad_is_changed_in_place(device, dtype):
    weight = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype, device=device))
    left, right = torch.ones(1, 3, device=device), torch.ones(1, 4, device=device)
    assert apply_shift_(weight, Shift("dual", 1, left=left, right=right)) is weight
    assert torch.equal(weight.detach(), torch.full((3, 4), 2.0, dtype=dtype, device=device))
    assert weight.requires_grad and weight.is_leaf and weight.grad is None


def test_a_backward_pass_notices_the_change(device):
    weight = torch.nn.Parameter(torch.ones(3, 4, device=device))
    x = torch.ones(2, 4, device=device, requires_grad=True)
    loss = (x @ weight.mT).sum()
    left, right = torch.ones(1, 3, device=device), torch.ones(1, 4, device=device)
    apply_shift_(weight, Shift("dual", 1, left=left, right=right))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
