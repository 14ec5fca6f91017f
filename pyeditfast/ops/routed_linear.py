"""A linear module with side memories, routed query by query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, triton_candidate
from pyeditfast.ops.activation_gap import gaps_of_outputs
from pyeditfast.ops.checks import check_same_device
from pyeditfast.ops.choose_route import choose_route
from pyeditfast.ops.compiled import cuda_candidate
from pyeditfast.ops.decode_on_cuda import decoding, routed_decode
from pyeditfast.ops.memories import (
    DECODE_ROWS,
    check_activation,
    check_like,
    check_numbers,
    check_queries,
    check_tensor,
    taking,
)
from pyeditfast.reference.activation_gap import ACTIVATIONS
from pyeditfast.reference.routed_linear import Routed

CANDIDATES = (
    cuda_candidate("routed_linear"),
    triton_candidate("routed_linear"),
    Candidate("torch", always),
    Candidate("reference", always),
)


def routed_linear(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    reduction: str = "auto",
    mask: Tensor | None = None,
    route: Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
) -> Routed:
    """Return ``Routed(output, route, gaps)``: every query's ``x W_rᵀ + b``, ``r`` its route.

    ``x`` ``[batch, tokens, d_in]``; ``main`` and each of ``sides`` ``[d_out, d_in]`` of the same
    dtype and any strides; ``thresholds`` ``[memories]`` float32; ``bias`` ``[d_out]``. The route
    ``[batch]`` (int64, −1 for the main memory) is decided by ``choose_route`` from the
    ``activation_gap`` of each query, without the host, unless ``route`` gives it: then ``gaps`` is
    None and only the memories in use are needed. A route to a memory that is not there raises on
    the CPU; elsewhere its values are not looked at, and it means the main memory. With ``gate``
    ``[batch, tokens, d_in]`` the input is ``act(gate) · x``, as in a gated feed-forward block, and
    need not be written. Raises ``TypeError`` or ``ValueError`` for arguments that do not fit.

    Floor: ``2 (1 + memories) · batch · tokens · d_in · d_out`` FLOPs, ``2 · batch · tokens ·
    d_in · d_out`` with a route. WISE (arXiv 2405.14768), section 2.3.1.
    """
    check_queries(x, main, sides, bias, activation, reduction, mask)
    _check_routing(x, sides, thresholds, route, gate, gate_activation)
    candidates = taking(CANDIDATES, main, sides)
    limits = thresholds if route is None else None
    candidates = decoding(candidates, x, main, sides, bias, gate, thresholds=limits)
    chosen = choose("routed_linear", candidates, x.device)
    if chosen == "cuda":
        return routed_decode(
            x,
            main,
            sides,
            thresholds,
            bias,
            activation,
            mask,
            route,
            gate,
            gate_activation,
        )
    if chosen == "triton":
        return _launch(
            x,
            main,
            sides,
            thresholds,
            bias,
            activation,
            reduction,
            mask,
            route,
            gate,
            gate_activation,
        )
    if chosen == "reference":
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = reference.routed_linear(
            x.to(work),
            main.to(work),
            [side.to(work) for side in sides],
            thresholds,
            bias=None if bias is None else bias.to(work),
            activation=activation,
            reduction=reduction,
            mask=mask,
            route=route,
            gate=None if gate is None else gate.to(work),
            gate_activation=gate_activation,
        )
        return wide._replace(output=wide.output.to(x.dtype))
    if gate is not None:
        x = ACTIVATIONS[gate_activation](gate) * x
    if route is not None:
        return Routed(_with_route(x, main, sides, bias, route), route, None)
    outputs = [linear(x, memory, bias) for memory in (main, *sides)]
    gaps = gaps_of_outputs(outputs[0], outputs[1:], activation, reduction, mask)
    route = choose_route(gaps, thresholds)
    return Routed(_select(iter(outputs), route), route, gaps)


def _check_routing(
    x: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    route: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
) -> None:
    check_numbers("thresholds", thresholds)
    if thresholds.shape != (len(sides),):
        raise ValueError(
            f"thresholds has shape {tuple(thresholds.shape)}; there are {len(sides)} side memories"
        )
    check_same_device("thresholds", thresholds.device, "x", x.device)
    if route is not None:
        check_tensor("route", route)
        if route.dtype != torch.int64 or route.shape != x.shape[:1]:
            raise ValueError(
                f"route is {route.dtype} {tuple(route.shape)}; "
                f"torch.int64 ({x.shape[0]},) is needed"
            )
        check_same_device("route", route.device, "x", x.device)
        # Elsewhere the host would have to wait for the values.
        if route.device.type == "cpu" and route.numel():
            for number in (int(route.min()), int(route.max())):
                if not reference.MAIN <= number < len(sides):
                    raise ValueError(
                        f"route holds {number}; there are {len(sides)} side memories, "
                        f"and {reference.MAIN} is the main memory"
                    )
    if gate is not None:
        check_like("gate", gate, "x", x)
        check_activation("gate_activation", gate_activation)


def _with_route(
    x: Tensor, main: Tensor, sides: Sequence[Tensor], bias: Tensor | None, route: Tensor
) -> Tensor:
    if x.device.type != "cpu":
        # Which memories are in use is known on the device alone.
        return _select((linear(x, memory, bias) for memory in (main, *sides)), route)
    in_use = route.unique().tolist()
    if not in_use:
        return linear(x, main, bias)
    if len(in_use) == 1:
        return linear(x, main if in_use[0] < 0 else sides[in_use[0]], bias)
    places = [(route == number).nonzero().squeeze(-1) for number in in_use]
    parts = [
        linear(x.index_select(0, rows), main if number < 0 else sides[number], bias)
        for number, rows in zip(in_use, places, strict=True)
    ]
    # Under autocast a part is of another dtype than x.
    output = parts[0].new_empty(*x.shape[:-1], main.shape[0])
    for rows, part in zip(places, parts, strict=True):
        output.index_copy_(0, rows, part)
    return output


def _select(outputs: Iterator[Tensor], route: Tensor) -> Tensor:
    selected = next(outputs)
    for number, output in enumerate(outputs):
        selected = torch.where((route == number)[:, None, None], output, selected)
    return selected


def _launch(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
    route: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
) -> Routed:
    if route is None:
        from pyeditfast_kernels.routed_linear import routed_linear as launch

        return Routed(
            *launch(
                x,
                main,
                sides,
                thresholds,
                bias,
                activation,
                reduction,
                mask,
                gate,
                gate_activation,
            )
        )
    if x.shape[1] == 1 and x.shape[0] <= DECODE_ROWS:
        from pyeditfast_kernels.routed_decode import routed_decode

        output = routed_decode(x, main, sides, route, bias, gate, gate_activation)
    else:
        from pyeditfast_kernels.routed_linear import routed_linear_with_route

        output = routed_linear_with_route(x, main, sides, route, bias, gate, gate_activation)
    return Routed(output, route, None)
