"""Backends that ``"auto"`` takes only where ``make tune`` measured them to be the fastest."""

from __future__ import annotations

import torch


def not_measured_faster(
    op: str, backend: str, size_class: str, default: str, device: torch.device
) -> str | None:
    """Return None where ``backend`` was measured to be the fastest on this GPU, else why not.

    ``size_class`` is the op's name for a class of sizes, ``default`` the backend that stays without
    a measurement. Raises ``ValueError`` for a file that cannot be read or names another backend.
    """
    from pyeditfast_kernels import tuned_files

    gpu = tuned_files.gpu_name(device.index)
    file = tuned_files.read_tuned_file(gpu)
    fastest = file.backends.get((op, size_class))
    if fastest == backend:
        return None
    if fastest is None:
        return f"`make tune` has not measured {size_class} on {gpu}"
    if fastest == default:
        return f"{default} was measured to be as fast or faster for {size_class} on {gpu}"
    raise tuned_files.malformed(
        file.path,
        f"it names the backend {fastest!r} for {op}, {size_class!r}; "
        f"there are {default!r}, {backend!r}",
    )
