"""The operators of ``torch.library``: schema, fakes and gradients."""

from __future__ import annotations

import pytest
import torch
from ops.layouts import random_rows, same_bits
from torch import Tensor

from pyeditfast import ops, reference
from pyeditfast.ops.torch_library import activation_gap, routed_linear
from pyeditfast.reference.activation_gap import ACTIVATIONS as FUNCTIONS

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")

BATCH, TOKENS, D_IN, D_OUT = 5, 4, 7, 6


def name_or_none(activation: str) -> str | None:
    return None if activation == "none" else activation


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad=False) -> Tensor:
    return random_rows(*shape, seed=seed, dtype=dtype).requires_grad_(grad)


def gap_arguments(
    memories: int,
    bias: bool = False,
    activation: str = "silu",
    reduction: str = "auto",
    mask: bool = False,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple:
    """Return x, main, sides, bias, activation, reduction and mask."""
    masked = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    masked[1, :2] = False
    masked[2] = False
    masked[4, 3] = False
    return (
        numbers(BATCH, TOKENS, D_IN, seed=1, dtype=dtype, grad=grad),
        numbers(D_OUT, D_IN, seed=2, dtype=dtype, grad=grad),
        [numbers(D_OUT, D_IN, seed=3 + i, dtype=dtype, grad=grad) for i in range(memories)],
        numbers(D_OUT, seed=30, dtype=dtype, grad=grad) if bias else None,
        activation,
        reduction,
        masked if mask else None,
    )


def arguments(
    memories: int,
    bias: bool = False,
    activation: str = "silu",
    reduction: str = "auto",
    mask: bool = False,
    route: bool = False,
    gate: str | None = None,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple:
    """Return the arguments of ``routed_linear``; the gaps of the queries choose all memories."""
    x, main, sides, offset, *names, masked = gap_arguments(
        memories, bias, activation, reduction, mask, dtype, grad
    )
    given = torch.arange(BATCH) % (memories + 1) - 1 if route else None
    gates = numbers(BATCH, TOKENS, D_IN, seed=31, dtype=dtype, grad=grad) if gate else None
    inputs = x if gates is None else FUNCTIONS[gate](gates) * x
    gaps = gaps_by_function(inputs, main, sides, offset, *names, masked)
    ranked = gaps.detach().float().sort(0).values
    # Most queries are above the first threshold, few above the second.
    thresholds = torch.stack(
        [ranked[1 + i : 3 + i, i].mean() for i in range(memories)] or [torch.zeros(())]
    )[:memories]
    return x, main, sides, thresholds, offset, *names, masked, given, gates, gate or "silu"


def by_function(x, main, sides, thresholds, bias, activation, reduction, mask, route, gate, name):
    return reference.routed_linear(
        x,
        main,
        sides,
        thresholds,
        bias=bias,
        activation=name_or_none(activation),
        reduction=reduction,
        mask=mask,
        route=route,
        gate=gate,
        gate_activation=name,
    )


def gaps_by_function(x, main, sides, bias, activation, reduction, mask):
    return reference.activation_gap(
        x,
        main,
        sides,
        bias=bias,
        activation=name_or_none(activation),
        reduction=reduction,
        mask=mask,
    )


def tensors_of(arguments: tuple) -> list[Tensor]:
    """Return the floating tensors among the arguments, lists opened."""
    flat = [part for entry in arguments for part in (entry if isinstance(entry, list) else [entry])]
    return [part for part in flat if isinstance(part, Tensor) and part.requires_grad]


CASES = [
    {"memories": 0},
    {"memories": 0, "bias": True, "mask": True, "gate": "gelu"},
    {"memories": 1, "activation": "none"},
    {"memories": 2},
    {"memories": 2, "bias": True, "mask": True},
    {"memories": 2, "route": True},
    {"memories": 2, "bias": True, "mask": True, "route": True, "gate": "silu"},
    {"memories": 2, "bias": True, "gate": "gelu_tanh", "reduction": "max"},
]

GAP_CASES = [case for case in CASES if "route" not in case and "gate" not in case]


# The values.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routed_linear_is_the_public_function(case):
    given = arguments(**case)
    output, route, gaps = routed_linear(*given)
    expected = by_function(*given)
    torch.testing.assert_close(output, expected.output, rtol=1e-13, atol=1e-13)
    assert torch.equal(route, expected.route)
    if case["memories"] == 2:
        assert set(route.tolist()) == {-1, 0, 1}, "the case does not reach every memory"
    if case.get("route"):
        assert gaps.shape == (BATCH, 0)
    else:
        torch.testing.assert_close(gaps, expected.gaps, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", GAP_CASES, ids=str)
def test_activation_gap_is_the_public_function(case):
    given = gap_arguments(**case)
    torch.testing.assert_close(activation_gap(*given), gaps_by_function(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(dtype):
    given = arguments(2, bias=True, dtype=dtype)
    output, route, gaps = routed_linear(*given)
    assert (output.dtype, route.dtype, gaps.dtype) == (dtype, torch.int64, torch.float32)
    public = ops.routed_linear(*given[:4], bias=given[4], activation="silu")
    assert same_bits(output, public.output) and same_bits(gaps, public.gaps)
    assert activation_gap(*gap_arguments(2, dtype=dtype)).dtype == torch.float32


def test_errors_are_those_of_the_public_function():
    given = list(arguments(2))
    given[5] = "swish"
    with pytest.raises(ValueError, match="activation is 'swish'"):
        routed_linear(*given)


def test_a_given_route_is_copied():
    given = arguments(2, route=True)
    route = routed_linear(*given)[1]
    assert torch.equal(route, given[8]) and route.data_ptr() != given[8].data_ptr()


# What torch asks of an operator.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_routed_linear(case, dtype):
    torch.library.opcheck(routed_linear, arguments(**case, dtype=dtype, grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GAP_CASES, ids=str)
def test_opcheck_of_activation_gap(case, dtype):
    torch.library.opcheck(activation_gap, gap_arguments(**case, dtype=dtype, grad=True))


def test_opcheck_of_inputs_that_are_not_contiguous():
    x, main, sides, *rest = arguments(2, route=True, dtype=torch.float32)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    main, sides = main.mT.contiguous().mT, [sides[0], sides[1].mT.contiguous().mT]
    torch.library.opcheck(routed_linear, (x, main, sides, *rest))
    torch.library.opcheck(activation_gap, (x, main, sides, None, "silu", "mean", None))


# Gradients.


def rebuild(given: tuple, tensors: tuple[Tensor, ...]) -> tuple:
    """Return the arguments with those that need a gradient replaced."""
    left = iter(tensors)

    def replaced(entry):
        return next(left) if isinstance(entry, Tensor) and entry.requires_grad else entry

    return tuple(
        [replaced(part) for part in entry] if isinstance(entry, list) else replaced(entry)
        for entry in given
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_routed_linear(case):
    given = arguments(**case, grad=True)

    def output(*tensors: Tensor) -> Tensor:
        return routed_linear(*rebuild(given, tensors))[0]

    tensors = tensors_of(given)
    assert len(tensors) == 2 + case["memories"] + ("bias" in case) + ("gate" in case)
    assert torch.autograd.gradcheck(output, tensors)


@pytest.mark.parametrize("gate", ACTIVATIONS[1:])
def test_gradients_through_gates(gate):
    given = arguments(1, route=True, gate=gate, grad=True)
    tensors = tensors_of(given)
    assert torch.autograd.gradcheck(lambda *ts: routed_linear(*rebuild(given, ts))[0], tensors)


@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_activation_gap(activation, reduction):
    given = gap_arguments(2, True, activation, reduction, True, grad=True)
    assert torch.autograd.gradcheck(
        lambda *tensors: activation_gap(*rebuild(given, tensors)), tensors_of(given)
    )


def test_gradients_of_activation_gap_of_no_memory():
    given = gap_arguments(0, True, grad=True)
    gaps = activation_gap(*given)
    gradients = torch.autograd.grad(gaps.sum(), tensors_of(given))
    assert all(not gradient.any() for gradient in gradients)


def test_second_derivatives():
    given = arguments(2, bias=True, route=True, gate="silu", grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: routed_linear(*rebuild(given, tensors))[0], tensors_of(given)
    )
    given = gap_arguments(1, True, "silu", "mean", grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: activation_gap(*rebuild(given, tensors)), tensors_of(given)
    )


@pytest.mark.parametrize("tokens", [100, 101])
@pytest.mark.parametrize("reduction", ["mean", "max", "auto"])
def test_gradients_of_long_queries(reduction, tokens):
    x = numbers(2, 102, 3, seed=1, grad=True)
    main, side = (numbers(2, 3, seed=seed, grad=True) for seed in (2, 3))
    mask = torch.arange(102) < torch.tensor([[tokens], [7]])
    given = (x, main, [side], None, "gelu", reduction, mask)
    weights = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    result, expected = (
        torch.autograd.grad((function(*given) * weights).sum(), (x, main, side))
        for function in (activation_gap, gaps_by_function)
    )
    for gradient, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_equal_gaps_share_the_gradient_of_the_maximum():
    token = numbers(1, 1, 3, seed=1)
    x = token.repeat(1, 2, 1).requires_grad_()
    main, side = (numbers(2, 3, seed=seed) for seed in (2, 3))
    given = (x, main, [side], None, "none", "max", None)
    result, expected = (
        torch.autograd.grad(function(*given).sum(), x)[0]
        for function in (activation_gap, gaps_by_function)
    )
    torch.testing.assert_close(result, expected)
    assert result[0, 0].any() and torch.equal(result[0, 0], result[0, 1])


def test_equal_memories_have_gradient_zero():
    x, main = numbers(1, 2, 3, seed=1, grad=True), numbers(2, 3, seed=2, grad=True)
    side = main.detach().clone().requires_grad_()
    gaps = activation_gap(x, main, [side], None, "silu", "mean", None)
    assert all(not g.any() for g in torch.autograd.grad(gaps.sum(), (x, main, side)))


def test_nan_of_one_query_stays_out_of_other_memories_gradients():
    given = arguments(2, route=True, gate="silu", grad=True)
    x, main, sides, *_, gate, _ = given
    with torch.no_grad():
        x[1, 2, 3] = gate[4, 0, 0] = float("nan")
    # The routes are −1, 0, 1, −1, 0.
    output = routed_linear(*given)[0]
    grads = torch.autograd.grad(output.sum(), [main, *sides])
    assert [bool(grad.isnan().any()) for grad in grads] == [False, True, False]


def test_nan_in_tokens_that_do_not_count_stays_out_of_the_gradients():
    given = gap_arguments(2, True, mask=True, grad=True)
    x, mask = given[0], given[-1]
    with torch.no_grad():
        x[~mask] = float("nan")
    grads = torch.autograd.grad(activation_gap(*given).sum(), tensors_of(given))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][~mask].any()


def test_the_decision_has_no_gradient():
    output, route, gaps = routed_linear(*arguments(2, grad=True))
    assert output.requires_grad and not route.requires_grad and not gaps.requires_grad


def test_only_wanted_gradients_are_made():
    x, main, sides, *rest = arguments(2, route=True, bias=True)
    sides[1].requires_grad_()
    routed_linear(x, main, sides, *rest)[0].sum().backward()
    assert sides[1].grad is not None and sides[0].grad is None and main.grad is None
    x.requires_grad_()
    sides[1].grad = None
    gaps = activation_gap(x, main, sides, None, "silu", "mean", None)
    gaps[:, 0].sum().backward()
    assert x.grad is not None and not sides[1].grad.any() and sides[0].grad is None


def test_gradients_of_16_bits_have_the_dtype_of_their_tensor():
    given = arguments(2, bias=True, gate="silu", dtype=torch.bfloat16, grad=True)
    tensors = tensors_of(given)
    output = routed_linear(*given)[0]
    for gradient in torch.autograd.grad(output.float().square().sum(), tensors):
        assert gradient.dtype == torch.bfloat16
    given = gap_arguments(2, bias=True, dtype=torch.bfloat16, grad=True)
    for gradient in torch.autograd.grad(activation_gap(*given).sum(), tensors_of(given)):
        assert gradient.dtype == torch.bfloat16
