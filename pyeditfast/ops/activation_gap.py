"""Activation gap of queries for all side memories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, refusing, triton_candidate
from pyeditfast.ops import decode_on_cuda
from pyeditfast.ops.compiled import (
    as_matrix,
    compiled,
    compiled_for,
    cpp_candidate,
    cuda_candidate,
)
from pyeditfast.ops.memories import DECODE_ROWS, check_queries, taking
from pyeditfast.reference.activation_gap import query_gap, token_gaps

CANDIDATES = (
    cuda_candidate("activation_gap"),
    triton_candidate("activation_gap"),
    cpp_candidate("activation_gap"),
    Candidate("torch", always),
    Candidate("reference", always),
)


def activation_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    reduction: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Return the gaps of all queries for all side memories, ``[batch, memories]`` float32.

    ``x`` ``[batch, tokens, d_in]``; ``main`` and each of ``sides`` ``[d_out, d_in]`` of the same
    dtype and any strides; ``bias`` ``[d_out]``. The gap of a token is
    ``‖ act(W' x_t + b) − act(W x_t + b) ‖₂``, with ``activation`` None, ``"silu"``, ``"gelu"``,
    ``"gelu_tanh"`` or ``"relu"``; that of a query the ``"mean"`` or the ``"max"`` over the tokens
    where ``mask`` ``[batch, tokens]`` is True (``"auto"``: the mean of up to 100, else the
    maximum), and 0 without any. Float64 inputs give float64. Raises ``TypeError`` or ``ValueError``
    for arguments that do not fit.

    Floor: ``2 (1 + memories) · batch · tokens · d_in · d_out`` FLOPs; inputs and memories read
    once. WISE (arXiv 2405.14768), section 2.3.1.
    """
    check_queries(x, main, sides, bias, activation, reduction, mask)
    candidates = taking(_candidates(x, main, *sides), main, sides)
    candidates = decode_on_cuda.decoding(candidates, x, main, sides, bias)
    chosen = choose("activation_gap", candidates, x.device)
    if chosen == "cuda":
        return decode_on_cuda.decode_gap(x, main, sides, bias, activation, mask)
    if chosen == "triton":
        if mask is None and x.shape[1] == 1 and x.shape[0] <= DECODE_ROWS:
            from pyeditfast_kernels.routed_decode import decode_gap

            return decode_gap(x, main, sides, bias, activation)
        from pyeditfast_kernels.activation_gap import activation_gap as launch

        return launch(x, main, sides, bias, activation, reduction, mask)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if chosen == "reference":
        memories = [side.to(work) for side in sides]
        offset = None if bias is None else bias.to(work)
        return reference.activation_gap(
            x.to(work),
            main.to(work),
            memories,
            bias=offset,
            activation=activation,
            reduction=reduction,
            mask=mask,
        )
    main_output = linear(x, main, bias)
    return gaps_of_outputs(
        main_output, (linear(x, side, bias) for side in sides), activation, reduction, mask
    )


def gaps_of_outputs(
    main_output: Tensor,
    side_outputs: Iterable[Tensor],
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
) -> Tensor:
    """Return the gaps ``[batch, memories]`` for outputs ``[batch, tokens, d_out]``.

    The matrix products are behind this; the rest is C++ where that was built.
    """
    work = torch.float64 if main_output.dtype == torch.float64 else torch.float32
    gaps = []
    for output in side_outputs:
        candidates = _candidates(main_output, output)
        if choose("activation_gap", candidates, output.device) == "cpp":
            each = _compiled_token_gaps(main_output, output, activation)
        else:
            each = token_gaps(main_output.to(work), output.to(work), activation)
        gaps.append(query_gap(each, reduction, mask))
    if not gaps:
        return main_output.new_zeros(main_output.shape[0], 0, dtype=work)
    return torch.stack(gaps, -1)


def _candidates(*tensors: Tensor) -> Sequence[Candidate]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return refusing(CANDIDATES, "cpp", "the C++ form has no backward pass")
    return compiled_for(CANDIDATES, *(tensor.dtype for tensor in tensors))


def _compiled_token_gaps(
    main_output: Tensor, side_output: Tensor, activation: str | None
) -> Tensor:
    gaps = torch.empty(main_output.shape[:-1], dtype=torch.float32)
    main_rows, side_rows = main_output.flatten(0, -2), side_output.flatten(0, -2)
    compiled().activation_gap(
        main=as_matrix(main_rows),
        side=as_matrix(side_rows),
        tokens=main_rows.shape[0],
        d_out=main_rows.shape[1],
        activation=compiled().ACTIVATIONS[activation or "none"],
        gaps=gaps.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return gaps
