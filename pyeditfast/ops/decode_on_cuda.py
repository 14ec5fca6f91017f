"""Decoding with side memories by the CUDA kernels in ``csrc``: one token a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeditfast.backends import Candidate, refusing
from pyeditfast.ops.compiled import as_matrix, compiled, compiled_for, stream_of
from pyeditfast.ops.memories import DECODE_ROWS, MOST_IN_A_KERNEL
from pyeditfast.reference.routed_linear import Routed


def decoding(
    candidates: Sequence[Candidate],
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    *others: Tensor | None,
    thresholds: Tensor | None = None,
) -> Sequence[Candidate]:
    """Return the candidates for these arguments: CUDA states what it does not take.

    ``others`` are the further ones that may require a gradient; ``thresholds`` those that decide.
    """
    given = [tensor for tensor in (x, main, *sides, *others) if tensor is not None]
    batch, tokens = x.shape[:2]
    reason = None
    if not sides:
        reason = "there is no side memory"
    elif len(sides) > MOST_IN_A_KERNEL:
        reason = f"its kernels take up to {MOST_IN_A_KERNEL} side memories, not {len(sides)}"
    elif tokens != 1 or batch > DECODE_ROWS:
        reason = f"it takes up to {DECODE_ROWS} queries of one token, not {batch} of {tokens}"
    elif thresholds is not None and thresholds.dtype == torch.float64:
        reason = "it takes float32 thresholds, not torch.float64"
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        reason = "it has no backward pass"
    if reason is not None:
        return refusing(candidates, "cuda", reason)
    return compiled_for(candidates, main.dtype)


def decode_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
    splits: int = 0,
) -> Tensor:
    """Return the gaps ``[batch, memories]``, float32, of ``x`` ``[batch, 1, d_in]``.

    ``d_in`` is cut into as many parts as suit, or ``splits``.
    """
    module = compiled()
    decode = _decode(x, main, sides, bias, None, None, splits)
    gaps = torch.empty(x.shape[0], len(sides), dtype=torch.float32, device=x.device)
    workspace = _workspace(module.cuda_activation_gap_workspace(decode), x)
    module.cuda_activation_gap(
        decode,
        activation=module.ACTIVATIONS[activation or "none"],
        mask=_vector(mask),
        gaps=gaps.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=stream_of(x.device),
    )
    return gaps


def routed_decode(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
    route: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    splits: int = 0,
) -> Routed:
    """Return every row of ``x`` ``[batch, 1, d_in]`` times its memory: that of ``route``, or the
    one that its gap chooses. ``splits``: see ``decode_gap``.
    """
    module = compiled()
    decode = _decode(x, main, sides, bias, gate, gate_activation, splits)
    output = torch.empty(x.shape[0], 1, main.shape[0], dtype=x.dtype, device=x.device)
    workspace = _workspace(module.cuda_routed_linear_workspace(decode, route is not None), x)
    places = {
        "output": output.data_ptr(),
        "workspace": workspace.data_ptr(),
        "stream": stream_of(x.device),
    }
    if route is not None:
        module.cuda_routed_linear_with_route(decode, route=_vector(route), **places)
        return Routed(output, route, None)
    gaps = torch.empty(x.shape[0], len(sides), dtype=torch.float32, device=x.device)
    route = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    thresholds = thresholds.float()
    module.cuda_routed_linear(
        decode,
        activation=module.ACTIVATIONS[activation or "none"],
        mask=_vector(mask),
        thresholds=_vector(thresholds),
        gaps=gaps.data_ptr(),
        route=route.data_ptr(),
        **places,
    )
    return Routed(output, route, gaps)


def _decode(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    splits: int,
) -> Any:
    module = compiled()
    return module.Decode(
        x=as_matrix(x[:, 0]),
        gate=None if gate is None else as_matrix(gate[:, 0]),
        gate_activation=module.ACTIVATIONS[gate_activation or "none"],
        main=as_matrix(main),
        sides=[as_matrix(side) for side in sides],
        bias=None if bias is None else as_matrix(bias[None]),
        batch=x.shape[0],
        d_out=main.shape[0],
        d_in=main.shape[1],
        splits=splits,
    )


def _vector(tensor: Tensor | None) -> tuple[int, int]:
    """Return address and stride of ``[count]`` or ``[count, 1]``; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(max(1, size // 4), dtype=torch.float32, device=like.device)
