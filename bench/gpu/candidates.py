"""Step of ``make tune``: check and time the candidates of one op.

A candidate that is less exact than twice the default is an error, not a choice. The default stays
unless another is faster by more than what two measurements of one thing differ by.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from ops.tolerances import UNIT_ROUNDOFF
from torch import Tensor

from bench.gpu.clock import Clock, clock_for, measure
from bench.gpu.compare import relative_error
from bench.gpu.lost_device import describe, is_fatal, leave
from bench.gpu.options import device_of, parser
from bench.gpu.rows import emit

if TYPE_CHECKING:
    from pyeditfast_kernels.launch import Config
    from pyeditfast_kernels.tuned import Tunable

MARGIN = 0.02
"""A candidate has to be faster than the default by this part."""

BUDGET = {"tiny": 0.0, "small": 0.2, "full": 0.5}

SETS = 3


class CandidateError(Exception):
    """A candidate gives a wrong result."""


def fresh(choice: Tunable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inputs of which the one that is written is a copy."""
    return tuple(
        tensor.clone() if place == choice.writes else tensor for place, tensor in enumerate(inputs)
    )


def check(choice: Tunable, device: torch.device, tiny: bool) -> None:
    """Raise ``CandidateError`` for a candidate that is wrong, or differs from itself."""
    inputs = choice.inputs(device, tiny)
    exact = choice.exact(fresh(choice, inputs))
    allowed = None
    for config in choice.candidates:
        first, second = (choice.call(fresh(choice, inputs), config) for _ in range(2))
        if not torch.equal(first, second):
            raise CandidateError(f"{config.name}: two runs on the same inputs differ")
        error = relative_error(first, exact)
        if allowed is None:
            # The default has tests of its own.
            allowed = 2.0 * error + 4.0 * UNIT_ROUNDOFF[first.dtype]
        if not error <= allowed:
            raise CandidateError(f"{config.name}: error {error:.3g}, allowed {allowed:.3g}")


def time_candidate(
    choice: Tunable, config: Config, sets: list[tuple[Tensor, ...]], clock: Clock, budget: float
) -> float:
    """Return the median seconds of a candidate; what it writes is restored before every call."""
    kept = [None if choice.writes is None else inputs[choice.writes].clone() for inputs in sets]

    def before(number: int) -> None:
        saved = kept[number % len(sets)]
        if saved is not None and choice.writes is not None:
            sets[number % len(sets)][choice.writes].copy_(saved)

    found = measure(
        clock, lambda number: choice.call(sets[number % len(sets)], config), before, budget
    )
    for number in range(len(sets)):
        before(number)
    return found.median


def tune(choice: Tunable, device: torch.device, clock: Clock, size: str) -> None:
    """Check and time the candidates of one class of shapes, and report the choice."""
    check(choice, device, size == "tiny")
    sets = [choice.inputs(device, size == "tiny") for _ in range(SETS)]
    medians: dict[str, float] = {}
    # The default twice, first and last: clocks and temperatures drift.
    for config in (*choice.candidates, choice.candidates[0]):
        median = time_candidate(choice, config, sets, clock, BUDGET[size])
        medians[config.name] = min(median, medians.get(config.name, median))
    emit(
        "tuned",
        op=choice.op,
        shape_class=choice.shape_class,
        config=best(choice.candidates[0].name, medians),
        median_seconds=medians,
    )


def best(default: str, medians: dict[str, float]) -> str:
    """Return the fastest, or the default if it is as fast within the margin."""
    fastest = min(medians, key=lambda name: medians[name])
    return fastest if medians[fastest] < (1.0 - MARGIN) * medians[default] else default


def main() -> None:
    """Tune the op that ``--op`` names."""
    arguments = parser(__doc__)
    arguments.add_argument("--op", required=True)
    options = arguments.parse_args()
    device = device_of(options)
    clock = clock_for(device)
    torch.manual_seed(0)
    for choice in importlib.import_module(f"pyeditfast_kernels.{options.op}").tunable():
        case = f"{choice.op}: {choice.shape_class}"
        emit("begin", case=case)
        try:
            tune(choice, device, clock, options.size)
        except Exception as error:
            about = {"op": choice.op, "backend": "triton", "case": choice.shape_class}
            emit("check", **about, what="is tuned", status="failed", detail=describe(error))
            if is_fatal(error):
                leave(error)


if __name__ == "__main__":
    main()
