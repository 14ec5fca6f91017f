"""The cross-entropy of an output head: ``loss = log Σ_v exp(l_v) − l_target``, ``l = W x + b``."""

from __future__ import annotations

from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the losses ``[n]`` of ``hidden`` ``[n, d]`` under a head ``[vocabulary, d]``.

    ``targets`` ``[n]`` are the tokens that should follow, ``bias`` is ``[vocabulary]``.
    """
    logits = hidden @ weight.mT
    if bias is not None:
        logits = logits + bias
    of_target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(-1) - of_target
