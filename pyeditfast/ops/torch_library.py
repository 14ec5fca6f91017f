"""``routed_linear`` and ``activation_gap`` as operators of ``torch.library``, for use in a model.

Why: under ``torch.compile(fullgraph=True)`` the choice of backend must be opaque, or the compiler
would trace through it and break the graph at the kernels.

Importing this module registers ``torch.ops.pyeditfast.routed_linear`` and ``.activation_gap``, once
a process; ``WiseLinear`` imports it, ``pyeditfast.ops`` does not. The arguments are those of the
functions of the same names, all by position; an activation of None is written ``"none"``.

The decision has no gradient: ``routed_linear`` is differentiated through the memory that answers,
with respect to ``x``, ``main``, ``sides``, ``bias`` and ``gate``, and its gaps are constants.
``activation_gap`` is differentiated with respect to ``x``, ``main``, ``sides`` and ``bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyeditfast import ops
from pyeditfast.reference.activation_gap import ACTIVATIONS, MEAN_UP_TO

aten = torch.ops.aten

Gradients = tuple[Any, ...]


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    # aten's own has no derivative.
    slope = torch.sigmoid(x)
    return grad * slope * (1.0 + x * (1.0 - slope))


ACTIVATION_GRADIENTS: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {
    None: lambda grad, x: grad,
    "silu": _silu_gradient,
    "gelu": lambda grad, x: aten.gelu_backward(grad, x, approximate="none"),
    "gelu_tanh": lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: grad.where(x > 0, 0.0),
}
"""The gradient of ``act(x)`` from that of its result."""


def _named(activation: str) -> str | None:
    return None if activation == "none" else activation


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# routed_linear


@torch.library.custom_op(
    "pyeditfast::routed_linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor main, Tensor[] sides, Tensor thresholds, Tensor? bias, str activation, "
        "str reduction, Tensor? mask, Tensor? route, Tensor? gate, str gate_activation) "
        "-> (Tensor output, Tensor route, Tensor gaps)"
    ),
)
def routed_linear(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str,
    reduction: str,
    mask: Tensor | None,
    route: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output ``[batch, tokens, d_out]``, route ``[batch]`` and gaps ``[batch, memories]``.

    Where ``route`` is given, the one returned is a copy and gaps are ``[batch, 0]``.
    """
    routed = ops.routed_linear(
        x,
        main,
        sides,
        thresholds,
        bias=bias,
        activation=_named(activation),
        reduction=reduction,
        mask=mask,
        route=route,
        gate=gate,
        gate_activation=gate_activation,
    )
    gaps = routed.gaps
    if gaps is None:
        gaps = x.new_empty((x.shape[0], 0))
    chosen = routed.route if route is None else route.clone()
    return routed.output.contiguous(), chosen, gaps.to(_work_dtype(x))


