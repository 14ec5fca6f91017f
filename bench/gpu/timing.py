"""Step ``timing``: every form of every timed case, on inputs that rotate past the L2 cache.

``--ops a,b`` names the ops; ``--after CASE`` goes on behind a case that ended the process.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.case import Case, Form, Inputs, backends, cases, using
from bench.gpu.clock import Clock, Measurement, clock_for, measure
from bench.gpu.lost_device import describe, is_fatal, leave
from bench.gpu.options import device_of, ops_of, parser, selected
from bench.gpu.rows import emit

BUDGET = {"tiny": 0.0, "small": 0.1, "full": 0.25}
"""Seconds that the rounds of one form may take, beside warming up."""

MOST_SETS = 8


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Return sets of inputs that together exceed three times the L2 cache, two at the least."""
    generator = torch.Generator(device).manual_seed(1)
    sets = [case.inputs(device, generator)]
    if device.type == "cuda":
        from bench.gpu.device import l2_bytes

        held = sum(size_of(value) for value in sets[0].values())
        wanted = 3 * l2_bytes(device) // max(1, held) + 1
    else:
        wanted = 2
    while len(sets) < max(2, min(MOST_SETS, wanted)):
        sets.append(case.inputs(device, generator))
    return sets


def size_of(value: object) -> int:
    """Return the bytes of a tensor, or of those in a list or tuple."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def forms(case: Case, device: torch.device) -> Iterator[tuple[str, str, str | None, Form]]:
    """Yield name, role, backend and function of every form that is timed."""
    for name, reason in backends(case, device):
        if reason is None:
            yield name, "ours", name, case.run
    if case.kernel_only is not None:
        yield "triton", "kernel only", None, case.kernel_only
    for role, others in (("plain torch", case.plain), ("less exact", case.less_exact)):
        for name, form in others.items():
            yield name, role, None, form
    if case.bare is not None:
        yield "products alone", "bare", None, case.bare
    if case.published is not None:
        yield "published", "published", None, case.published


def time_form(
    case: Case, form: Form, sets: list[Inputs], clock: Clock, budget: float
) -> Measurement:
    """Time one form; what it writes is restored before every call."""
    kept = [{name: inputs[name].clone() for name in case.writes} for inputs in sets]

    def before(number: int) -> None:
        place = number % len(sets)
        for name, saved in kept[place].items():
            sets[place][name].copy_(saved)

    try:
        return measure(clock, lambda number: form(sets[number % len(sets)]), before, budget)
    finally:
        before(0)
        for place in range(1, len(sets)):
            before(place)


def time_case(case: Case, device: torch.device, clock: Clock, budget: float) -> None:
    """Report the times of every form; one that fails is reported and passed over."""
    sets = input_sets(case, device)
    for name, role, backend, form in forms(case, device):
        try:
            with torch.no_grad(), using(backend or "auto"):
                found = time_form(case, form, sets, clock, budget)
        except Exception as error:
            report_failure(case, name, role, error)
            if is_fatal(error):
                leave(error)
            continue
        emit(
            "timing",
            op=case.op,
            case=case.name,
            form=name,
            role=role,
            median_seconds=found.median,
            quartiles_seconds=list(found.quartiles),
            rounds=found.rounds,
            host_seconds=found.host,
            flops=float(case.flops),
            unit=case.unit,
            bytes=float(case.bytes),
        )


def report_failure(case: Case, name: str, role: str, error: Exception) -> None:
    """Report a form that could not be timed: a failure only if it is one of ours."""
    missing = isinstance(error, ImportError) or role in ("plain torch", "less exact")
    emit(
        "check",
        op=case.op,
        backend=name,
        case=case.name,
        what=f"is timed ({role})",
        status="not available" if missing and not is_fatal(error) else "failed",
        detail=describe(error),
    )


def main() -> None:
    """Time the ops that ``--ops`` names."""
    options = ops_of(parser(__doc__))
    device = device_of(options)
    clock = clock_for(device)
    chosen = [case for op in options.ops for case in cases(op, options.size) if case.timed]
    for case in selected(chosen, options.after):
        emit("begin", case=case.key)
        try:
            time_case(case, device, clock, BUDGET[options.size])
        except Exception as error:
            report_failure(case, "", "ours", error)
            if is_fatal(error):
                leave(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
