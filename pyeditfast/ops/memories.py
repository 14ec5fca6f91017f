"""Checks that the ops on main and side memories share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.backends import Candidate, fitting, refusing
from pyeditfast.ops.checks import check_rows, check_same_device
from pyeditfast.reference.activation_gap import ACTIVATIONS, REDUCTIONS

MOST_IN_A_KERNEL = 8
"""Side memories that one kernel takes."""

DECODE_ROWS = 16
"""Up to so many queries of one token each, the kernels for decoding are taken."""


def check_memories(main: Tensor, sides: Sequence[Tensor]) -> None:
    """Require matrices ``[d_out, d_in]`` of one shape, dtype and device."""
    check_rows("main", main)
    if main.ndim != 2:
        raise ValueError(f"main has shape {tuple(main.shape)}; [d_out, d_in] is needed")
    for number, side in enumerate(sides):
        check_like(f"sides[{number}]", side, "main", main)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Require a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a torch.Tensor")


def check_numbers(name: str, tensor: Tensor) -> None:
    """Require a floating-point tensor."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; a floating-point dtype is needed")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Require the shape, dtype and device of another tensor."""
    check_tensor(name, tensor)
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; "
            f"{like_name} is {like.dtype} {tuple(like.shape)}"
        )
    check_same_device(name, tensor.device, like_name, like.device)


def check_queries(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
) -> None:
    """Require inputs ``[batch, tokens, d_in]`` that fit the memories, and known names."""
    check_memories(main, sides)
    check_rows("x", x)
    if x.ndim != 3 or x.shape[-1] != main.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; [batch, tokens, {main.shape[1]}] is needed"
        )
    if x.dtype != main.dtype:
        raise ValueError(f"x is {x.dtype} and main {main.dtype}")
    check_same_device("x", x.device, "main", main.device)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != main.shape[:1] or bias.dtype != main.dtype:
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)}; "
                f"{main.dtype} ({main.shape[0]},) is needed"
            )
        check_same_device("bias", bias.device, "main", main.device)
    check_activation("activation", activation)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; "
                f"torch.bool {tuple(x.shape[:2])} is needed"
            )
        check_same_device("mask", mask.device, "x", x.device)


def check_activation(name: str, activation: str | None) -> None:
    """Require an activation that the kernels know."""
    if activation not in ACTIVATIONS:
        known = ", ".join(repr(known) for known in ACTIVATIONS)
        raise ValueError(f"{name} is {activation!r}; choose one of {known}")


def taking(
    candidates: Sequence[Candidate], main: Tensor, sides: Sequence[Tensor]
) -> Sequence[Candidate]:
    """Return the candidates for these memories: Triton states what it does not take."""
    if len(sides) > MOST_IN_A_KERNEL:
        reason = f"its kernels take up to {MOST_IN_A_KERNEL} side memories, not {len(sides)}"
        return refusing(candidates, "triton", reason)
    if not sides:
        return refusing(candidates, "triton", "there is no side memory")
    return fitting(candidates, main.dtype)
