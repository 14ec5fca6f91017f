"""The loss of an output head on frozen weights, and its gradient in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from pyeditfast.backends import Candidate, always, choose, refusing
from pyeditfast.ops.checks import check_rows, check_same_device
from pyeditfast.ops.compiled import as_matrix, compiled, cpp_candidate
from pyeditfast.reference.linear_cross_entropy import linear_cross_entropy as reference_losses


def _slow_here(device: torch.device) -> str | None:
    if compiled().linear_cross_entropy_is_fast():
        return None
    return "the C++ form is written for processors with AVX2 or AVX-512"


CANDIDATES = (
    Candidate("cpp", cpp_candidate("linear_cross_entropy").unavailable, _slow_here),
    Candidate("torch", always),
    Candidate("reference", always),
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return each row's ``log Σ_v exp(l_v) − l_target`` for ``l = W x + b``, ``[n]``.

    ``hidden`` ``[n, d]`` and ``weight`` ``[vocabulary, d]`` of one floating dtype; ``targets``
    ``[n]`` int64 on their device; ``bias`` ``[vocabulary]`` of their dtype or None. Logits have the
    dtype of ``hidden``, what follows is at least float32, and so are the losses. Gradients reach
    ``hidden`` alone. Raises ``ValueError`` for shapes that do not match, for a target outside the
    vocabulary (on the CPU; CUDA asserts on the device), and for a head that wants a gradient;
    ``TypeError`` for other dtypes.

    The C++ form reads the head once for losses and gradients, for float32: the gradient ``Σ_v p_v
    W_v − W_target`` is attention with the head as keys and values, so that the softmax is carried
    along as in FlashAttention (arXiv 2205.14135). Floor: ``vocabulary · d`` numbers read and ``4 n
    vocabulary d`` FLOPs; the torch form reads the head twice.
    """
    _check(hidden, weight, targets, bias)
    chosen = choose("linear_cross_entropy", _candidates(hidden, weight), hidden.device)
    if chosen == "reference":
        return reference_losses(hidden, weight, targets, bias)
    if chosen == "cpp":
        losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, bias)
        return losses
    logits = linear(hidden, weight, bias)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(exact, targets, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses whose gradient is known before it is asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
    ) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32)
        grads = torch.empty(hidden.shape, dtype=torch.float32)
        targets = targets.contiguous()
        bias = None if bias is None else bias.contiguous()
        compiled().linear_cross_entropy(
            hidden=as_matrix(hidden),
            weight=as_matrix(weight),
            bias=0 if bias is None else bias.data_ptr(),
            targets=targets.data_ptr(),
            rows=hidden.shape[0],
            width=hidden.shape[1],
            vocabulary=weight.shape[0],
            losses=losses.data_ptr(),
            grads=grads.data_ptr(),
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * grad_losses.unsqueeze(-1), None, None, None


def _candidates(hidden: Tensor, weight: Tensor) -> Sequence[Candidate]:
    if weight.dtype != torch.float32:
        return refusing(CANDIDATES, "cpp", f"the C++ form takes float32, not {weight.dtype}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        reason = f"the C++ form reads heads row by row; strides are {weight.stride()}"
        return refusing(CANDIDATES, "cpp", reason)
    return CANDIDATES


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_rows(name, tensor)
        check_same_device(name, tensor.device, "targets", targets.device)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} "
            "do not fit: [n, d] and [vocabulary, d] are needed"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}; one dtype is needed")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}; torch.int64 is needed")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, hidden {tuple(hidden.shape)}: "
            "one target a row is needed"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}; {weight.dtype} "
            f"{tuple(weight.shape[:1])} is needed"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight or bias requires a gradient; this op gives none: detach them")
    if targets.device.type == "cpu" and targets.numel() > 0:
        lowest, highest = (int(end) for end in torch.aminmax(targets))
        if lowest < 0 or highest >= weight.shape[0]:
            raise ValueError(
                f"targets are from {lowest} to {highest}; the vocabulary has {weight.shape[0]}"
            )
