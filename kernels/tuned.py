"""Configurations that were measured to be the fastest on a GPU, from ``tuned_files.py``.

``make tune`` times what ``tunable()`` in each kernel's file offers and writes one file a GPU. A
launcher asks ``tuned_config`` before it takes its own default. A file only names candidates, so
nothing runs that was not compiled ahead of time. Another configuration may add in another order:
the same inputs give the same bits on every GPU of one name, not on two GPUs with different files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeditfast_kernels import tuned_files
from pyeditfast_kernels.launch import Config


def describe_dtype(dtype: torch.dtype) -> str:
    """Return a dtype's name as classes of shapes are named by it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Tunable:
    """A choice between configurations of one launcher, for one class of shapes.

    ``candidates``: the first is the launcher's default. ``inputs(device, tiny)`` makes new random
    tensors of a typical size, or of a tiny one with the same layout; ``call(inputs, config)``
    launches; ``exact(inputs)`` is the same in float64. ``writes`` is the index of the input that
    the kernel changes in place, which has to be restored before every call.
    """

    op: str
    shape_class: str
    candidates: tuple[Config, ...]
    inputs: Callable[[torch.device, bool], tuple[Tensor, ...]]
    call: Callable[[tuple[Tensor, ...], Config], Tensor]
    exact: Callable[[tuple[Tensor, ...]], Tensor]
    writes: int | None = None


def tuned_config(
    op: str,
    shape_class: str,
    candidates: Mapping[str, Sequence[Config]],
    device: torch.device | None,
) -> Config | None:
    """Return the candidate that ``make tune`` found to be the fastest on ``device``.

    ``candidates``: those of every class of shapes. None where nothing was tuned: on CPUs, on GPUs
    without a file, for classes without candidates or that the file does not name. Raises
    ``ValueError`` for a file that cannot be read or names no candidate.
    """
    if device is None or device.type != "cuda" or shape_class not in candidates:
        return None
    found = tuned_files.read_tuned_file(tuned_files.gpu_name(device.index))
    name = found.configurations.get((op, shape_class))
    if name is None:
        return None
    for config in candidates[shape_class]:
        if config.name == name:
            return config
    names = ", ".join(repr(config.name) for config in candidates[shape_class])
    raise tuned_files.malformed(
        found.path,
        f"it names the configuration {name!r} for {op}, {shape_class!r}; there are {names}",
    )
