"""Checks of what has to run without waiting for the device, and so in a CUDA graph."""

from __future__ import annotations

import torch

from bench.gpu.case import Case, Inputs, Outputs, own
from bench.gpu.compare import same_bits
from bench.gpu.rows import emit


def check_asynchronous(case: Case, backend: str, inputs: Inputs, device: torch.device) -> None:
    """Report whether the case runs without a host synchronization, and whether a graph holds it.

    An earlier call has compiled its kernels, which does synchronize.
    """
    if device.type != "cuda":
        for what in ("no host sync", "CUDA graph"):
            _report(case, backend, what, "skipped", "there is no CUDA device")
        return
    expected = case.run(own(case, inputs))
    _report(case, backend, "no host sync", *_without_sync(case, own(case, inputs)))
    _report(case, backend, "CUDA graph", *_in_a_graph(case, inputs, expected))


def _without_sync(case: Case, inputs: Inputs) -> tuple[str, str]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(inputs)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return "failed", " ".join(str(error).split())[:300]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "passed", ""


def _in_a_graph(case: Case, inputs: Inputs, expected: Outputs) -> tuple[str, str]:
    """Capture the case, replay it on restored inputs, and compare with the call before."""
    held = own(case, inputs)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        case.run(own(case, inputs))
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = case.run(held)
    except RuntimeError as error:
        return "failed", f"it cannot be captured: {' '.join(str(error).split())}"[:300]
    for name in case.writes:
        held[name].copy_(inputs[name])
    graph.replay()
    torch.cuda.synchronize()
    if same_bits(outputs, expected):
        return "passed", ""
    return "failed", "the replay differs from the call"


def _report(case: Case, backend: str, what: str, status: str, detail: str) -> None:
    about = {"op": case.op, "backend": backend, "case": case.name, "what": what}
    emit("check", **about, status=status, detail=detail)
