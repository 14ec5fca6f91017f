"""cholesky_solve with its CUDA kernels, emulated: what the op adds to them."""

from __future__ import annotations

import pytest
import torch
from ops.layouts import random_rows, same_bits

from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops import cholesky_solve
from pyeditfast.ops.cholesky_on_cuda import solve_on_cuda

pytestmark = pytest.mark.usefixtures("cuda")


def grams(items: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    rows = random_rows(items, n, 2 * n, dtype=dtype)
    return rows @ rows.mT + torch.eye(n, dtype=dtype)


def test_the_op_takes_the_kernels_and_leaves_its_inputs_alone():
    gram, rhs = grams(3, 70, torch.float64), random_rows(3, 70, 5, dtype=torch.float64)
    kept = gram.clone(), rhs.clone()
    solution = cholesky_solve(gram, rhs)
    assert same_bits(solution, solve_on_cuda(gram, rhs)[0])
    assert same_bits(gram, kept[0]) and same_bits(rhs, kept[1])
    torch.testing.assert_close(gram @ solution, rhs)


def test_an_item_without_a_float32_factor_is_solved_in_float64():
    gram, rhs = grams(3, 2, torch.float32), random_rows(3, 2, 4)
    # The last pivot is 1e-8, which float32 does not tell from 0 beside 1 / 3.
    gram[1] = torch.tensor([[3.0, 1.0], [1.0, 1.0 / 3.0]])
    assert gram[1].double().det() > 0
    sound, pivots = solve_on_cuda(gram, rhs)
    assert pivots.tolist() == [0, 2, 0]
    solution = cholesky_solve(gram, rhs)
    assert same_bits(solution[[0, 2]], sound[[0, 2]])
    expected = torch.linalg.solve(gram[1].double(), rhs[1].double()).float()
    torch.testing.assert_close(solution[1], expected)


def test_errors_name_the_item():
    gram, rhs = grams(3, 5, torch.float64), random_rows(3, 5, 2, dtype=torch.float64)
    gram[2] = -gram[2]
    with pytest.raises(NotPositiveDefiniteError, match="item 2 of gram"):
        cholesky_solve(gram, rhs)
    gram[1, 3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="item 1 of gram holds NaN or infinity"):
        cholesky_solve(gram, rhs)


def test_what_the_kernels_do_not_do_is_said():
    gram, rhs = grams(1, 5, torch.float64), random_rows(1, 5, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="overwritten by torch's solver"):
        cholesky_solve(gram.clone(), rhs, overwrite_gram=True)
    with pytest.raises(ValueError, match="no backward pass"):
        cholesky_solve(gram.clone().requires_grad_(), rhs)
