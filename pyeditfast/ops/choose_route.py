"""The memory that answers each query."""

from __future__ import annotations

from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops.checks import check_same_device
from pyeditfast.ops.memories import check_numbers


def choose_route(gaps: Tensor, thresholds: Tensor) -> Tensor:
    """Return for each query the side memory with the largest gap among those above their
    threshold, −1 (the main memory) if none is.

    ``gaps`` ``[batch, memories]``, ``thresholds`` ``[memories]``, floating point; the route
    ``[batch]`` is int64. Of equal gaps the first counts; NaN is above no threshold. Nothing is
    sent to the host. Raises ``TypeError`` for what is not a floating-point tensor, ``ValueError``
    for shapes or devices that do not fit.

    WISE (arXiv 2405.14768), WISE-Retrieve.
    """
    check_numbers("gaps", gaps)
    check_numbers("thresholds", thresholds)
    if gaps.ndim != 2 or thresholds.shape != gaps.shape[1:]:
        raise ValueError(
            f"gaps {tuple(gaps.shape)} and thresholds {tuple(thresholds.shape)}; "
            "[batch, memories] and [memories] are needed"
        )
    check_same_device("gaps", gaps.device, "thresholds", thresholds.device)
    return reference.choose_route(gaps, thresholds)
