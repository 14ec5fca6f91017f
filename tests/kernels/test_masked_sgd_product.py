"""masked_sgd_product: the kernel against the reference, whose gradient is a matrix.

Most operands are whole numbers times a power of two, whose products and sums are exact in float32
in any order, so that every element must have the bits of the reference.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_steps import DTYPES, SHAPES, STEP, matrices
from ops.layouts import LAYOUTS, bits, empty_storage, lay_out, random_rows, same_bits, view_of
from ops.tolerances import UNIT_ROUNDOFF
from torch import Tensor
from truncation import truncate_dots

from pyeditfast import ops, reference
from pyeditfast_kernels import masked_sgd_product as kernels
from pyeditfast_kernels.launch import Config, interprets

CONFIGS = (kernels.SQUARE, kernels.NARROW, kernels.FINE, kernels.DEEP, kernels.WIDE)


def name_of(value: object) -> str:
    return value.name if isinstance(value, Config) else str(value)


def exact_operands(
    n: int, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return output gradients and inputs whose product is exact in float32."""
    generator = torch.Generator().manual_seed(6)
    output_grads = torch.randint(-8, 9, (n, d_out), generator=generator) * 2.0**-10
    inputs = torch.randint(-8, 9, (n, d_in), generator=generator) * 2.0**-3
    return output_grads.to(device, dtype), inputs.to(device, dtype)


def by_reference(weight: Tensor, *others: Tensor, **step: object) -> Tensor:
    """Return what the weight becomes, computed on the CPU."""
    new = weight.detach().cpu().clone()
    if step.get("active") is not None:
        step["active"] = step["active"].cpu()
    return reference.masked_sgd_product_(new, *(other.cpu() for other in others), **step)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bits_of_the_reference(device, dtype, shape):
    weight, main = matrices(*shape, dtype, device)
    others = (*exact_operands(37, *shape, dtype, device), main)
    kept = [other.clone() for other in others]
    expected = by_reference(weight, *others, **STEP)
    assert ops.masked_sgd_product_(weight, *others, **STEP) is weight
    assert same_bits(weight.cpu(), expected)
    assert all(same_bits(*pair) for pair in zip(others, kept, strict=True))


