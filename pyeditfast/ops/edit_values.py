"""UltraEdit's values from normalized keys and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.ops.checks import check_same_rows
from pyeditfast.ops.compiled import as_matrix, compiled, compiled_for, cpp_candidate
from pyeditfast.ops.running_moments import RunningMoments

CANDIDATES = (
    triton_candidate("edit_values"),
    cpp_candidate("edit_values"),
    Candidate("torch", always),
    Candidate("reference", always),
)


def edit_values(keys: Tensor, grads: Tensor, moments: RunningMoments, lr: float) -> Tensor:
    """Return ``v = −lr · ‖k̂‖² · ĝ``, hats for normalized.

    ``keys`` ``[..., n, d_in]`` and ``grads`` ``[..., n, d_out]``, any floating dtype; ``moments``
    are those of ``[k ∥ g]``, ``d_in + d_out`` features, this turn included; ``lr`` is dimensionless
    (the paper: 1e-6). The result is ``[..., n, d_out]``, float32. Raises ``ValueError`` for shapes
    that do not match.

    Floor: ``n (d_in + d_out)`` elements read, ``n d_out`` written, about 4 FLOPs each. Source:
    UltraEdit, arXiv 2505.14679.
    """
    check_same_rows("keys", keys, "grads", grads)
    d_in, d_out = keys.shape[-1], grads.shape[-1]
    if d_in + d_out != moments.size:
        raise ValueError(
            f"keys {tuple(keys.shape)} and grads {tuple(grads.shape)} "
            f"have {d_in} + {d_out} features; the moments have {moments.size}"
        )
    candidates = fitting(CANDIDATES, keys.dtype, grads.dtype)
    candidates = compiled_for(candidates, keys.dtype, grads.dtype)
    chosen = choose("edit_values", candidates, keys.device)
    if chosen == "reference":
        rows = moments.normalize(torch.cat([keys.double(), grads.double()], -1))
        keys_hat, grads_hat = rows.split([d_in, d_out], -1)
        return (-lr * keys_hat.square().sum(-1, keepdim=True) * grads_hat).float()
    mean, scale = moments.mean_and_scale(keys.device)
    if chosen == "triton":
        from pyeditfast_kernels.edit_values import edit_values as launch_edit_values

        values = torch.empty(grads.shape, dtype=torch.float32, device=grads.device)
        flat_keys, flat_grads, out = (part.flatten(0, -2) for part in (keys, grads, values))
        launch_edit_values(flat_keys, flat_grads, mean, scale, lr, out)
        return values
    if chosen == "cpp":
        values = torch.empty(grads.shape, dtype=torch.float32)
        flat_keys, flat_grads, out = (part.flatten(0, -2) for part in (keys, grads, values))
        compiled().edit_values(
            values=as_matrix(out),
            keys=as_matrix(flat_keys),
            grads=as_matrix(flat_grads),
            mean=mean.data_ptr(),
            scale=scale.data_ptr(),
            rows=flat_keys.shape[0],
            d_in=d_in,
            d_out=d_out,
            lr=lr,
            threads=torch.get_num_threads(),
        )
        return values
    keys_hat = _centred(keys, mean[:d_in]).mul_(scale[:d_in])
    grads_hat = _centred(grads, mean[d_in:]).mul_(scale[d_in:])
    # Not a vecdot, which autocast would take in bfloat16.
    weight = keys_hat.square_().sum(-1).mul_(-lr)
    return grads_hat.mul_(weight.unsqueeze(-1))


def _centred(rows: Tensor, mean: Tensor) -> Tensor:
    """Return ``rows − mean`` in float32, memory of its own, with no temporary beside it."""
    return rows - mean if rows.dtype == torch.float32 else rows.float().sub_(mean)
