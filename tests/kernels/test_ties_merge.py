"""ties_merge: the kernel against the reference, bit by bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, lay_out, random_rows, same_bits
from torch import Tensor

from pyeditfast import ops, reference
from pyeditfast.reference.magnitude_threshold import magnitude_threshold
from pyeditfast_kernels import ties_merge as kernels
from pyeditfast_kernels.launch import interprets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (1, 7), (7, 1), (13, 31), (32, 64), (33, 67))
DENSITY = 0.53


def memories(
    shards: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return a main memory and shards near it, many of whose elements are equal to its."""
    main = random_rows(*shape, seed=20, scale=0.02)
    sides = []
    for shard in range(shards):
        change = random_rows(*shape, seed=shard, scale=0.01)
        change[random_rows(*shape, seed=shard + 10) > 0.5] = 0.0
        sides.append((main + change).to(device, dtype))
    return main.to(device, dtype), sides


def merge(
    main: Tensor, sides: Sequence[Tensor], density: float, weights: Sequence[float]
) -> Tensor:
    """Launch the kernel with the thresholds that the op gives it."""
    thresholds = torch.stack(
        [magnitude_threshold(side.cpu(), density, base=main.cpu()) for side in sides]
    )
    given = torch.tensor(weights, dtype=torch.float32)
    return kernels.ties_merge(main, sides, thresholds.to(main.device), given.to(main.device))