@pytest.mark.parametrize("operands", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_another_dtype(device, dtype, operands):
    weight, main = matrices(50, 60, dtype, device)
    others = (*exact_operands(5, 50, 60, operands, device), main)
    expected = by_reference(weight, *others, **STEP)
    assert same_bits(ops.masked_sgd_product_(weight, *others, **STEP).cpu(), expected)


@pytest.mark.parametrize("beyond", [4, 5])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_configuration(device, config, far, beyond, monkeypatch):
    # Two tiles, and all eight parts of one.
    dtype = torch.float32 if config is kernels.NARROW else torch.bfloat16
    shape = (config.sizes["BLOCK_OUT"], config.sizes["BLOCK_IN"] + beyond)
    monkeypatch.setattr(kernels, "is_far", lambda numel: far)
    weight, main = matrices(*shape, dtype, device)
    others = (*exact_operands(37, *shape, dtype, device), main)
    expected = by_reference(weight, *others, **STEP)
    kernels.masked_sgd_product_(weight, *others, *STEP.values(), config=config)
    assert same_bits(weight.cpu(), expected)


@settings(deadline=None, max_examples=12)
@given(
    n=st.integers(0, 70),
    d_out=st.integers(1, 70),
    d_in=st.integers(1, 70),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    config=st.sampled_from(CONFIGS),
    seed=st.integers(0, 2**64 - 1),
    ratio=st.floats(0.0, 1.0),
    norm_constraint=st.none() | st.floats(0.0, 0.1),
)
def test_any_shape_and_layout(
    device, n, d_out, d_in, dtypes, layouts, config, seed, ratio, norm_constraint
):
    weight, main = matrices(d_out, d_in, dtypes[0], device)
    others = (*exact_operands(n, d_out, d_in, dtypes[1], device), main)
    step = {**STEP, "seed": seed, "ratio": ratio, "norm_constraint": norm_constraint}
    expected = by_reference(weight, *others, **step)
    views = [
        lay_out(tensor.cpu(), layout)[0].to(device)
        for tensor, layout in zip((weight, *others), layouts, strict=True)
    ]
    kernels.masked_sgd_product_(*views, *step.values(), config=config)
    assert same_bits(views[0].cpu(), expected)


@pytest.mark.parametrize("operands", DTYPES, ids=str)
def test_a_float32_weight_is_as_accurate_as_plain_float32(device, operands):
    output_grads = random_rows(240, 31, seed=1).to(device, operands)
    inputs = random_rows(240, 57, seed=2).to(device, operands)
    weight = torch.zeros(31, 57, device=device)
    ops.masked_sgd_product_(weight, output_grads, inputs, weight.clone(), seed=0, ratio=1.0, lr=1.0)
    exact = -(output_grads.double().mT @ inputs.double()).cpu()
    plain = -(output_grads.cpu().float().mT @ inputs.cpu().float())
    error, yardstick = ((part.cpu() - exact).abs().max() for part in (weight, plain))
    floor = UNIT_ROUNDOFF[torch.float32] * (1 + math.sqrt(240)) * exact.abs().max()
    assert error <= 2 * yardstick + floor


def test_a_product_keeps_the_digits_of_float32(device):
    # One token: without any one of the products of parts some entries are off by 2⁻¹⁸.
    output_grads = random_rows(1, 31, seed=1).to(device)
    inputs = random_rows(1, 57, seed=2).to(device)
    weight = torch.zeros(31, 57, device=device)
    ops.masked_sgd_product_(weight, output_grads, inputs, weight.clone(), seed=0, ratio=1.0, lr=1.0)
    exact = -(output_grads.double().mT @ inputs.double())
    error = ((weight - exact) / exact).abs().max().item()
    assert error <= 3 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize("operands", DTYPES, ids=str)
def test_truncating_tensor_cores(device, operands, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    output_grads = (1 + torch.rand(6000, 5, generator=generator)).to(device, operands)
    inputs = (1 + torch.rand(6000, 7, generator=generator)).to(device, operands)
    weight = torch.zeros(5, 7, device=device)
    ops.masked_sgd_product_(weight, output_grads, inputs, weight.clone(), seed=0, ratio=1.0, lr=1.0)
    exact = -(output_grads.double().mT @ inputs.double())
    error = ((weight - exact) / exact).abs().max().item()
    assert error <= UNIT_ROUNDOFF[torch.float32] * (1 + math.sqrt(6000)) / 4


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("d_in", [132, 133])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_that_of_random_mask(device, dtype, d_in, ratio):
    weight = torch.zeros(67, d_in, dtype=dtype, device=device)
    output_grads, inputs = -torch.ones(2, 67, device=device), torch.ones(2, d_in, device=device)
    step = {"seed": 2**63, "ratio": ratio, "lr": 0.5}
    ops.masked_sgd_product_(weight, output_grads, inputs, weight.clone(), **step)
    assert torch.equal(weight.cpu(), reference.random_mask(2**63, ratio, (67, d_in)).to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("operands", DTYPES, ids=str)
def test_what_is_not_finite_reaches_only_what_the_mask_keeps(device, operands, bad):
    weight, main = matrices(40, 50, torch.bfloat16, device)
    output_grads, inputs = exact_operands(9, 40, 50, operands, device)
    clean = weight.clone()
    ops.masked_sgd_product_(clean, output_grads, inputs, main, **STEP)
    # A whole row of the gradient, then a whole column of it.
    output_grads[3, 7], inputs[2, 11] = bad, bad
    step = {**STEP, "norm_constraint": None}
    ops.masked_sgd_product_(weight, output_grads, inputs, main, **step)
    touched = torch.zeros(40, 50, dtype=torch.bool)
    touched[7], touched[:, 11] = True, True
    kept = reference.random_mask(STEP["seed"], STEP["ratio"], (40, 50))
    assert int((touched & kept).sum()) > 5
    assert not weight.cpu()[touched & kept].isfinite().any()
    assert bool(weight.cpu()[~(touched & kept)].isfinite().all())


def test_no_tokens_leave_the_decay(device):
    weight = torch.full((40, 50), 2.0, device=device)
    operands = torch.ones(0, 40, device=device), torch.ones(0, 50, device=device)
    step = {"seed": 4, "ratio": 0.2, "lr": 0.5, "weight_decay": 0.25}
    ops.masked_sgd_product_(weight, *operands, weight.clone(), **step)
    assert torch.equal(weight, torch.full_like(weight, 1.75))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_does_nothing_where_it_is_not_active(device, dtype):
    weight, main = matrices(31, 67, dtype, device)
    others = (*exact_operands(5, 31, 67, dtype, device), main)
    before = weight.clone()
    step = {**STEP, "active": torch.tensor(False, device=device)}
    ops.masked_sgd_product_(weight, *others, **step)
    assert same_bits(weight, before)
    step["active"].fill_(True)
    expected = by_reference(weight, *others, **step)
    assert same_bits(ops.masked_sgd_product_(weight, *others, **step).cpu(), expected)
    assert not same_bits(weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weight_and_the_bytes_around_it(device, dtype, layout):
    plain, main = matrices(13, 70, dtype, device)
    others = (*exact_operands(5, 13, 70, dtype, device), main)
    storage = empty_storage(plain.shape, dtype, layout).to(device)
    weight = view_of(storage, layout)
    weight.copy_(plain)
    before = storage.clone()
    ops.masked_sgd_product_(weight, *others, **STEP)
    assert same_bits(weight, ops.masked_sgd_product_(plain, *others, **STEP))
    for memory in (storage, before):
        view_of(memory, layout).zero_()
    assert torch.equal(bits(storage), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_weight_is_passed_as_its_transpose(device, dtype):
    weight, main = matrices(64, 80, dtype, device)
    operands = exact_operands(9, 64, 80, dtype, device)
    conv, conv_main = weight.mT.contiguous(), main.mT.contiguous()
    ops.masked_sgd_product_(weight, *operands, main, **STEP)
    ops.masked_sgd_product_(conv.mT, *operands, conv_main.mT, **STEP)
    assert same_bits(conv.mT, weight)


@pytest.mark.parametrize("operands", DTYPES, ids=str)
def test_gives_the_same_bits_twice(device, operands):
    results = []
    for _ in range(2):
        weight, main = matrices(33, 70, torch.float32, device)
        output_grads = random_rows(50, 33, seed=8, scale=0.1).to(device, operands)
        inputs = random_rows(50, 70, seed=9).to(device, operands)
        results.append(ops.masked_sgd_product_(weight, output_grads, inputs, main, **STEP))
    assert same_bits(*results)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(device, shape):
    weight = torch.ones(shape, device=device)
    operands = (torch.ones(3, size, device=device) for size in shape)
    others = (*operands, weight)
    assert ops.masked_sgd_product_(weight, *others, **STEP) is weight
    kernels.masked_sgd_product_(weight, *others, *STEP.values())


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    weight = FarTensor(1 << 61, (65, 67), torch.bfloat16, (1 << 30, 1 << 20))
    main = FarTensor(1 << 60, (65, 67), torch.bfloat16, (1 << 20, 1 << 30))
    output_grads = FarTensor(1 << 59, (34, 65), torch.bfloat16, (1 << 30, 1 << 36))
    inputs = FarTensor(1 << 58, (34, 67), torch.bfloat16, (1 << 36, 1 << 30))
    tensors = (weight, output_grads, inputs, main)
    kernels.masked_sgd_product_(*tensors, *STEP.values(), config=kernels.FINE)
    places = [
        {tensor.address(*index) for index in itertools.product(*map(range, tensor.shape))}
        for tensor in tensors
    ]
    assert seen.stored == places[0]
    assert seen.loaded == set.union(*places)
    # Without a constraint there is no need for main.
    seen.loaded.clear()
    step = {**STEP, "norm_constraint": None}
    kernels.masked_sgd_product_(*tensors, **step, config=kernels.FINE)
    assert seen.loaded == set.union(*places[:3])


def test_needs_no_answer_from_the_device(device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    weight, main = matrices(160, 240, torch.bfloat16, device)
    others = (*exact_operands(50, 160, 240, torch.bfloat16, device), main)
    active = torch.tensor(True, device=device)
    step = {**STEP, "active": active}
    expected = by_reference(weight, *others, **step)
    before = weight.clone()
    ops.masked_sgd_product_(weight, *others, **step)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            ops.masked_sgd_product_(weight, *others, **step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for runs in (True, False):
        weight.copy_(before)
        active.fill_(runs)
        graph.replay()
        assert same_bits(weight.cpu(), expected if runs else before.cpu())


def test_configurations():
    bf16, fp32 = torch.bfloat16, torch.float32
    assert kernels.choose_config(bf16, bf16, True) is kernels.SQUARE
    assert kernels.choose_config(bf16, fp32, True) is kernels.NARROW
    assert kernels.choose_config(fp32, bf16, True) is kernels.NARROW
    assert kernels.choose_config(bf16, bf16, False) is kernels.FINE


def test_what_is_tuned_is_exact_to_rounding(device):
    (choice,) = kernels.tunable()
    for config in choice.candidates:
        inputs = choice.inputs(device, True)
        exact = choice.exact(tuple(tensor.clone() for tensor in inputs))
        result = choice.call(inputs, config)
        assert result is inputs[choice.writes]
        assert torch.allclose(result.double(), exact, rtol=2.0**-7, atol=1e-5)


def test_float64_is_refused(device):
    weight = torch.ones(3, 4, dtype=torch.float64, device=device)
    operands = torch.ones(2, 3, device=device), torch.ones(2, 4, device=device)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.masked_sgd_product_(weight, *operands, weight, **STEP)
