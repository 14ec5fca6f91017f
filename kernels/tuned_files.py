"""What ``make tune`` found on a GPU, as data: ``tuned_configs/*.json``, one file a GPU.

A file names the fastest configurations of Triton kernels, which ``tuned.py`` looks up, and the
fastest backends of ops, which ``pyeditfast/ops/measured_backend.py`` looks up: so nothing here may
need triton. It is read when one of them is first asked for on that GPU, and once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("tuned_configs")


@dataclass(frozen=True)
class TunedFile:
    """The names of the fastest configurations and backends, by op and class of shapes."""

    path: Path
    configurations: Mapping[tuple[str, str], str] = field(default_factory=dict)
    backends: Mapping[tuple[str, str], str] = field(default_factory=dict)


@functools.cache
def gpu_name(index: int | None) -> str:
    """Return the name of the CUDA device with this index, of the current one for None."""
    return torch.cuda.get_device_name(index)


def path_of(gpu: str) -> Path:
    """Return where the file for GPUs called ``gpu`` is."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def read_tuned_file(gpu: str) -> TunedFile:
    """Return what was found to be the fastest on ``gpu``; nothing where there is no file.

    Raises ``ValueError`` for a file that is not as ``make tune`` writes.
    """
    path = path_of(gpu)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TunedFile(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise malformed(path, str(error)) from error
    if not isinstance(content, dict) or content.get("gpu") != gpu:
        found = content.get("gpu") if isinstance(content, dict) else type(content).__name__
        raise malformed(path, f'"gpu" is {found!r}, not {gpu!r}')
    # Backends came later: a file from before is no worse for it.
    content.setdefault("backends", {})
    return TunedFile(
        path,
        dict(_names(content, "configurations", "config", path)),
        dict(_names(content, "backends", "backend", path)),
    )


def malformed(path: Path, reason: str) -> ValueError:
    """Return the error for a file that cannot be used."""
    return ValueError(
        f"{path} cannot be used: {reason} (run `make tune` again, or delete the file)"
    )


def _names(
    content: dict[str, Any], section: str, key: str, path: Path
) -> Iterator[tuple[tuple[str, str], str]]:
    for op, classes in _entries(content, section, path):
        for shape_class, entry in _entries({op: classes}, op, path):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                raise malformed(path, f'{op}, {shape_class!r} has no name under "{key}"')
            yield (op, shape_class), entry[key]


def _entries(content: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise malformed(path, f"{key!r} is {value!r}, not an object")
    return list(value.items())
