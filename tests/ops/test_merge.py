"""merge: shards into one side memory, by every published way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from memories import as_float64
from tolerances import UNIT_ROUNDOFF, floor, largest_error
from torch import Tensor

from pyeditfast import backend
from pyeditfast.ops import merge, random_mask, ties_merge
from pyeditfast.ops.merge import MERGES
from pyeditfast.reference import merges

WITH_DENSITY = ("ties", "magnitude", "magnitude_norm", "dare_linear", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")

# One, two and three shards; halves and quarters keep the 16-bit sums exact, so that an element
# whose deltas cancel has the same sign in float32 and in float64.
WEIGHTS = [(1, None), (1, [3.0]), (2, None), (2, [0.25, 1.5]), (3, [0.5, 0.25, 0.25])]

WAYS = [(name, 0.53) for name in MERGES] + [(n, d) for n in WITH_DENSITY for d in (0.2, 1.0)]

SHAPES = [(1, 2), (1, 31), (29, 1), (13, 17), (2, 3)]


def shards(
    rows: int, columns: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Return a main memory and shards in which about a third of the elements are still its own."""
    main = random_rows(rows, columns, seed=seed, dtype=torch.float64, scale=0.02)
    sides = []
    for number in range(1, count + 1):
        delta = random_rows(rows, columns, seed=seed + number, dtype=torch.float64, scale=0.02)
        moved = random_rows(rows, columns, seed=seed + number + 70) > -0.4
        sides.append((main + delta).to(dtype).where(moved, main.to(dtype)))
    main = main.to(dtype)
    return main, sides


# The formulas, in float64, one element at a time.


def largest(delta: np.ndarray, density: float) -> np.ndarray:
    """Keep the ``int(density · numel)`` largest magnitudes and what ties with the smallest."""
    ordered = sorted((abs(d) for d in delta.flat), reverse=True)
    smallest = ordered[int(density * delta.size) - 1]
    return np.array([d if abs(d) >= smallest else 0.0 for d in delta.flat]).reshape(delta.shape)


def elected(deltas: list[np.ndarray], weights: list[float], mean: bool) -> np.ndarray:
    """Return the weighted sum, or mean, of the deltas of the sign of the weighted sum of all."""
    out = np.zeros(deltas[0].shape)
    for place in np.ndindex(out.shape):
        pairs = [(w, d[place]) for w, d in zip(weights, deltas, strict=True)]
        positive = sum(w * d for w, d in pairs) >= 0
        agree = [(w, d) for w, d in pairs if (d > 0 if positive else d < 0)]
        share = sum(w for w, _ in agree) if mean else 1.0
        out[place] = sum(w * d for w, d in agree) / share if agree else 0.0
    return out


