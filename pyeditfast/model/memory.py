"""How much memory is free, how much a token of a pass takes, and what an out-of-memory error looks
like.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

SMALLEST_PASS = 64
LARGEST_PASS = 16384
FALLBACK_BYTES = 2 << 30


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``, as far as the system tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) * 1024, _container_memory()))
    return FALLBACK_BYTES


def _container_memory() -> float:
    """Return what the control group still allows; infinite without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else int(limit) - used


def bytes_per_token(model: PreTrainedModel, graph_layers: int) -> int:
    """Estimate the bytes that one token of a pass takes.

    ``graph_layers`` are the blocks whose activations are kept for the backward pass. The estimate
    counts 12 vectors of the hidden and 4 of the intermediate size a block, and float32 logits with
    their gradient for one token in three.
    """
    config = model.config.get_text_config()
    hidden = int(getattr(config, "hidden_size", 1024))
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    vocabulary = int(getattr(config, "vocab_size", 32000))
    element = torch.finfo(model.dtype).bits // 8
    return element * (graph_layers + 1) * (12 * hidden + 4 * intermediate) + 4 * vocabulary


def default_tokens_per_pass(
    model: PreTrainedModel, devices: Iterable[torch.device], graph_layers: int
) -> int:
    """Return how many tokens fill half of the free memory of the tightest device."""
    free = min(available_memory(device) for device in devices)
    tokens = free // 2 // bytes_per_token(model, graph_layers)
    return max(SMALLEST_PASS, min(LARGEST_PASS, tokens))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether ``error`` is what torch raises when an allocation fails, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def peak_memory(devices: Iterable[torch.device]) -> int:
    """Return the peak bytes: allocated on the CUDA devices, or the process's resident set where
    there are none.
    """
    cuda = [device for device in devices if device.type == "cuda"]
    if cuda:
        return sum(torch.cuda.max_memory_allocated(device) for device in cuda)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(devices: Iterable[torch.device]) -> None:
    """Begin to measure the peak of CUDA devices anew; that of a process cannot be reset."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
