"""Configurations that were measured to be the fastest on a GPU, as data: ``tuned_configs/*.json``.

``make tune`` times what ``tunable()`` in each kernel's file offers and writes one file a GPU. A
launcher asks ``tuned_config`` before it takes its own default; a file is read when a kernel is
first launched on that GPU, and once. A file only names candidates, so nothing runs that was not
compiled ahead of time. Another configuration may add in another order: the same inputs give the
same bits on every GPU of one name, not on two GPUs with different files.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyeditfast_kernels.launch import Config

FOLDER = Path(__file__).with_name("tuned_configs")


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
    gpu = _gpu_name(device.index)
    name = read_configurations(gpu).get((op, shape_class))
    if name is None:
        return None
    for config in candidates[shape_class]:
        if config.name == name:
            return config
    names = ", ".join(repr(config.name) for config in candidates[shape_class])
    raise ValueError(
        f"{path_of(gpu)} names the configuration {name!r} for {op}, {shape_class!r}; there are "
        f"{names} (run `make tune` again, or delete the file)"
    )


@functools.cache
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def path_of(gpu: str) -> Path:
    """Return where the configurations for GPUs called ``gpu`` are."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def read_configurations(gpu: str) -> dict[tuple[str, str], str]:
    """Return the names of the configurations for ``gpu`` by op and class of shapes.

    Empty where there is no file. Raises ``ValueError`` for one that is not as ``make tune`` writes.
    """
    path = path_of(gpu)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _malformed(path, str(error)) from error
    if not isinstance(content, dict) or content.get("gpu") != gpu:
        found = content.get("gpu") if isinstance(content, dict) else type(content).__name__
        raise _malformed(path, f'"gpu" is {found!r}, not {gpu!r}')
    chosen = {}
    for op, classes in _entries(content, "configurations", path):
        for shape_class, entry in _entries({op: classes}, op, path):
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), str):
                raise _malformed(path, f'{op}, {shape_class!r} has no name under "config"')
            chosen[op, shape_class] = entry["config"]
    return chosen


def _entries(content: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise _malformed(path, f"{key!r} is {value!r}, not an object")
    return list(value.items())


def _malformed(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} cannot be used: {reason} (run `make tune` again, or delete the file)"
    )
