"""UltraEdit's values (arXiv 2505.14679): ``v = −lr · ‖k̂‖² · ĝ``, hats for normalized."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast.reference.running_moments import RunningMoments


def edit_values(keys: Tensor, grads: Tensor, moments: RunningMoments, lr: float) -> Tensor:
    """Return values ``[..., n, d_out]`` from keys ``[..., n, d_in]`` and gradients ``[..., n,
    d_out]``.

    ``moments`` are those of ``[k ∥ g]``, ``d_in + d_out`` features.
    """
    rows = moments.normalize(torch.cat([keys, grads], -1))
    keys_hat, grads_hat = rows.split([keys.shape[-1], grads.shape[-1]], -1)
    return -lr * keys_hat.square().sum(-1, keepdim=True) * grads_hat
