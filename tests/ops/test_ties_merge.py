"""ties_merge: trim, elect signs and merge, the same on every backend."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from thread_counts import assert_same_bits_on_any_threads
from tolerances import assert_as_accurate

from pyeditfast import reference
from pyeditfast.backends import backend, explain
from pyeditfast.extension import extension_status, load_extension

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.ties_merge")

extension = load_extension()
needs_extension = pytest.mark.skipif(extension is None, reason=extension_status())

BACKENDS = [
    "auto",
    "reference",
    "torch",
    pytest.param("cpp", marks=needs_extension),
]
SIXTEEN_AND_32_BITS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (1, 1031), (1031, 1), (7, 13), (3, 2050), (131, 257), (64, 1024)]


def memories(shape, dtype, count=2):
    """Return a main memory and ``count`` side memories near it."""
    main = random_rows(*shape, dtype=dtype, scale=0.02)
    sides = [
        (main.double() + random_rows(*shape, seed=1 + s, scale=0.01).double()).to(dtype)
        for s in range(count)
    ]
    return main, sides


@needs_extension
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_has_the_bits_of_the_reference(shape, dtype):
    main, sides = memories(shape, dtype, 3)
    for density, weights in ((1.0, None), (0.53 if main.numel() > 1 else 1.0, (0.2, 0.5, 0.7))):
        for count in (1, 2, 3):
            some = None if weights is None else weights[:count]
            expected = reference.ties_merge(main, sides[:count], density, some)
            with backend("cpp"):
                assert same_bits(op.ties_merge(main, sides[:count], density, some), expected)


@needs_extension
def test_more_memories_than_a_kernel_takes():
    main, sides = memories((37, 129), torch.bfloat16, 11)
    expected = reference.ties_merge(main, sides, 0.3)
    with backend("cpp"):
        assert same_bits(op.ties_merge(main, sides, 0.3), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_by_hand(name):
    """Three shards, one element a case; weights 1/3 each, everything kept."""
    deltas = torch.tensor(
        [
            # Two up, one down: the two are averaged.
            [3.0, 1.0, -2.0],
            # One large down wins against two small up.
            [-6.0, 1.0, 2.0],
            # The sum is 0, which counts as +.
            [2.0, -2.0, 0.0],
            # Only one moved.
            [0.0, 0.0, -3.0],
            # None moved.
            [0.0, 0.0, 0.0],
        ]
    )
    main = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0]])
    with backend(name):
        merged = op.ties_merge(main, [main + deltas[None, :, s] for s in range(3)], 1.0)
    torch.testing.assert_close(merged, main + torch.tensor([[2.0, -6.0, 2.0, -3.0, 0.0]]))


@pytest.mark.parametrize("name", BACKENDS)
def test_trimming_keeps_what_ties_with_the_threshold(name):
    main = torch.zeros(2, 4)
    side = torch.tensor([[4.0, 1.0, -2.0, 2.0], [0.5, 2.0, -1.0, 0.0]])
    with backend(name):
        merged = op.ties_merge(main, [side], 0.25)
    assert merged.tolist() == [[4.0, 0.0, -2.0, 2.0], [0.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_elect_and_average(name):
    main = torch.zeros(1, 2)
    sides = [torch.tensor([[1.0, 4.0]]), torch.tensor([[-1.0, 1.0]])]
    with backend(name):
        merged = op.ties_merge(main, sides, 1.0, [0.25, 0.75])
    assert merged.tolist() == [[-1.0, 1.75]]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [*SIXTEEN_AND_32_BITS, torch.float64])
def test_every_backend_is_as_accurate_as_the_formula_in_its_dtype(name, dtype):
    if name == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ form takes no float64")
    # Multiples of 2^-6 below 2: no difference is rounded, so all trim the same elements.
    main = (random_rows(67, 129) * 8).round().clamp(-60, 60).div(64).to(dtype)
    sides = [
        (main.double() + (random_rows(67, 129, seed=1 + s).double() * 8).round() / 64).to(dtype)
        for s in range(2)
    ]
    doubles = [side.double() for side in sides]
    exact = reference.ties_merge(main.double(), doubles, 0.53, [0.3, 0.7])
    naive = reference.ties_merge(main, sides, 0.53, [0.3, 0.7])
    with backend(name):
        result = op.ties_merge(main, sides, 0.53, [0.3, 0.7])
    assert result.dtype == dtype
    assert_as_accurate(result, naive, exact, 4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
def test_layouts(name, layout, dtype):
    main, sides = memories((37, 1029), dtype)
    with backend(name):
        expected = op.ties_merge(main, sides, 0.53)
        views = [lay_out(side, layout)[0] for side in sides]
        main_view = lay_out(main, layout)[0]
        assert same_bits(op.ties_merge(main_view, views, 0.53), expected)
        mixed = op.ties_merge(main, [views[0], sides[1].T.contiguous().T], 0.53)
    assert same_bits(mixed, expected)
    assert all(same_bits(view.clone(), side) for view, side in zip(views, sides, strict=True))
    assert same_bits(main_view.clone(), main)


@needs_extension
def test_the_result_has_the_layout_of_main():
    main, sides = memories((37, 129), torch.bfloat16)
    turned = main.T.contiguous().T
    with backend("cpp"):
        merged = op.ties_merge(turned, sides, 0.53)
    assert merged.stride() == turned.stride()
    assert same_bits(merged, reference.ties_merge(main, sides, 0.53))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.53, 1.0])
def test_special_values(name, dtype, density):
    """NaN, infinities, subnormal numbers, zeros of both signs and the largest numbers, in every
    combination of main and two side memories."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    numbers = [0.0, -0.0, 1.5, -2.0, math.nan, math.inf, -math.inf, largest, -largest]
    special = [*numbers, smallest, smallest / 2, -smallest / 4]
    triples = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype)
    main, first, second = (part.reshape(12, 144) for part in triples.T.contiguous())
    expected = reference.ties_merge(main, [first, second], density)
    with backend(name):
        merged = op.ties_merge(main, [first, second], density)
    torch.testing.assert_close(merged, expected, rtol=0, atol=0, equal_nan=True)