def by_reference(main: Tensor, sides: Sequence[Tensor], *arguments: object) -> Tensor:
    return reference.ties_merge(main.cpu(), [side.cpu() for side in sides], *arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shards", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bits_of_the_reference(device, dtype, shards, shape):
    main, sides = memories(shards, shape, dtype, device)
    # One element keeps none at a lower density.
    density = max(DENSITY, 1 / main.numel())
    before = [tensor.clone() for tensor in (main, *sides)]
    weights = [1.0 / shards] * shards
    merged = merge(main, sides, density, weights)
    assert merged.dtype == dtype and merged.device == main.device
    assert same_bits(merged.cpu(), by_reference(main, sides, density))
    assert all(same_bits(*pair) for pair in zip((main, *sides), before, strict=True))


@pytest.mark.parametrize("weights", [None, [0.25, 2.0, 0.5]], ids=str)
def test_the_op(device, weights):
    main, sides = memories(3, (13, 31), torch.bfloat16, device)
    merged = ops.ties_merge(main, sides, DENSITY, weights)
    assert same_bits(merged.cpu(), by_reference(main, sides, DENSITY, weights))


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9),
    density=st.floats(0.0, 1.0),
)
def test_any_shape_layout_and_weights(device, shape, dtype, weights, layouts, density):
    main, sides = memories(len(weights), shape, dtype, device)
    density = max(density, 1 / main.numel())
    views = [
        lay_out(tensor.cpu(), layout)[0].to(device)
        for tensor, layout in zip((main, *sides), layouts, strict=False)
    ]
    merged = merge(views[0], views[1:], density, weights)
    assert same_bits(merged.cpu(), by_reference(main, sides, density, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_takes_the_mean_of_those_that_agree(device, dtype):
    # Weights a quarter, a quarter and a half.
    weights = [0.25, 0.25, 0.5]
    changes = [
        ([1.0, 1.0, 1.0], 1.0),
        ([1.0, 2.0, -1.0], 1.5),
        ([-1.0, -2.0, 1.0], -1.5),
        ([1.0, 0.0, 0.5], (0.25 + 0.25) / 0.75),
        ([-2.0, -2.0, 2.0], 2.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([-1.0, 0.0, 1.0], 1.0),
    ]
    sides = torch.tensor([change for change, _ in changes], device=device).to(dtype)
    main = torch.zeros(1, len(changes), dtype=dtype, device=device)
    zeros, given = torch.zeros(3, device=device), torch.tensor(weights, device=device)
    merged = kernels.ties_merge(main, [side[None] for side in sides.T], zeros, given)
    expected = torch.tensor([[mean for _, mean in changes]])
    assert torch.equal(merged.cpu(), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_that_tie_with_the_threshold_are_kept(device, dtype):
    main = torch.zeros(1, 6, dtype=dtype, device=device)
    side = torch.tensor([[0.25, -0.5, 0.5, 0.125, -0.75, 0.5]], dtype=dtype, device=device)
    merged = merge(main, [side], 0.5, [1.0])
    assert merged.tolist() == [[0.0, -0.5, 0.5, 0.0, -0.75, 0.5]]
    higher = torch.tensor([math.nextafter(0.5, 1.0)], dtype=torch.float64).float() + 2.0**-24
    one = torch.ones(1, device=device)
    merged = kernels.ties_merge(main, [side], higher.to(device), one)
    assert merged.tolist() == [[0.0, 0.0, 0.0, 0.0, -0.75, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_memories_merge_into_themselves(device, dtype):
    main, sides = memories(1, (33, 67), dtype, device)
    assert same_bits(merge(main, [main] * 8, 1.0, [0.125] * 8), main)
    assert same_bits(merge(main, sides * 4, 1.0, [0.25] * 4), merge(main, sides, 1.0, [1.0]))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_magnitudes(device, dtype, shards):
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.smallest_normal * info.eps), math.log2(info.max), 48)
    scale = (2.0 ** exponents.double()).clamp(max=info.max)
    main = (random_rows(48, 48).sign() * scale).to(device, dtype)
    sides = [
        (random_rows(48, 48, seed=seed + 1).sign() * scale[:, None]).to(device, dtype)
        for seed in range(shards)
    ]
    weights = [1.0 / shards] * shards
    merged = merge(main, sides, DENSITY, weights)
    assert same_bits(merged.cpu(), by_reference(main, sides, DENSITY, weights))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_is(device, dtype):
    main, sides = memories(3, (13, 31), dtype, device)
    weights = [1 / 3] * 3
    clean = merge(main, sides, DENSITY, weights)
    sides[0][2, 3], sides[1][4, 5], sides[2][4, 5] = math.inf, -math.inf, math.inf
    sides[1][7, 8], main[9, 10] = math.nan, math.nan
    expected = by_reference(main, sides, DENSITY, weights)
    merged = merge(main, sides, DENSITY, weights)
    assert torch.equal(merged.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert merged[2, 3] == math.inf and merged[9, 10].isnan()
    assert int(merged.isnan().sum()) == 1
    untouched = torch.ones(13, 31, dtype=torch.bool)
    untouched[2, 3] = untouched[4, 5] = untouched[7, 8] = untouched[9, 10] = False
    # The thresholds moved by the few that are now the largest, so some more are cut off.
    assert (merged != clean).cpu()[untouched].double().mean() < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_weights_are_passed_as_their_transposes(device, dtype):
    main, sides = memories(2, (40, 70), dtype, device)
    transposed = [tensor.mT.contiguous().mT for tensor in (main, *sides)]
    merged = merge(transposed[0], transposed[1:], DENSITY, [0.5, 0.5])
    assert same_bits(merged, merge(main, sides, DENSITY, [0.5, 0.5]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_nothing_but_its_result(device, layout):
    # What it makes has canaries on both sides, see conftest.
    laid = [lay_out(tensor.cpu(), layout) for tensor in flat_memories(torch.device("cpu"))]
    main, *sides = (view.to(device) if device.type == "cuda" else view for view, _ in laid)
    before = [storage.clone() for _, storage in laid]
    merged = merge(main, sides, DENSITY, [0.5, 0.5])
    plain, *plain_sides = flat_memories(device)
    assert same_bits(merged, merge(plain, plain_sides, DENSITY, [0.5, 0.5]))
    assert all(same_bits(storage, old) for (_, storage), old in zip(laid, before, strict=True))


def flat_memories(device: torch.device) -> list[Tensor]:
    main, sides = memories(2, (13, 70), torch.bfloat16, device)
    return [main, *sides]


def test_gives_the_same_bits_twice(device):
    main, sides = memories(8, (70, 133), torch.bfloat16, device)
    weights = [0.1 * (1 + shard) for shard in range(8)]
    assert same_bits(*(merge(main, sides, DENSITY, weights) for _ in range(2)))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_memories(device, shape):
    main = torch.ones(shape, device=device)
    one = torch.ones(1, device=device)
    assert kernels.ties_merge(main, [main], one, one).shape == shape


@pytest.mark.parametrize("shards", [2, 8])
def test_addresses_beyond_32_bits(monkeypatch, shards):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    bf16, fp32 = torch.bfloat16, torch.float32
    main = FarTensor(1 << 60, (33, 65), bf16, (1 << 30, 1 << 20))
    out = FarTensor(1 << 61, (33, 65), bf16, (1 << 20, 1 << 30))
    sides = [
        FarTensor((16 + shard) << 54, (33, 65), bf16, (1 << 30, 1 << (20 + shard)))
        for shard in range(shards)
    ]
    numbers = [FarTensor(base, (shards,), fp32) for base in (1 << 20, 1 << 21)]
    monkeypatch.setattr(torch, "empty_like", lambda tensor: out)
    assert kernels.ties_merge(main, sides, *numbers) is out
    assert seen.stored == addresses(out)
    assert seen.loaded == set.union(*map(addresses, (main, *sides, *numbers)))


def addresses(tensor: FarTensor) -> set[int]:
    return {tensor.address(*index) for index in itertools.product(*map(range, tensor.shape))}


def test_configurations():
    chosen = [kernels.choose_config(shards) for shards in range(1, 9)]
    assert chosen == [kernels.MANY] + [kernels.FEW] * 3 + [kernels.MANY] * 4
