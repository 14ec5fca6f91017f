"""The loss that keeps edited queries far from the main memory and unrelated ones near it (WISE,
arXiv 2405.14768, equation 5).
"""

from __future__ import annotations

from torch import Tensor


def margin_loss(in_gaps: Tensor, out_gap: Tensor, margins: tuple[float, float, float]) -> Tensor:
    """Return the loss of one edit, 0-d.

    ``in_gaps`` ``[sequences]`` are the gaps of the edit's prompts, ``out_gap`` (0-d) that of its
    locality prompt, ``margins`` are ``(α, β, γ)``. The loss is the sum of the means over the
    positive terms of ``relu(out − in + γ)``, ``relu(out − α)`` and ``relu(β − in)``.
    """
    alpha, beta, gamma = margins
    return (
        mean_of_positive(out_gap - in_gaps + gamma)
        + mean_of_positive((out_gap - alpha).reshape(1))
        + mean_of_positive(beta - in_gaps)
    )


def mean_of_positive(terms: Tensor) -> Tensor:
    """Return the mean of the terms above 0, 0 where there is none."""
    return terms.relu().sum() / (terms > 0).sum().clamp(min=1)
