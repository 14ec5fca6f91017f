"""Whatever the user allows torch to do with float32 products, the ops keep float32's accuracy.

A machine without the units for it ignores the permission, so accuracy alone proves nothing there.
The tests therefore also watch which products the ops ask for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from layouts import DTYPES, random_rows, same_bits
from tolerances import assert_as_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pyeditfast import reference
from pyeditfast.ops import (
    RunningMoments,
    Shift,
    apply_shift_,
    cholesky_solve,
    covariance,
    edit_values,
    gram,
    precision,
    solve_shift,
)

solve_shift_module = importlib.import_module("pyeditfast.ops.solve_shift")


def _allow_by_name(name: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(name)


def _allow_in_mkldnn(name: str) -> Callable[[], None]:
    def allow() -> None:
        torch.backends.mkldnn.matmul.fp32_precision = name

    return allow


def _allow_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


ALLOWED = {
    "high": _allow_by_name("high"),
    "medium": _allow_by_name("medium"),
    "mkldnn tf32": _allow_in_mkldnn("tf32"),
    "mkldnn bf16": _allow_in_mkldnn("bf16"),
    "generic tf32": _allow_everywhere,
}

FORBIDDEN = {
    "default": lambda: None,
    "highest": _allow_by_name("highest"),
    "mkldnn ieee": _allow_in_mkldnn("ieee"),
}


def current_flags() -> tuple[str, str, str]:
    backends = torch.backends
    return (
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def restore_flags() -> Iterator[None]:
    """Put every flag back, so that no other test runs under the user's choice of this one."""
    generic, cuda, mkldnn = current_flags()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = generic
    torch.backends.cuda.matmul.fp32_precision = cuda
    torch.backends.mkldnn.matmul.fp32_precision = mkldnn
    assert current_flags() == (generic, cuda, mkldnn)


@pytest.fixture(params=ALLOWED)
def allowed(request) -> str:
    """Allow reduced float32 products in one of the ways torch has for it."""
    ALLOWED[request.param]()
    assert precision.reduced_float32(torch.device("cpu"))
    return request.param


class Products(TorchDispatchMode):
    """Notes the dtypes of the operands of every matrix product."""

    NAMES = ("mm", "bmm", "addmm", "addmm_", "addbmm", "baddbmm", "baddbmm_", "dot", "mv", "addmv")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.dtypes |= {leaf.dtype for leaf in tree_iter(args) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def low_rank(*lead: int) -> Shift:
    left, right = random_rows(*lead, 3, 13), random_rows(*lead, 3, 29, seed=1)
    return Shift("dual", 3, left=left, right=right)


def every_op(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return one call of every op that multiplies matrices or adds up products."""
    keys = random_rows(2, 13, 29, dtype=dtype)
    values = random_rows(2, 13, 7, seed=1, dtype=dtype)
    rows = random_rows(2, 13, 36, seed=2, dtype=dtype)
    moments = RunningMoments(36)
    moments.update(keys, values)

    def weight(*lead: int) -> Tensor:
        return random_rows(*lead, 13, 29, dtype=dtype)

    def normalized() -> Tensor:
        moments = RunningMoments(36)
        moments.update(rows)
        return moments.normalize(rows)

    return {
        "gram": lambda: gram(keys, 1.0),
        "covariance": lambda: covariance(keys),
        "dual": lambda: solve_shift(keys, values, form="dual").left,
        "primal": lambda: solve_shift(keys, values, form="primal").matrix,
        "cholesky_solve": lambda: cholesky_solve(gram(keys, 1.0), values.float()),
        "apply": lambda: apply_shift_(weight(), low_rank()),
        "apply to a batch": lambda: apply_shift_(weight(2, 2), low_rank(2, 2)),
        "compensated": lambda: apply_shift_(
            weight(), low_rank(), "compensated", remainder=torch.zeros(13, 29, dtype=dtype)
        ),
        "moments": normalized,
        "edit_values": lambda: edit_values(keys, values, moments, 1e-6),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", every_op(torch.float32))
def test_no_product_is_taken_in_float32_where_that_may_be_reduced(
    name, dtype, allowed, monkeypatch
):
    monkeypatch.setattr(solve_shift_module, "FLOAT64_COVARIANCE_BYTES", 0)
    with Products() as products:
        every_op(dtype)[name]()
    assert products.dtypes <= {torch.float64}


@pytest.mark.parametrize("forbidden", FORBIDDEN)
@pytest.mark.parametrize("name", ["gram", "covariance", "apply", "apply to a batch"])
def test_products_are_float32_where_that_is_exact(name, forbidden):
    FORBIDDEN[forbidden]()
    assert not precision.reduced_float32(torch.device("cpu"))
    with Products() as products:
        every_op(torch.float32)[name]()
    assert products.dtypes == {torch.float32}


def test_gram_keeps_float32_accuracy(allowed):
    keys = random_rows(101, 1000)
    naive = random_rows(101, 1000).double() @ random_rows(101, 1000).double().mT
    result = gram(keys, 0.0)
    assert same_bits(result, naive.float())


def test_gram_with_a_dominant_direction_keeps_its_ridge(allowed):
    # TF32 or bfloat16 would lose 1e-3 of entries of 1e4, more than the ridge of 1.
    keys = random_rows(31, 101) + 10.0 * random_rows(1, 101, seed=1)
    eigenvalues = torch.linalg.eigvalsh(gram(keys, 1.0).double() - torch.eye(31).double())
    exact = torch.linalg.eigvalsh(reference.gram(keys.double()))
    assert (eigenvalues - exact).abs().max().item() <= 1e-2


def test_apply_keeps_float32_accuracy(allowed):
    weight, shift = random_rows(13, 29), low_rank()
    exact = weight.double() + shift.left.double().mT @ shift.right.double()
    naive = weight + (shift.left.double().mT @ shift.right.double()).float()
    assert_as_accurate(apply_shift_(weight, shift), naive, exact, 3)


def test_flags_are_the_users(allowed):
    before = current_flags()
    for call in every_op(torch.float32).values():
        call()
    assert current_flags() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", every_op(torch.float32))
def test_autocast_changes_nothing(name, dtype):
    expected = every_op(dtype)[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = every_op(dtype)[name]()
        assert torch.is_autocast_enabled("cpu")
    assert same_bits(result, expected)


def test_exact_matmul_of_16_bit_operands_is_exact():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(-255, 256, (2, 31, 31), generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        result = precision.exact_matmul(a.to(dtype), b.to(dtype))
        assert torch.equal(result.double(), a.double() @ b.double())


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_matmul_returns_the_wanted_dtype(dtype, wanted):
    a, b = random_rows(2, 3, 5, dtype=dtype), random_rows(2, 5, 7, seed=1, dtype=dtype)
    result = precision.exact_matmul(a, b, wanted)
    assert result.dtype == wanted
    assert_as_accurate(result, a.to(wanted) @ b.to(wanted), a.double() @ b.double(), 5)


def test_cuda_is_judged_by_its_own_flag():
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision.reduced_float32(torch.device("cuda"))
    assert not precision.reduced_float32(torch.device("cpu"))
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not precision.reduced_float32(torch.device("cuda"))
    assert precision.reduced_float32(torch.device("cpu"))
