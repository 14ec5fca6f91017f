"""masked_sgd: the kernel against the reference, bit by bit."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import triton
import triton.language as tl
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_steps import DTYPES, SHAPES, STEP, gradient, matrices
from ops.layouts import LAYOUTS, bits, empty_storage, lay_out, random_rows, same_bits, view_of
from torch import Tensor

from pyeditfast import ops, reference
from pyeditfast_kernels import masked_sgd as kernels
from pyeditfast_kernels import masked_step
from pyeditfast_kernels.launch import interprets
from pyeditfast_kernels.random_mask import last_kept


def by_reference(weight: Tensor, grad: Tensor, main: Tensor, **step: object) -> Tensor:
    """Return what the weight becomes, computed on the CPU."""
    new = weight.detach().cpu().clone()
    if step.get("active") is not None:
        step["active"] = step["active"].cpu()
    return reference.masked_sgd_(new, grad.cpu(), main.cpu(), **step)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bits_of_the_reference(device, dtype, grad_dtype, shape):
    weight, main = matrices(*shape, dtype, device)
    grad = gradient(*shape, grad_dtype, device)
    expected = by_reference(weight, grad, main, **STEP)
    kept = grad.clone(), main.clone()
    assert ops.masked_sgd_(weight, grad, main, **STEP) is weight
    assert same_bits(weight.cpu(), expected)
    assert same_bits(grad, kept[0]) and same_bits(main, kept[1])


@settings(deadline=None, max_examples=30)
@given(
    d_out=st.integers(1, 140),
    d_in=st.integers(1, 140),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 2**64 - 1),
    ratio=st.floats(0.0, 1.0),
    lr=st.floats(0.0, 3.0),
    weight_decay=st.floats(0.0, 0.5),
    norm_constraint=st.none() | st.floats(0.0, 0.1),
)
def test_any_shape_layout_and_setting(device, d_out, d_in, dtypes, layouts, **step):
    weight, main = matrices(d_out, d_in, dtypes[0], device)
    grad = gradient(d_out, d_in, dtypes[1], device)
    expected = by_reference(weight, grad, main, **step)
    views = [
        lay_out(tensor.cpu(), layout)[0].to(device)
        for tensor, layout in zip((weight, grad, main), layouts, strict=True)
    ]
    ops.masked_sgd_(*views, **step)
    assert same_bits(views[0].cpu(), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(device, seed):
    weight, main = matrices(31, 67, torch.float32, device)
    grad = gradient(31, 67, torch.float32, device)
    step = {**STEP, "seed": seed}
    expected = by_reference(weight, grad, main, **step)
    assert same_bits(ops.masked_sgd_(weight, grad, main, **step).cpu(), expected)


@pytest.mark.parametrize("ratio", [0.0, 1e-45, 0.5, 1 - 2.0**-24, 1.0])
@pytest.mark.parametrize("d_in", [132, 133])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_that_of_random_mask(device, dtype, d_in, ratio):
    # Ones where the mask keeps them, exactly.
    weight = torch.zeros(70, d_in, dtype=dtype, device=device)
    grad = torch.full_like(weight, -1.0)
    ops.masked_sgd_(weight, grad, weight.clone(), seed=9, ratio=ratio, lr=1.0)
    assert torch.equal(weight.cpu(), reference.random_mask(9, ratio, (70, d_in)).to(dtype))


@triton.jit(do_not_specialize=["first_row", "first_column", "d_in"])
def mask_kernel(
    kept,
    seed: tl.uint64,
    last,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    EIGHT: tl.constexpr,
):
    rows, columns = tl.arange(0, 8)[:, None], tl.arange(0, 16)[None, :]
    row, column = tl.cast(first_row, tl.int64), tl.cast(first_column, tl.int64)
    if EIGHT:
        part = masked_step.masks_of_eight(seed, last, row, column, d_in, PHILOX_BLOCKS, FAR, 8, 16)
    else:
        part = masked_step.mask_of(seed, last, row, column, d_in, PHILOX_BLOCKS, FAR, 8, 16)
    tl.store(kept + rows * 16 + columns, part.to(tl.uint8))


PLACES = [
    (0, 0, 16),
    (7, 4, 20),
    (2**16 - 4, 2**16 - 16, 2**16),
    (2**20 - 3, 2**12 - 7, 2**12),
    (2**31 - 8, 2**31 - 40, 2**31 - 1),
    (2**31 - 8, 2**31 - 40, 2**31 - 4),
    (2**34 - 3, 0, 2**4),
    (2**40, 5, 3),
    (2**40, 4, 12),
]

# Whole blocks only where the rows begin with one.
PARTS = [
    (*place, philox_blocks)
    for place in PLACES
    for philox_blocks in ((0,) if place[1] % 4 or place[2] % 4 else (0, 1, 2))
]


def expected_part(first_row: int, first_column: int, d_in: int) -> Tensor:
    """Return what mask_kernel has to store, by the reference."""
    starts = ((first_row + row) * d_in + first_column for row in range(8))
    return torch.stack([reference.random_uniform(2**63 + 1, (16,), at) < 0.5 for at in starts])


@pytest.mark.parametrize(("first_row", "first_column", "d_in", "philox_blocks"), PARTS)
def test_the_mask_at_indices_beyond_32_bits(device, first_row, first_column, d_in, philox_blocks):
    kept = torch.full((8, 16), 7, dtype=torch.uint8, device=device)
    arguments = (2**63 + 1, last_kept(0.5), first_row, first_column, d_in, philox_blocks)
    mask_kernel[(1,)](kept, *arguments, FAR=True, EIGHT=False)
    expected = expected_part(first_row, first_column, d_in)
    assert torch.equal(kept.cpu().bool(), expected)
    if (first_row + 8) * d_in + first_column <= 2**32:
        kept.fill_(7)
        mask_kernel[(1,)](kept, *arguments, FAR=False, EIGHT=False)
        assert torch.equal(kept.cpu().bool(), expected)


@pytest.mark.parametrize(("first_row", "first_column", "d_in", "philox_blocks"), PARTS)
def test_the_masks_of_eight_parts(device, first_row, first_column, d_in, philox_blocks):
    kept = torch.zeros((8, 16), dtype=torch.uint8, device=device)
    arguments = (2**63 + 1, last_kept(0.5), first_row, first_column, d_in, philox_blocks)
    for far in (True, False):
        if not far and (first_row + 32) * d_in + first_column + 32 > 2**32:
            continue
        mask_kernel[(1,)](kept, *arguments, FAR=far, EIGHT=True)
        for part in range(8):
            place = first_row + part % 4 * 8, first_column + part // 4 * 16
            bit = (kept.cpu() >> (7 - part)) & 1
            assert torch.equal(bit.bool(), expected_part(*place, d_in)), part


def test_indices_are_far_where_the_weight_has_more_than_2_to_the_32_elements(monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: launches.append(options))
    for shape in ((2**16, 2**16), (2**16, 2**16 + 1)):
        weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        kernels.masked_sgd_(weight, weight, weight, 1, 0.2, 1.0, 0.0, None, None)
    assert [options["FAR"] for options in launches] == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_that_the_mask_leaves_out_decay(device, dtype):
    weight = torch.full((40, 50), 2.0, dtype=dtype, device=device)
    grad = torch.full_like(weight, 100.0)
    step = {"seed": 4, "ratio": 0.2, "lr": 0.5, "weight_decay": 0.25}
    ops.masked_sgd_(weight, grad, weight.clone(), **step)
    mask = reference.random_mask(4, 0.2, (40, 50))
    expected = torch.where(mask, 2.0 - 0.5 * (100.0 + 0.5), 2.0 - 0.5 * 0.5)
    assert torch.equal(weight.cpu(), expected.to(dtype))


@pytest.mark.parametrize("norm_constraint", [0.0, 1e-3, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamps_that_bind(device, dtype, norm_constraint):
    weight, main = matrices(33, 65, dtype, device)
    grad = gradient(33, 65, dtype, device)
    step = {**STEP, "ratio": 0.9, "lr": 2.0, "norm_constraint": norm_constraint}
    expected = by_reference(weight, grad, main, **step)
    free = by_reference(weight, grad, main, **{**step, "norm_constraint": None})
    assert (expected != free).double().mean() > 0.3
    assert same_bits(ops.masked_sgd_(weight, grad, main, **step).cpu(), expected)
    if norm_constraint == 0.0:
        assert torch.equal(weight, main)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_is(device, dtype):
    weight, main = matrices(40, 50, dtype, device)
    grad = gradient(40, 50, dtype, device)
    mask = reference.random_mask(STEP["seed"], 0.2, (40, 50)).to(device)
    left_out = ~mask
    grad[left_out] = torch.tensor([math.nan, math.inf, -math.inf], device=device).to(dtype)[
        torch.arange(int(left_out.sum()), device=device) % 3
    ]
    expected = by_reference(weight, grad, main, **STEP)
    ops.masked_sgd_(weight, grad, main, **STEP)
    assert bool(weight.isfinite().all()) and same_bits(weight.cpu(), expected)
    # Where the mask keeps one, the element is NaN, and no other is.
    row, column = (int(part[0]) for part in mask.nonzero(as_tuple=True))
    grad[row, column] = math.nan
    ops.masked_sgd_(weight, grad, main, **STEP)
    assert weight[row, column].isnan() and int(weight.isnan().sum()) == 1
    # An infinite step ends at the constraint; a NaN in main cannot be clamped to.
    grad[row, column], weight[row, column] = -math.inf, 0.0
    main[3, 4] = math.nan
    ops.masked_sgd_(weight, grad, main, **STEP)
    bound = (main[row, column].float() + 0.02).to(dtype)
    assert weight[row, column] == bound and weight[3, 4].isnan()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("norm_constraint", [None, 1e-3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_magnitudes(device, dtype, norm_constraint):
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.smallest_normal * info.eps), math.log2(info.max), 64)
    scale = (2.0 ** exponents.double()).clamp(max=info.max)
    weight = (random_rows(64, 64).sign() * scale).to(device, dtype)
    grad = (random_rows(64, 64, seed=5).sign() * scale[:, None]).to(device, dtype)
    main = (0.5 * weight.double()).to(dtype)
    step = {**STEP, "ratio": 0.7, "norm_constraint": norm_constraint}
    expected = by_reference(weight, grad, main, **step)
    assert torch.equal(ops.masked_sgd_(weight, grad, main, **step).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_does_nothing_where_it_is_not_active(device, dtype):
    weight, main = matrices(31, 67, dtype, device)
    grad = gradient(31, 67, dtype, device)
    before = weight.clone()
    step = {**STEP, "active": torch.tensor(False, device=device)}
    ops.masked_sgd_(weight, grad, main, **step)
    assert same_bits(weight, before)
    step["active"].fill_(True)
    expected = by_reference(weight, grad, main, **step)
    assert same_bits(ops.masked_sgd_(weight, grad, main, **step).cpu(), expected)
    assert not same_bits(weight, before)


def test_the_weight_gets_the_bits_of_one_rounding(device):
    # 1 + 2⁻⁸ lies half way between two bfloat16 values, and the decay decides.
    weight = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
    grad = torch.full((1, 4), -(2.0**-8), device=device)
    step = {"seed": 0, "ratio": 1.0, "lr": 1.0}
    ops.masked_sgd_(weight, grad, weight.clone(), **step, weight_decay=2.0**-20)
    assert weight.tolist() == [[1.0] * 4]
    ops.masked_sgd_(weight, 2 * grad, weight.clone(), **step, weight_decay=2.0**-20)
    assert weight.tolist() == [[1 + 2.0**-7] * 4]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weight_and_the_bytes_around_it(device, dtype, layout):
    plain, main = matrices(13, 70, dtype, device)
    grad = gradient(13, 70, dtype, device)
    storage = empty_storage(plain.shape, dtype, layout).to(device)
    weight = view_of(storage, layout)
    weight.copy_(plain)
    before = storage.clone()
    ops.masked_sgd_(weight, grad, main, **STEP)
    assert same_bits(weight, ops.masked_sgd_(plain, grad, main, **STEP))
    for memory in (storage, before):
        view_of(memory, layout).zero_()
    assert torch.equal(bits(storage), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_weight_is_passed_as_its_transpose(device, dtype):
    weight, main = matrices(64, 80, dtype, device)
    grad = gradient(64, 80, dtype, device)
    conv, conv_main, conv_grad = (each.mT.contiguous() for each in (weight, main, grad))
    ops.masked_sgd_(weight, grad, main, **STEP)
    ops.masked_sgd_(conv.mT, conv_grad.mT, conv_main.mT, **STEP)
    assert same_bits(conv.mT, weight)


def test_gives_the_same_bits_twice(device):
    results = []
    for _ in range(2):
        weight, main = matrices(70, 133, torch.bfloat16, device)
        grad = gradient(70, 133, torch.float32, device)
        results.append(ops.masked_sgd_(weight, grad, main, **STEP))
    assert same_bits(*results)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(device, shape):
    weight = torch.ones(shape, device=device)
    assert ops.masked_sgd_(weight, weight, weight, **STEP) is weight
    kernels.masked_sgd_(weight, weight, weight, *STEP.values())


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    weight = FarTensor(1 << 60, (65, 67), torch.bfloat16, (1 << 30, 1 << 20))
    grad = FarTensor(1 << 59, (65, 67), torch.float32, (1 << 20, 1 << 30))
    main = FarTensor(1 << 58, (65, 67), torch.bfloat16, (1 << 30, 1 << 36))
    kernels.masked_sgd_(weight, grad, main, *STEP.values())
    places = [
        {tensor.address(*index) for index in itertools.product(range(65), range(67))}
        for tensor in (weight, grad, main)
    ]
    assert seen.stored == places[0]
    assert seen.loaded == set.union(*places)
    # Without a constraint there is no need for main.
    seen.loaded.clear()
    kernels.masked_sgd_(weight, grad, main, **{**STEP, "norm_constraint": None})
    assert seen.loaded == places[0] | places[1]


def test_parameter_that_requires_grad_is_changed_in_place(device):
    weight = torch.nn.Parameter(torch.ones(3, 4, device=device))
    grad = torch.full((3, 4), -1.0, device=device)
    step = {"seed": 0, "ratio": 1.0, "lr": 1.0}
    assert ops.masked_sgd_(weight, grad, weight.detach().clone(), **step) is weight
    assert torch.equal(weight.detach(), torch.full((3, 4), 2.0, device=device))
    assert weight.requires_grad and weight.is_leaf and weight.grad is None


def test_needs_no_answer_from_the_device(device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    weight, main = matrices(100, 200, torch.bfloat16, device)
    grad = gradient(100, 200, torch.bfloat16, device)
    active = torch.tensor(True, device=device)
    step = {**STEP, "active": active}
    expected = by_reference(weight, grad, main, **step)
    before = weight.clone()
    ops.masked_sgd_(weight, grad, main, **step)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            ops.masked_sgd_(weight, grad, main, **step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for runs in (True, False):
        weight.copy_(before)
        active.fill_(runs)
        graph.replay()
        assert same_bits(weight.cpu(), expected if runs else before.cpu())


def test_float64_is_refused(device):
    weight = torch.ones(3, 4, dtype=torch.float64, device=device)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.masked_sgd_(weight, weight, weight, **STEP)
