"""random_mask: the kernels against the reference, bit by bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from far_memory import Addresses, FarTensor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops.layouts import same_bits
from torch import Tensor

from pyeditfast import ops, reference
from pyeditfast_kernels import random_mask as kernels
from pyeditfast_kernels.launch import interprets, launch, recording

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
OFFSETS = (
    1,
    2,
    3,
    4,
    2**31 - 70,
    2**32 - 5000,
    2**32 - 70,
    2**32,
    2**34 - 2000,
    2**34 - 2002,
    2**40 + 3,
    2**63 - 1 - 9000,
)
SHAPES = ((), (1,), (7, 31), (4096,), (4097,), (3, 5, 400), (0,), (4, 0))


def kept_by_reference(seed: int, ratio: float, numel: int, offset: int) -> Tensor:
    return reference.random_uniform(seed, (numel,), offset) < torch.tensor(ratio)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_reference(device, seed, shape):
    mask = ops.random_mask(seed, 0.2, shape, device=device)
    assert mask.dtype == torch.bool and mask.shape == shape and mask.is_contiguous()
    assert torch.equal(mask.cpu(), reference.random_mask(seed, 0.2, shape))
    uniform = ops.random_uniform(seed, shape, device=device)
    assert uniform.shape == shape and uniform.is_contiguous()
    assert same_bits(uniform.cpu(), reference.random_uniform(seed, shape))


@pytest.mark.parametrize("offset", OFFSETS)
def test_indices_of_64_bits(device, offset):
    seed, numel = 2**64 - 3, 8999
    uniform = ops.random_uniform(seed, (numel,), offset, device=device)
    assert same_bits(uniform.cpu(), reference.random_uniform(seed, (numel,), offset))
    mask = kernels.random_mask(seed, 0.5, (numel,), device, offset)
    assert torch.equal(mask.cpu(), kept_by_reference(seed, 0.5, numel, offset))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    ratio=st.floats(0.0, 1.0),
    numel=st.integers(0, 300),
    offset=st.integers(0, 2**63 - 1 - 300),
)
@example(seed=5, ratio=0.5, numel=300, offset=2**32 - 150)
def test_any_seed_ratio_and_offset(device, seed, ratio, numel, offset):
    mask = kernels.random_mask(seed, ratio, (numel,), device, offset)
    assert torch.equal(mask.cpu(), kept_by_reference(seed, ratio, numel, offset))


@pytest.mark.parametrize("ratio", [0, 0.0, 1e-45, 1e-30])
def test_next_to_none(device, ratio):
    mask = ops.random_mask(4, ratio, (300, 100), device=device)
    assert torch.equal(mask.cpu(), reference.random_mask(4, ratio, (300, 100)))
    assert ratio or not mask.any()


@pytest.mark.parametrize("ratio", [1, 1.0, 1 - 2.0**-24, 0.99999999])
def test_next_to_all(device, ratio):
    mask = ops.random_mask(4, ratio, (300, 100), device=device)
    assert torch.equal(mask.cpu(), reference.random_mask(4, ratio, (300, 100)))
    assert ratio != 1 or mask.all()


def test_a_number_equal_to_the_ratio_is_not_below_it(device):
    for index, number in enumerate(ops.random_uniform(5, (40,), device=device).tolist()):
        assert not ops.random_mask(5, number, (40,), device=device)[index]
        above = math.nextafter(number, 2.0) + 1e-7
        assert ops.random_mask(5, above, (40,), device=device)[index]


@settings(max_examples=300)
@given(ratio=st.floats(0.0, 1.0))
@example(ratio=0.0)
@example(ratio=1.0)
@example(ratio=1e-45)
@example(ratio=4.6566127342e-10)
def test_the_last_kept_word_is_the_last_below_the_ratio(ratio):
    bound, scale = torch.tensor(ratio), torch.tensor(4.6566127342e-10)
    last = kernels.last_kept(ratio)
    if last is not None:
        assert 0 <= last < 2**31
        assert torch.tensor(last, dtype=torch.int64).float() * scale < bound
    following = 0 if last is None else last + 1
    if following < 2**31:
        assert torch.tensor(following, dtype=torch.int64).float() * scale >= bound


@triton.jit(do_not_specialize=["last"])
def is_kept_kernel(words, last, kept, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    word = tl.load(words + lanes).to(tl.uint32)
    tl.store(kept + lanes, kernels.is_kept(word, last).to(tl.uint8))


@pytest.mark.parametrize("last", [0, 1, 429496751, 2**31 - 2, 2**31 - 1])
def test_words_around_both_ends_of_what_is_kept(device, last):
    # A random mask meets none of them.
    ends = [0, last - 1, last, last + 1, 2**31 - 1]
    words = torch.tensor([*ends, *(2**32 - 1 - end for end in ends), 5, 77, 2**30, 2**31, 9, 3])
    words %= 2**32
    kept = torch.zeros(16, dtype=torch.uint8, device=device)
    is_kept_kernel[(1,)](words.to(device), last, kept, SIZE=16)
    assert torch.equal(kept.cpu().bool(), torch.minimum(words, 2**32 - 1 - words) <= last)


def test_bytes_that_are_not_its_own_stay(device, monkeypatch):
    storages = []
    empty = torch.empty

    def guarded(size: int, **options: object) -> Tensor:
        storages.append(torch.full((size + 64,), 7, dtype=torch.uint8, device=device))
        return storages[-1][32 : 32 + size]

    for numel, offset in itertools.product((1, 15, 16, 17, 4093, 4095, 4096, 4097), range(4)):
        monkeypatch.setattr(torch, "empty", guarded)
        mask = kernels.random_mask(3, 0.5, (numel,), device, offset)
        monkeypatch.setattr(torch, "empty", empty)
        assert set(storages[-1][32 : 32 + numel].tolist()) <= {0, 1}
        assert torch.equal(mask.cpu(), kept_by_reference(3, 0.5, numel, offset))
        assert bool((storages[-1][:32] == 7).all()) and bool((storages[-1][-32:] == 7).all())


def test_gives_the_same_bits_twice_and_in_parts(device):
    first, second = (ops.random_uniform(8, (5000,), 2**32 - 2500, device=device) for _ in range(2))
    assert same_bits(first, second)
    parts = [
        ops.random_uniform(8, (1000,), 2**32 - 2500 + 1000 * k, device=device) for k in range(5)
    ]
    assert same_bits(torch.cat(parts), first)


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("kernel", ["random_mask_kernel", "random_uniform_kernel"])
def test_addresses_beyond_32_bits(monkeypatch, kernel, skip):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    from triton.runtime import interpreter

    with recording() as launches:
        kernels.random_mask(1, 0.5, (16,), "cpu", skip)
        kernels.random_uniform(1, (16,), skip, "cpu")
    (found,) = (each for each in launches if each.kernel.__name__ == kernel)
    dtype = found.arguments["out"].dtype
    numel = (1 << 33) + 48
    out = FarTensor(1 << 60, (numel,), dtype)
    # The mask is stored four bytes at a time, if it can be.
    block = found.config.sizes["BLOCK"] // (4 if dtype == torch.int32 else 1)
    seen = Addresses(monkeypatch)
    # The last program of many, alone.
    last = interpreter.TensorHandle(
        torch.tensor([numel // block]).int().numpy(), interpreter.tl.int32
    )
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_get_program_id", lambda self, axis: last)
    arguments = {**found.arguments, "out": out, "numel": numel, "FAR": True}
    launch(found.kernel, (1,), found.config, **arguments)
    first = numel // block * block - skip
    assert seen.stored == {out.address(place) for place in range(first, numel)}


def test_indices_are_far_from_the_first_beyond_32_bits():
    assert not kernels.is_far(2**32)
    assert kernels.is_far(2**32 + 1)
    assert not kernels.is_far(5, 2**32 - 5)
    assert kernels.is_far(6, 2**32 - 5)
