"""apply_shift_: ``W += Δᵀ`` in place, rounded once, whatever the layout and the chunks."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, bits, lay_out, random_rows, same_bits, view_of
from shifts import (
    CASES,
    HALVES,
    SIZES,
    assert_nearest,
    dense_shift,
    every_value,
    exact_neighbours,
    exact_sum,
    make_shift,
    weight_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pyeditfast import backend, reference
from pyeditfast.ops import Shift, apply_shift_, solve_shift

# The package exports a function of nearly the same name.
op = importlib.import_module("pyeditfast.ops.apply_shift")

# Nearest.


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_is_the_rounded_exact_sum(dtype, sizes, form):
    weight, shift = weight_of(sizes, dtype), make_shift(form, *sizes)
    before = weight.clone()
    parts = [part.clone() for part in (shift.left, shift.right, shift.matrix) if part is not None]
    assert apply_shift_(weight, shift) is weight
    assert_nearest(weight, before, shift)
    assert not torch.equal(weight, before)
    after = [part for part in (shift.left, shift.right, shift.matrix) if part is not None]
    assert all(same_bits(a, b) for a, b in zip(parts, after, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounds_once(rounding):
    # 1 + 2⁻⁸ lies half way between two bfloat16 values. Rounding the shift to bfloat16 first, or
    # adding its two halves one after the other, loses the 2⁻²⁰ that decides.
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    left = torch.tensor([[2.0**-8], [2.0**-20]])
    shift = Shift("dual", 2, left=left, right=torch.ones(2, 4))
    if rounding == "nearest":
        assert torch.equal(apply_shift_(weight, shift).float(), torch.full((1, 4), 1 + 2.0**-7))
    else:
        apply_shift_(weight, shift, rounding, seed=0)
        assert set(weight.flatten().tolist()) <= {1.0, 1 + 2.0**-7}


def test_nearest_rounds_ties_to_even():
    weight = torch.tensor([[1.0, 1 + 2.0**-7]], dtype=torch.bfloat16)
    apply_shift_(weight, dense_shift(torch.full((1, 2), 2.0**-8)))
    assert weight.tolist() == [[1.0, 1 + 2.0**-6]]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nearest_loses_what_is_below_half_a_spacing(dtype):
    weight = torch.full((3, 5), 0.02, dtype=dtype)
    spacing = torch.finfo(dtype).eps * 2.0**-6
    before = weight.clone()
    for _ in range(100):
        apply_shift_(weight, dense_shift(torch.full((3, 5), 0.45 * spacing)))
    assert same_bits(weight, before)


def test_float64_weight_is_summed_in_float64():
    weight = torch.ones(2, 3, dtype=torch.float64)
    apply_shift_(weight, dense_shift(torch.full((2, 3), 2.0**-40)))
    assert torch.equal(weight, torch.full((2, 3), 1 + 2.0**-40, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["left", "right", "both", "matrix"])
def test_shift_of_another_dtype(dtype, part):
    # Numbers that every dtype holds, so that only the conversions are tried.
    left, right = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.25, 1.0, -4.0]])
    shift = {
        "left": lambda: Shift("dual", 1, left=left.double(), right=right),
        "right": lambda: Shift("dual", 1, left=left, right=right.bfloat16()),
        "both": lambda: Shift("dual", 1, left=left.double(), right=right.double()),
        "matrix": lambda: dense_shift((left.mT @ right).double()),
    }[part]()
    weight = torch.ones(2, 3, dtype=dtype)
    apply_shift_(weight, shift)
    assert torch.equal(weight.float(), 1 + left.mT @ right)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_empty_weights_and_empty_shifts(rank, rounding):
    for lead, d_out, d_in in (((), 0, 5), ((), 5, 0), ((0,), 3, 4), ((2, 0), 3, 4), ((), 3, 4)):
        weight = random_rows(*lead, d_out, d_in, dtype=torch.bfloat16)
        before = weight.clone()
        shift = Shift(
            "dual", rank, left=torch.zeros(*lead, rank, d_out), right=torch.ones(*lead, rank, d_in)
        )
        seed = 1 if rounding == "stochastic" else None
        remainder = torch.zeros_like(weight) if rounding == "compensated" else None
        assert apply_shift_(weight, shift, rounding, seed, remainder=remainder) is weight
        assert same_bits(weight, before)


# Views, and the bytes around them.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_strided_weight_and_the_bytes_around_it(dtype, rounding, form, layout, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 40)
    sizes = (3, 4, 13, 17)
    plain, shift = weight_of(sizes, dtype), make_shift(form, *sizes)
    seed = 5 if rounding == "stochastic" else None
    weight, storage = lay_out(plain, layout)
    plain_remainder, remainder, remainder_storage = None, None, torch.zeros(0)
    if rounding == "compensated":
        plain_remainder = random_rows(3, 13, 17, dtype=dtype, scale=1e-5, seed=9)
        remainder, remainder_storage = lay_out(plain_remainder, layout)
    before = storage.clone(), remainder_storage.clone()

    apply_shift_(weight, shift, rounding, seed, remainder=remainder)
    apply_shift_(plain, shift, rounding, seed, remainder=plain_remainder)

    if rounding == "nearest":
        assert_nearest(weight, view_of(before[0], layout), shift)
    if form == "primal" or dtype != torch.float32:
        assert same_bits(weight, plain)
    if remainder is not None:
        assert same_bits(remainder, plain_remainder)
    changed = [(storage, before[0])]
    if remainder is not None:
        changed.append((remainder_storage, before[1]))
    for now, then in changed:
        now = now.clone()
        view_of(now, layout).zero_()
        view_of(then, layout).zero_()
        assert torch.equal(bits(now), bits(then))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_weight_is_passed_as_its_transpose(dtype):
    # GPT-2's Conv1D keeps [d_in, d_out].
    keys, values = random_rows(9, 23), random_rows(9, 13, seed=1, scale=1e-2)
    shift = solve_shift(keys, values)
    conv_weight = random_rows(23, 13, dtype=dtype, scale=0.02)
    linear_weight = conv_weight.mT.contiguous()
    apply_shift_(conv_weight.T, shift)
    apply_shift_(linear_weight, shift)
    assert conv_weight.is_contiguous()
    if dtype == torch.float32:
        assert torch.allclose(conv_weight.mT, linear_weight, rtol=0.0, atol=1e-8)
    else:
        assert torch.equal(conv_weight.mT, linear_weight)


def test_parameter_that_requires_grad_is_changed_in_place():
    for dtype in DTYPES:
        weight = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
        assert apply_shift_(weight, dense_shift(torch.ones(3, 4))) is weight
        assert torch.equal(weight.detach(), torch.full((3, 4), 2.0, dtype=dtype))
        assert weight.requires_grad and weight.is_leaf and weight.grad is None


@pytest.mark.parametrize("shape", [(4, 1, 3), (1, 4, 3)], ids=str)
def test_elements_that_share_memory_are_refused(shape):
    storage = torch.zeros(1, 1, 3)
    weight = storage.expand(shape)
    message = f"weight {shape} has strides {weight.stride()}: elements share memory"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_shift_(weight, dense_shift(torch.ones(shape)))
    assert not storage.any()
    weight, remainder = torch.zeros(shape), torch.zeros(1, 1, 3).expand(shape)
    with pytest.raises(ValueError, match=re.escape(f"remainder {shape} has strides")):
        apply_shift_(weight, dense_shift(torch.ones(shape)), "compensated", remainder=remainder)
    assert not weight.any()


# Chunks.


@pytest.mark.parametrize("elements", [1, 31, 32, 100, 10_000])
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_chunks_do_not_change_the_bits(dtype, rounding, elements, monkeypatch):
    sizes = (2, 3, 4, 13, 31)
    seed = 7 if rounding == "stochastic" else None
    whole, cut = weight_of(sizes, dtype), weight_of(sizes, dtype)
    remainders = [torch.zeros_like(whole) if rounding == "compensated" else None for _ in "ab"]
    shift = make_shift("primal", *sizes)
    apply_shift_(whole, shift, rounding, seed, remainder=remainders[0])
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", elements)
    apply_shift_(cut, shift, rounding, seed, remainder=remainders[1])
    assert same_bits(whole, cut)
    if rounding == "compensated":
        assert same_bits(*remainders)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chunks_of_a_low_rank_shift(dtype, monkeypatch):
    # Integers: a product gives the same numbers however its rows are cut.
    generator = torch.Generator().manual_seed(2)
    left = torch.randint(-9, 10, (5, 13), generator=generator).float() / 4096
    right = torch.randint(-9, 10, (5, 31), generator=generator).float()
    shift = Shift("dual", 5, left=left, right=right)
    for rounding, seed in (("nearest", None), ("stochastic", 3)):
        whole, cut = weight_of((5, 13, 31), dtype), weight_of((5, 13, 31), dtype)
        monkeypatch.setattr(op, "CHUNK_ELEMENTS", 4 << 20)
        apply_shift_(whole, shift, rounding, seed)
        monkeypatch.setattr(op, "CHUNK_ELEMENTS", 64)
        apply_shift_(cut, shift, rounding, seed)
        assert same_bits(whole, cut)


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


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_temporary_of_the_size_of_the_weight(dtype, rounding, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 1000)
    weight, shift = weight_of((2, 300, 100), dtype), make_shift("dual", 2, 300, 100)
    remainder = torch.zeros_like(weight) if rounding == "compensated" else None
    known = [tensor for tensor in (weight, remainder) if tensor is not None]
    with LargestNewTensor(*known) as seen:
        apply_shift_(weight, shift, rounding, remainder=remainder)
    # A chunk in float64, or the shift's factors in float64.
    assert seen.nbytes <= 8 * 1000


# Whole-op properties.


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gives_the_same_bits_twice(dtype, form, rounding):
    sizes = (5, 61, 127)
    shift, results = make_shift(form, *sizes), []
    for _ in range(2):
        weight = weight_of(sizes, dtype)
        remainder = torch.zeros_like(weight) if rounding == "compensated" else None
        seed = 1 if rounding == "stochastic" else None
        results.append(apply_shift_(weight, shift, rounding, seed, remainder=remainder))
    assert same_bits(*results)


@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_reference_backend_is_the_float64_formula(dtype, rounding):
    sizes = (3, 2, 13, 31)
    shift = make_shift("dual", *sizes)
    seed = 3 if rounding == "stochastic" else None
    pairs = []
    for _ in range(2):
        weight = weight_of(sizes, dtype)
        pairs.append((weight, torch.zeros_like(weight) if rounding == "compensated" else None))
    with backend("reference"):
        assert (
            apply_shift_(pairs[0][0], shift, rounding, seed, remainder=pairs[0][1]) is pairs[0][0]
        )
    reference.apply_shift_(pairs[1][0], shift, rounding, seed, remainder=pairs[1][1])
    assert same_bits(pairs[0][0], pairs[1][0])
    if rounding == "compensated":
        assert same_bits(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_rounds_the_float64_sum(dtype):
    sizes = (3, 13, 31)
    weight, shift = weight_of(sizes, dtype), make_shift("primal", *sizes)
    expected = exact_sum(weight, shift).to(dtype)
    assert torch.equal(reference.apply_shift_(weight, shift), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_reference_neighbours_are_the_neighbours(dtype):
    module = importlib.import_module("pyeditfast.reference.apply_shift")
    values = every_value(dtype)
    inner = values[1:-1]
    between = (inner[:-1] + inner[1:]) / 2
    for exact in (inner, between, 0.999 * inner[:-1] + 0.001 * inner[1:]):
        low, high = module.neighbours(exact, dtype)
        expected_low, expected_high = exact_neighbours(exact, dtype)
        assert torch.equal(low.double(), expected_low)
        assert torch.equal(high.double(), expected_high)