@needs_extension
def test_all_equal():
    main = torch.full((37, 41), 0.5, dtype=torch.bfloat16)
    with backend("cpp"):
        assert torch.equal(op.ties_merge(main, [main, main], 0.53), main)
        moved = op.ties_merge(main, [main + 0.25, main + 0.25], 0.53)
    assert torch.equal(moved, main + 0.25)


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_thread_counts_give_the_same_bits(layout):
    main, sides = memories((301, 1023), torch.bfloat16)
    main, *sides = (lay_out(part, layout)[0] for part in (main, *sides))
    with backend("cpp"):
        assert_same_bits_on_any_threads(lambda: op.ties_merge(main, sides, 0.53))


def test_backend_on_the_cpu():
    expected = "torch" if extension is None else "cpp"
    assert explain("ties_merge", op.CANDIDATES, torch.device("cpu")).backend == expected


@needs_extension
def test_cpp_says_what_it_does_not_take():
    main, sides = memories((3, 4), torch.float64)
    with backend("cpp"), pytest.raises(ValueError, match=r"not torch\.float64"):
        op.ties_merge(main, sides, 0.5)


@pytest.mark.parametrize(
    ("density", "weights", "message"),
    [
        (0.0, None, "density is 0.0"),
        (1.1, None, "density is 1.1"),
        (0.01, None, "density 0.01 keeps none of 12 elements"),
        (0.5, [1.0], "1 weights were given for 2 side memories"),
        (0.5, [1.0, 0.0], "weights holds 0.0"),
        (0.5, [1.0, math.nan], "weights holds nan"),
    ],
)
def test_bad_numbers(density, weights, message):
    main, sides = memories((3, 4), torch.float32)
    with pytest.raises(ValueError, match=message):
        op.ties_merge(main, sides, density, weights)


def test_bad_memories():
    main, sides = memories((3, 4), torch.float32)
    with pytest.raises(ValueError, match="sides is empty"):
        op.ties_merge(main, [], 0.5)
    with pytest.raises(ValueError, match=r"sides\[1\] is torch.float32 \(4, 3\); main is"):
        op.ties_merge(main, [sides[0], sides[1].T], 0.5)
    with pytest.raises(
        ValueError, match=r"sides\[0\] is torch.bfloat16 \(3, 4\); main is torch.fl"
    ):
        op.ties_merge(main, [sides[0].bfloat16()], 0.5)
    with pytest.raises(ValueError, match=r"main has shape \(1, 3, 4\)"):
        op.ties_merge(main[None], sides, 0.5)
