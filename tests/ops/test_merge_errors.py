"""merge: what it refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pyeditfast.ops import merge
from pyeditfast.ops.merge import MERGES

MAIN = torch.ones(3, 4)


@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"main": [[1.0]]}, TypeError, "main is a list, not a torch.Tensor"),
        ({"main": MAIN.long()}, TypeError, "main has dtype torch.int64"),
        ({"main": MAIN[None]}, ValueError, "main has shape (1, 3, 4); [d_out, d_in] is needed"),
        ({"sides": []}, ValueError, "sides is empty; at least one side memory is needed"),
        (
            {"sides": [MAIN, MAIN.T]},
            ValueError,
            "sides[1] is torch.float32 (4, 3); main is torch.float32 (3, 4)",
        ),
        (
            {"sides": [MAIN.bfloat16(), MAIN]},
            ValueError,
            "sides[0] is torch.bfloat16 (3, 4); main is torch.float32 (3, 4)",
        ),
        ({"sides": [MAIN, "W"]}, TypeError, "sides[1] is a str, not a torch.Tensor"),
        ({"sides": [MAIN.to("meta")]}, ValueError, "sides[0] is on meta and main on cpu"),
        ({"density": 0.0}, ValueError, "density is 0.0; a number above 0 and up to 1 is needed"),
        ({"density": 1.01}, ValueError, "density is 1.01"),
        ({"density": -0.5}, ValueError, "density is -0.5"),
        ({"density": math.nan}, ValueError, "density is nan"),
        ({"weights": [1.0]}, ValueError, "1 weights were given for 2 side memories"),
        ({"weights": [1.0] * 3}, ValueError, "3 weights were given for 2 side memories"),
        ({"weights": [1.0, 0.0]}, ValueError, "weights holds 0.0; finite numbers above 0"),
        ({"weights": [-2.0, 1.0]}, ValueError, "weights holds -2.0"),
        ({"weights": [math.inf, 1.0]}, ValueError, "weights holds inf"),
        ({"weights": [1.0, math.nan]}, ValueError, "weights holds nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_show_the_offending_value(algorithm, changes, error, message):
    arguments = {"main": MAIN, "sides": [MAIN, MAIN], "algorithm": algorithm, **changes}
    with pytest.raises(error, match=re.escape(message)):
        merge(**arguments)


@pytest.mark.parametrize("name", ["TIES", "", "mean", None])
def test_unknown_algorithms(name):
    message = f"algorithm is {name!r}; choose one of {', '.join(MERGES)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        merge(MAIN, [MAIN], name)


@pytest.mark.parametrize("algorithm", ["ties", "magnitude", "magnitude_norm"])
def test_a_density_that_keeps_nothing(algorithm):
    with pytest.raises(ValueError, match=re.escape("density 0.08 keeps none of 12 elements")):
        merge(MAIN, [MAIN], algorithm, density=0.08)


@pytest.mark.parametrize("algorithm", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed must be in [0, 2**64), got -1"),
        (2**64 - 1, ValueError, f"seed must be in [0, 2**64), got {2**64}"),
        (1.5, TypeError, "seed must be an integer, got 1.5"),
    ],
)
def test_seeds_that_draw_nothing(algorithm, seed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        merge(MAIN, [MAIN, MAIN], algorithm, seed=seed)
