"""Argument checks that the ops share; each message shows the value that was wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(name: str, tensor: Tensor) -> None:
    """Require a floating-point tensor ``[..., n, d]``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a torch.Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; a floating-point dtype is needed")
    if tensor.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; [..., n, d] is needed")


def check_square(name: str, tensor: Tensor) -> None:
    """Require a floating-point tensor ``[..., n, n]``."""
    check_rows(name, tensor)
    if tensor.shape[-1] != tensor.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; [..., n, n] is needed")


def check_same_rows(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Require ``[..., n, a]`` and ``[..., n, b]`` with equal leading dimensions, on one device."""
    check_rows(first_name, first)
    check_rows(second_name, second)
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(
            f"{first_name} {tuple(first.shape)} and {second_name} {tuple(second.shape)} "
            "differ before their last dimension"
        )
    check_same_device(first_name, first.device, second_name, second.device)


def check_same_device(
    first_name: str, first: torch.device, second_name: str, second: torch.device
) -> None:
    """Require one device."""
    if first != second:
        raise ValueError(f"{first_name} is on {first} and {second_name} on {second}")


def check_ridge(ridge: float) -> None:
    """Require a finite ridge of zero or more."""
    if not 0.0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}; a finite number of 0 or more is needed")
