"""The options that every step takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bench.gpu.case import Case


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``--device`` and ``--size``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cuda", "cpu"), required=True)
    made.add_argument("--size", choices=("tiny", "small", "full"), required=True)
    return made


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device; CUDA's with its index, as the tensors on it have."""
    if options.device == "cuda":
        return torch.device("cuda", 0)
    # Tiny shapes gain nothing from threads.
    torch.set_num_threads(1)
    return torch.device("cpu")


def ops_of(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of a step that takes cases of some ops, perhaps from the middle on."""
    arguments.add_argument("--ops", required=True, type=lambda text: text.split(","), help="a,b")
    arguments.add_argument("--after", help="go on behind the case with this key")
    return arguments.parse_args()


def selected(found: Sequence[Case], after: str | None) -> Sequence[Case]:
    """Return the cases behind the one whose key is ``after``; all for None."""
    if after is None:
        return found
    keys = [case.key for case in found]
    if after not in keys:
        raise SystemExit(f"--after names no case: {after!r}")
    return found[keys.index(after) + 1 :]
