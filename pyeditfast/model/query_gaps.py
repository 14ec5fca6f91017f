"""Gaps of prompts, without a forward pass behind the edited module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.model.prefix import module_inputs
from pyeditfast.model.query_batch import Query, query_batch
from pyeditfast.model.runner import ModelRunner
from pyeditfast.ops import activation_gap

QUERIES_A_PASS = 32


def prompt_gaps(
    runner: ModelRunner,
    module_name: str,
    queries: Sequence[Query],
    main: Tensor,
    sides: Sequence[Tensor],
    *,
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    pad_token: int,
) -> Tensor:
    """Return the gaps ``[queries, memories]`` float32 of ``queries`` at the module ``module_name``,
    for ``sides`` beside ``main``, ``[d_out, d_in]`` each.
    """
    gaps = [torch.zeros(0, len(sides), device=main.device)]
    for start in range(0, len(queries), QUERIES_A_PASS):
        current = queries[start : start + QUERIES_A_PASS]
        layout = "packed" if runner.packs(max(map(len, current))) else "right"
        batch = query_batch(current, layout, pad_token=pad_token).to(runner.device)
        entered = module_inputs(runner, module_name, batch.batch).to(main.device)
        with torch.no_grad():
            gaps.append(
                activation_gap(
                    entered[batch.rows.to(main.device)],
                    main,
                    sides,
                    bias=bias,
                    activation=activation,
                    reduction=reduction,
                    mask=batch.mask.to(main.device),
                )
            )
    return torch.cat(gaps)
