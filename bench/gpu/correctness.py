"""Step ``correctness``: every op in every backend against float64, on the device.

An error may be at most twice that of plain torch in the same dtype plus a floor, as in
``tests/ops/tolerances.py``; the same inputs have to give the same bits twice; what claims to be
asynchronous has to run without a host synchronization and inside a CUDA graph. ``--ops a,b`` names
the ops, ``--backends a,b`` some of their backends; ``--after CASE`` goes on behind a case that
ended the process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch
from ops.tolerances import floor

from bench.gpu.asynchronous import check_asynchronous
from bench.gpu.case import AUTO, Case, Inputs, Outputs, backends, cases, own, using
from bench.gpu.compare import largest_errors, same_bits
from bench.gpu.lost_device import describe, is_fatal, leave
from bench.gpu.options import device_of, ops_of, parser, selected
from bench.gpu.rows import emit

PATIENCE = 30.0
"""Seconds that a case waits for memory that steps beside this one hold."""


def check_case(
    case: Case,
    device: torch.device,
    only: Sequence[str] | None,
    said: set[tuple[str, str]],
    graphs: bool = True,
) -> None:
    """Report every check of a case; ``said`` are the backends known not to run here."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = case.inputs(device, generator)
    exact = None if case.exact is None else case.exact(own(case, inputs))
    yardstick: dict[str, float] = {}
    if exact is not None and case.plain and not case.equal:
        plain = next(iter(case.plain.values()))(own(case, inputs))
        yardstick = {name: error for name, error, _ in largest_errors(plain, exact)}
        del plain
    for name, reason in backends(case, device):
        if only is not None and name not in only and name != AUTO:
            continue
        if reason is not None:
            if (case.op, name) not in said:
                report(case, name, "runs", "not available", reason)
                said.add((case.op, name))
            continue
        try:
            with torch.no_grad(), using(name):
                check_backend(case, name, inputs, exact, yardstick)
                if case.asynchronous and graphs and name != "torch":
                    check_asynchronous(case, name, inputs, device)
        except ImportError as error:
            report(case, name, "runs", "not available", describe(error))
        except Exception as error:
            report(case, name, "runs", "failed", describe(error))
            if is_fatal(error):
                leave(error)


def check_backend(
    case: Case,
    name: str,
    inputs: Inputs,
    exact: Outputs | None,
    yardstick: dict[str, float],
) -> None:
    """Report accuracy and repeatability in the backend in force."""
    first = case.run(own(case, inputs))
    if exact is not None:
        for output, error, dtype in largest_errors(first, exact):
            bound = 0.0
            if first[output].is_floating_point() and not case.equal:
                bound = 2.0 * yardstick.get(output, 0.0) + floor(first[output].dtype, case.length)
            report(
                case,
                name,
                f"{output} is right",
                "passed" if error <= bound else "failed",
                f"error {error:.3g}, allowed {bound:.3g}, {dtype}",
                error=error,
                bound=bound,
            )
    second = case.run(own(case, inputs))
    equal = same_bits(first, second)
    report(
        case,
        name,
        "same bits twice",
        "passed" if equal else "failed",
        "" if equal else "two runs on the same inputs differ",
    )


def report(case: Case, backend: str, what: str, status: str, detail: str, **more: float) -> None:
    """Report one check."""
    about = {"op": case.op, "backend": backend, "case": case.name, "what": what}
    emit("check", **about, status=status, detail=detail, **more)


def room_for(case: Case, device: torch.device) -> str | None:
    """Return why a case does not fit the device's memory, or None; waits for steps beside."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    until = time.monotonic() + PATIENCE
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if case.memory <= 0.9 * free:
            return None
        if case.memory > 0.9 * total or time.monotonic() > until:
            return f"it needs {case.memory / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        time.sleep(1.0)


def main() -> None:
    """Check the ops that ``--ops`` names."""
    arguments = parser(__doc__)
    arguments.add_argument("--backends", help="only these")
    arguments.add_argument("--no-graphs", action="store_true", help="leave CUDA graphs out")
    options = ops_of(arguments)
    device = device_of(options)
    torch.manual_seed(0)
    only = options.backends.split(",") if options.backends else None
    chosen = [case for op in options.ops for case in cases(op, options.size) if case.checked]
    said: set[tuple[str, str]] = set()
    for case in selected(chosen, options.after):
        emit("begin", case=case.key)
        reason = room_for(case, device)
        if reason is not None:
            report(case, "", "runs", "skipped", reason)
            continue
        try:
            check_case(case, device, only, said, not options.no_graphs)
        except ImportError as error:
            report(case, "", "runs", "not available", describe(error))
        except Exception as error:
            report(case, "", "runs", "failed", describe(error))
            if is_fatal(error):
                leave(error)
    emit("note", status="passed", detail="")


if __name__ == "__main__":
    main()
