"""Step of ``make tune``: time the backends of one op for each class of its sizes.

``--after CASE`` goes on behind a class that ended the process. The op is timed as users call it,
its look at the result included. That every backend is right is for the step ``correctness`` to say;
here only one that is far off is refused.
"""

from __future__ import annotations

import importlib

import torch
from ops.tolerances import floor

from bench.gpu.candidates import BUDGET, CandidateError, best
from bench.gpu.case import Case, Inputs, backends, using
from bench.gpu.clock import Clock, clock_for
from bench.gpu.compare import largest_errors
from bench.gpu.correctness import report, room_for
from bench.gpu.lost_device import describe, is_fatal, leave
from bench.gpu.options import device_of, parser, selected
from bench.gpu.rows import emit
from bench.gpu.timing import time_form

DEFAULT = "torch"
"""The backend that stays where none is clearly faster."""

FLOORS = 64.0
"""How many times the floor of the error two backends may differ by."""


def size_classes(op: str, size: str) -> list[Case]:
    """Return a case for each class of sizes that is measured, named by the class."""
    found: list[Case] = importlib.import_module(f"bench.gpu.cases.{op}").size_classes(size)
    return found


def check(case: Case, names: list[str], inputs: Inputs) -> None:
    """Raise ``CandidateError`` for a backend that is far from the first one."""
    expected = None
    for name in names:
        with torch.no_grad(), using(name):
            found = case.run(inputs)
        expected = expected or found
        for output, error, _ in largest_errors(found, expected):
            allowed = FLOORS * floor(found[output].dtype, case.length)
            if not error <= allowed:
                raise CandidateError(
                    f"{name}: {output} differs from {names[0]}'s by {error:.3g}, "
                    f"allowed {allowed:.3g}"
                )


def tune(case: Case, names: list[str], device: torch.device, clock: Clock, budget: float) -> None:
    """Time the backends ``names``, of which the first is the default, and report the fastest."""
    inputs = case.inputs(device, torch.Generator(device).manual_seed(0))
    check(case, names, inputs)
    medians: dict[str, float] = {}
    # The default twice, first and last: clocks and temperatures drift.
    for name in (*names, names[0]):
        with torch.no_grad(), using(name):
            median = time_form(case, case.run, [inputs], clock, budget).median
        medians[name] = min(median, medians.get(name, median))
    emit(
        "fastest",
        op=case.op,
        size_class=case.name,
        backend=best(names[0], medians),
        median_seconds=medians,
    )


def main() -> None:
    """Measure the op that ``--op`` names, where it has a choice here."""
    arguments = parser(__doc__)
    arguments.add_argument("--op", required=True)
    arguments.add_argument("--after", help="go on behind the class with this key")
    options = arguments.parse_args()
    device = device_of(options)
    clock = clock_for(device)
    chosen = size_classes(options.op, options.size)
    known = dict(backends(chosen[0], device))
    names = [DEFAULT, *(name for name in known if name != DEFAULT and known[name] is None)]
    if len(names) == 1:
        reasons = "; ".join(f"{name}: {known[name]}" for name in known if name != DEFAULT)
        emit("note", status="not available", detail=f"only {DEFAULT} runs here ({reasons})")
        return
    for case in selected(chosen, options.after):
        emit("begin", case=case.key)
        refused = room_for(case, device)
        if refused is not None:
            report(case, "", "is measured", "skipped", refused)
            continue
        try:
            tune(case, names, device, clock, BUDGET[options.size])
        except Exception as error:
            report(case, "", "is measured", "failed", describe(error))
            if is_fatal(error):
                leave(error)


if __name__ == "__main__":
    main()