def on_the_sphere(sides: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Turn the first shard towards each of the others, in the plane of both."""
    merged, total = sides[0], weights[0]
    for side, weight in zip(sides[1:], weights[1:], strict=True):
        total += weight
        t = weight / total
        a, b = merged.flatten(), side.flatten()
        cosine = (a @ b) / math.sqrt((a @ a) * (b @ b))
        if abs(cosine) > 0.9995:
            merged = (1 - t) * merged + t * side
            continue
        angle = math.acos(cosine)
        merged = (math.sin((1 - t) * angle) * merged + math.sin(t * angle) * side) / math.sin(angle)
    return merged


def exact_merge(
    main: Tensor,
    sides: list[Tensor],
    algorithm: str,
    density: float,
    weights: list[float] | None,
    seed: int,
) -> Tensor:
    """Return the merged memory in float64."""
    weights = [1.0 / len(sides)] * len(sides) if weights is None else weights
    centre = as_float64(main)
    deltas = [as_float64(side) - centre for side in sides]
    if algorithm in RANDOM:
        masks = [random_mask(seed + s, density, main.shape).numpy() for s in range(len(sides))]
        deltas = [np.where(mask, delta, 0.0) for mask, delta in zip(masks, deltas, strict=True)]
    elif algorithm in WITH_DENSITY:
        deltas = [largest(delta, density) for delta in deltas]
    weighted = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    result = {
        "ties": lambda: centre + elected(deltas, weights, mean=True),
        "sign": lambda: centre + elected(deltas, weights, mean=True),
        "dare_ties": lambda: centre + elected(deltas, weights, mean=False) / density,
        "linear": lambda: centre + weighted,
        "magnitude": lambda: centre + weighted,
        "dare_linear": lambda: centre + weighted,
        "magnitude_norm": lambda: centre + weighted / sum(weights),
        "slerp": lambda: on_the_sphere([as_float64(side) for side in sides], weights),
    }[algorithm]()
    return torch.from_numpy(result)


def assert_rounded_once(result: Tensor, exact: Tensor) -> None:
    """Require the float64 result rounded to ``result.dtype`` once, after sums in float32."""
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    # The last digit of each element is that of its own power of two.
    power = torch.frexp(exact)[1].double()
    if result.dtype == torch.float16:
        power = power.clamp(min=-13)
    rounding = 0.0 if result.dtype == wide else UNIT_ROUNDOFF[result.dtype] * 2.0 ** (power - 1)
    sums = 8 * UNIT_ROUNDOFF[wide] * exact.abs().max()
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= rounding + sums).all()


@pytest.mark.parametrize(("count", "weights"), WEIGHTS, ids=str)
@pytest.mark.parametrize(("algorithm", "density"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_formula(dtype, algorithm, density, count, weights):
    main, sides = shards(13, 17, count, dtype)
    result = merge(main, sides, algorithm, density=density, weights=weights, seed=7)
    assert result.dtype == dtype
    assert_rounded_once(result, exact_merge(main, sides, algorithm, density, weights, 7))


@pytest.mark.parametrize("algorithm", MERGES)
def test_three_shards_of_equal_weight(algorithm):
    main, sides = shards(13, 17, 3, torch.float64)
    exact = exact_merge(main, sides, algorithm, 0.53, None, 0)
    assert_rounded_once(merge(main, sides, algorithm), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("algorithm", MERGES)
def test_odd_shapes(algorithm, shape):
    main, sides = shards(*shape, 2, torch.float64)
    exact = exact_merge(main, sides, algorithm, 0.53, None, 0)
    assert_rounded_once(merge(main, sides, algorithm), exact)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_is_ties_merge(name, dtype):
    main, sides = shards(13, 17, 2, dtype)
    with backend(name):
        result = merge(main, sides, weights=[0.5, 2.0], density=0.3)
        assert same_bits(result, ties_merge(main, sides, 0.3, [0.5, 2.0]))
    assert_rounded_once(result, exact_merge(main, sides, "ties", 0.3, [0.5, 2.0], 0))


def test_the_algorithms_differ():
    main, sides = shards(13, 17, 3)
    results = [merge(main, sides, name, weights=[1.0, 0.5, 0.25], seed=2) for name in MERGES]
    for number, result in enumerate(results):
        assert all(largest_error(result, other.double()) > 1e-2 for other in results[:number])


@pytest.mark.parametrize("algorithm", MERGES)
def test_the_defaults_are_those_of_wise(algorithm):
    main, sides = shards(13, 17, 2)
    spelled_out = merge(main, sides, algorithm, density=0.53, weights=[0.5, 0.5], seed=0)
    assert same_bits(merge(main, sides, algorithm), spelled_out)
    assert same_bits(merge(main, sides), merge(main, sides, "ties"))


@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_that_agree_merge_into_themselves(dtype, algorithm):
    main, (side,) = shards(13, 17, 1, dtype)
    result = merge(main, [side] * 3, algorithm, density=1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    granted = 8 * UNIT_ROUNDOFF[wide] + (UNIT_ROUNDOFF[dtype] if dtype != wide else 0.0)
    assert largest_error(result, side.double()) <= granted


# Rounding.


@pytest.mark.parametrize("algorithm", ["linear", "magnitude", "slerp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_too_small_for_16_bits_adds_up(dtype, algorithm):
    # Each of four shards moves up by a spacing; a quarter of one is lost if it is rounded alone.
    spacing = 2.0 * UNIT_ROUNDOFF[dtype]
    main = torch.ones(3, 5, dtype=dtype)
    sides = [torch.full((3, 5), 1.0 + spacing, dtype=dtype)] * 4
    assert (main + 0.25 * (sides[0] - main)).eq(1.0).all()
    assert merge(main, sides, algorithm, density=1.0).eq(1.0 + spacing).all()


# Elections.


@pytest.mark.parametrize("algorithm", ["ties", "sign", "dare_ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tie_elects_the_positive_sign(dtype, algorithm):
    main = torch.full((1, 4), 0.5, dtype=dtype)
    up = main + torch.tensor([[0.25, -0.25, 0.0, 0.25]], dtype=dtype)
    down = main + torch.tensor([[-0.25, 0.25, 0.0, -0.125]], dtype=dtype)
    result = merge(main, [up, down], algorithm, density=1.0)
    # A mean of the deltas of that sign, but for dare_ties, which sums them by their weights.
    change = 0.125 if algorithm == "dare_ties" else 0.25
    assert (result - main).tolist() == [[change, change, 0.0, change]]


@pytest.mark.parametrize("algorithm", ["ties", "sign"])
def test_weights_decide_an_election(algorithm):
    main = torch.zeros(1, 2)
    sides = [torch.tensor([[1.0, -1.0]]), torch.tensor([[-3.0, 3.0]])]
    by_weight = {(1.0, 1.0): [-3.0, 3.0], (4.0, 1.0): [1.0, -1.0], (3.0, 1.0): [1.0, 3.0]}
    for weights, expected in by_weight.items():
        result = merge(main, sides, algorithm, density=1.0, weights=weights)
        assert result.tolist() == [expected]


@pytest.mark.parametrize(("density", "kept"), [(0.5, 3), (0.34, 3), (0.8, 4), (1.0, 5)])
def test_trimming_keeps_all_that_tie_with_the_smallest_kept(density, kept):
    # int(0.34 · 5) = 1, and three magnitudes tie with the largest.
    side = torch.tensor([[2.0, -2.0, 1.0, 2.0, 0.5]])
    for algorithm in ("ties", "magnitude"):
        result = merge(torch.zeros(1, 5), [side], algorithm, density=density)
        assert result.count_nonzero() == kept
        assert result[result != 0].tolist() == side[result != 0].tolist()


# Slerp.


def test_slerp_keeps_the_length_of_shards_of_one_length():
    main, sides = shards(13, 17, 3, torch.float64)
    sides = [side / side.norm() for side in sides]
    for count in (2, 3):
        result = merge(main, sides[:count], "slerp")
        assert result.norm().item() == pytest.approx(1.0, abs=1e-14)


def test_slerp_goes_along_the_arc():
    main = torch.zeros(1, 2, dtype=torch.float64)
    east, north = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    for weights, angle in (([1.0, 1.0], 45.0), ([2.0, 1.0], 30.0), ([1.0, 8.0], 80.0)):
        result = merge(main, [east, north], "slerp", weights=weights)
        assert result[0].tolist() == pytest.approx(
            [math.cos(math.radians(angle)), math.sin(math.radians(angle))], abs=1e-15
        )


@pytest.mark.parametrize("factor", [3.0, -3.0, 1.0001])
def test_slerp_of_one_line_is_linear(factor):
    main, (side,) = shards(5, 7, 1, torch.float64)
    result = merge(main, [side, factor * side], "slerp", weights=[3.0, 1.0])
    assert largest_error(result, (0.75 + 0.25 * factor) * side) <= floor(torch.float64, 2)


@pytest.mark.parametrize("zero", [0, 1])
def test_slerp_with_a_shard_of_zeros_is_linear(zero):
    main, sides = shards(5, 7, 2)
    sides[zero].zero_()
    result = merge(main, sides, "slerp", weights=[1.0, 3.0])
    assert largest_error(result, (0.25 * sides[0] + 0.75 * sides[1]).double()) <= 1e-7


def test_slerp_is_linear_only_close_to_one_line():
    # The cosines are 0.9994 and 0.9996; the middle of the chord lies 1e-4 inside the arc.
    main, a = torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0]]).double()
    for cosine, length in ((0.9994, 1.0), (0.9996, math.sqrt((1 + 0.9996) / 2))):
        b = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
        assert merge(main, [a, b], "slerp").norm().item() == pytest.approx(length, abs=1e-12)


# Random parts.


@pytest.mark.parametrize("algorithm", RANDOM)
def test_a_seed_draws_a_part_for_every_shard(algorithm):
    main, (side,) = shards(31, 37, 1)
    side = main + 1.0
    result = merge(main, [side, side], algorithm, density=0.5, weights=[0.5, 0.25], seed=11)
    scale = 2.0 if algorithm == "dare_ties" else 1.0
    drawn = [random_mask(11 + s, 0.5, main.shape) for s in range(2)]
    assert drawn[0].ne(drawn[1]).any()
    expected = scale * (0.5 * drawn[0] + 0.25 * drawn[1])
    assert ((result - main) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("algorithm", MERGES)
def test_only_the_random_ways_heed_the_seed(algorithm):
    main, sides = shards(13, 17, 2)
    same = same_bits(merge(main, sides, algorithm, seed=1), merge(main, sides, algorithm, seed=2))
    assert same is (algorithm not in RANDOM)


@pytest.mark.parametrize("algorithm", MERGES)
def test_only_some_ways_heed_the_density(algorithm):
    main, sides = shards(13, 17, 2)
    low, high = (merge(main, sides, algorithm, density=density) for density in (0.2, 0.8))
    assert same_bits(low, high) is (algorithm not in WITH_DENSITY)


# Inputs.


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_memories_are_read_and_left_alone(dtype, algorithm, layout, count):
    plain_main, plain_sides = shards(11, 7, count, dtype)
    main, main_storage = lay_out(plain_main, layout)
    laid_out = [lay_out(side, layout) for side in plain_sides]
    storages = [main_storage, *(storage for _, storage in laid_out)]
    before = [storage.clone() for storage in storages]
    result = merge(main, [view for view, _ in laid_out], algorithm, seed=3)
    exact = exact_merge(plain_main, plain_sides, algorithm, 0.53, None, 3)
    assert_rounded_once(result, exact)
    assert all(same_bits(s, copy) for s, copy in zip(storages, before, strict=True))
    # What is done to the result does not reach them either.
    result.fill_(math.nan)
    assert all(same_bits(s, copy) for s, copy in zip(storages, before, strict=True))


@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_same_bits_twice(dtype, algorithm):
    main, sides = shards(61, 101, 3, dtype)
    given = [1.0, 0.5, 0.25]
    first, second = (merge(main, sides, algorithm, weights=given) for _ in range(2))
    assert same_bits(first, second)
    assert given == [1.0, 0.5, 0.25]


def test_the_references_leave_their_arguments_alone():
    main, sides = shards(5, 7, 1)
    copies = [main.clone(), sides[0].clone()]
    for result in (
        merges.linear(main, sides, [1.0]),
        merges.slerp(main, sides, [1.0]),
        merges.magnitude(main, sides, [1.0], 0.5),
        merges.magnitude_norm(main, sides, [1.0], 0.5),
        merges.sign(main, sides, [1.0]),
        merges.dare_linear(main, sides, [1.0], 0.5, 0),
        merges.dare_ties(main, sides, [1.0], 0.5, 0),
    ):
        result.zero_()
        assert same_bits(main, copies[0]) and same_bits(sides[0], copies[1])