@routed_linear.register_fake
def _(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str,
    reduction: str,
    mask: Tensor | None,
    route: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = x.shape[:2]
    memories = len(sides) if route is None else 0
    return (
        x.new_empty((batch, tokens, main.shape[0])),
        x.new_empty((batch,), dtype=torch.int64),
        x.new_empty((batch, memories), dtype=_work_dtype(x)),
    )


def _save_routed_linear(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, main, sides, thresholds, *_, gate, gate_activation = inputs
    _, route, gaps = output
    ctx.mark_non_differentiable(route, gaps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, thresholds, route, gate, main, *sides)
    ctx.gate_activation = gate_activation


def _differentiate_routed_linear(ctx: Any, grad: Tensor | None, *constants: None) -> Gradients:
    x, thresholds, route, gate, main, *sides = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grad_x = grad_main = grad_bias = grad_gate = None
    grad_sides: list[Tensor | None] = [None] * len(sides)
    if grad is not None:
        inputs = x if gate is None else ACTIVATIONS[ctx.gate_activation](gate) * x
        if needed[0] or needed[9]:
            transposed = [side.mT for side in sides]
            grad_inputs = routed_linear(
                *(grad, main.mT, transposed, thresholds, None, "none", "mean", None, route),
                *(None, "silu"),
            )[0]
            if gate is None:
                grad_x = grad_inputs
            else:
                grad_x = grad_inputs * ACTIVATIONS[ctx.gate_activation](gate)
                grad_gate = _grad_of_gate(grad_inputs, x, gate, ctx.gate_activation)
        if needed[1]:
            grad_main = _grad_of_rows(grad, inputs, (route < 0) | (route >= len(sides)))
        for number, is_needed in enumerate(needed[2]):
            if is_needed:
                grad_sides[number] = _grad_of_rows(grad, inputs, route == number)
        if needed[4]:
            grad_bias = grad.sum((0, 1))
    nothing = (None,) * 4
    return grad_x, grad_main, grad_sides, None, grad_bias, *nothing, grad_gate, None


def _grad_of_gate(grad: Tensor, x: Tensor, gate: Tensor, activation: str) -> Tensor:
    work = _work_dtype(x)
    of_activated = grad.to(work) * x.to(work)
    return ACTIVATION_GRADIENTS[activation](of_activated, gate.to(work)).to(gate.dtype)


def _grad_of_rows(grad: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of a memory that answers the queries where ``rows`` is True."""
    rows = rows[:, None, None]
    # Both, since NaN times zero would be NaN.
    return _grad_of_weight(grad.where(rows, 0.0), inputs.where(rows, 0.0))


def _grad_of_weight(grad: Tensor, inputs: Tensor) -> Tensor:
    return grad.flatten(0, 1).mT @ inputs.flatten(0, 1)


routed_linear.register_autograd(_differentiate_routed_linear, setup_context=_save_routed_linear)


# activation_gap


@torch.library.custom_op(
    "pyeditfast::activation_gap",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor main, Tensor[] sides, Tensor? bias, str activation, str reduction, "
        "Tensor? mask) -> Tensor"
    ),
)
def activation_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str,
    reduction: str,
    mask: Tensor | None,
) -> Tensor:
    """Return the gaps of all queries for all side memories, ``[batch, memories]``."""
    gaps = ops.activation_gap(
        x,
        main,
        sides,
        bias=bias,
        activation=_named(activation),
        reduction=reduction,
        mask=mask,
    )
    return gaps.contiguous()


@activation_gap.register_fake
def _(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str,
    reduction: str,
    mask: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], len(sides)), dtype=_work_dtype(x))


def _save_activation_gap(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, main, sides, bias, activation, reduction, mask = inputs
    ctx.save_for_backward(x, mask, bias, main, *sides)
    ctx.activation, ctx.reduction = _named(activation), reduction


def _differentiate_activation_gap(ctx: Any, grad: Tensor) -> Gradients:
    x, mask, bias, main, *sides = ctx.saved_tensors
    needed = ctx.needs_input_grad
    act, act_gradient = ACTIVATIONS[ctx.activation], ACTIVATION_GRADIENTS[ctx.activation]
    if mask is None:
        mask = x.new_ones(x.shape[:2], dtype=torch.bool)
    # A token that does not count may hold NaN.
    x = x.where(mask[..., None], 0.0)

    def output_of(memory: Tensor) -> Tensor:
        return functional.linear(x, memory, bias).to(grad.dtype)

    main_output = output_of(main)
    grad_main_output = torch.zeros_like(main_output)
    side_grads = []
    for number, side in enumerate(sides):
        side_output = output_of(side)
        difference = act(side_output) - act(main_output)
        gaps = difference.norm(dim=-1)
        # Not differentiable where the memories agree; zero, as torch has it for a norm.
        factor = grad[:, number, None] * _grad_of_reduction(gaps, ctx.reduction, mask)
        factor = (factor / gaps).where(gaps > 0, 0.0)
        difference = difference * factor[..., None]
        side_grads.append(act_gradient(difference, side_output).to(x.dtype))
        grad_main_output = grad_main_output - act_gradient(difference, main_output)
    grads = [grad_main_output.to(x.dtype), *side_grads]

    grad_x = grad_bias = None
    if needed[0]:
        grad_x = sum(part @ memory for part, memory in zip(grads, (main, *sides), strict=True))
    grad_main = _grad_of_weight(grads[0], x) if needed[1] else None
    grad_sides = [
        _grad_of_weight(part, x) if is_needed else None
        for part, is_needed in zip(side_grads, needed[2], strict=True)
    ]
    if needed[3]:
        grad_bias = sum(part.sum((0, 1)) for part in grads)
    return grad_x, grad_main, grad_sides, grad_bias, None, None, None


def _grad_of_reduction(gaps: Tensor, reduction: str, mask: Tensor) -> Tensor:
    """Return the gradient of a query's gap with respect to those of its tokens, of shape
    ``[batch, tokens]``, zero where a token does not count; equal maxima share it.
    """
    count = mask.sum(-1, keepdim=True)
    of_mean = mask / count.clamp(min=1).to(gaps.dtype)
    if reduction == "mean" or gaps.shape[-1] == 0:
        return of_mean
    kept = gaps.where(mask, 0.0)
    largest = (kept == kept.amax(-1, keepdim=True)) & mask
    of_max = largest / largest.sum(-1, keepdim=True).clamp(min=1).to(gaps.dtype)
    return of_max if reduction == "max" else of_max.where(count > MEAN_UP_TO, of_mean)


activation_gap.register_autograd(_differentiate_activation_gap, setup_context=_save_activation_gap)
