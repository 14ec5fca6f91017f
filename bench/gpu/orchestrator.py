"""Runs the phases of a plan, shows progress, and collects what the steps report."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.gpu import goals, plan, results, table
from bench.gpu.places import BUILD, RESULTS, commit, step_environment
from bench.gpu.process import Outcome, Step, run_step

Show = Callable[[str], None]


def workers(device: str) -> int:
    """Return how many steps run beside each other in the phase of the checks."""
    cores = os.cpu_count() or 1
    return max(1, min(8, cores // 2)) if device == "cuda" else max(1, min(2, cores // 2))


def run_phases(
    phases: Sequence[plan.Phase],
    python: str,
    environment: dict[str, str],
    folder: Path,
    show: Show,
) -> list[Outcome]:
    """Run the phases one after the other; nothing that a step does ends the run."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for phase in phases:
        deadline = start + phase.deadline

        def run(step: Step, deadline: float = deadline) -> Outcome:
            try:
                return run_step(step, python, environment, folder, deadline)
            except Exception as error:
                reason = f"it could not be run ({type(error).__name__}: {error})"
                return Outcome(step.name, "failed", 0.0, reason)

        for outcome in _in_turn(phase, run):
            outcomes.append(outcome)
            show(f"[{time.monotonic() - start:5.0f} s] {describe(outcome)}")
        found = any(row["kind"] == "device" for outcome in outcomes for row in outcome.rows)
        if phase.name == "look" and not found:
            show("without a device that works, nothing else is run")
            break
    return outcomes


def _in_turn(phase: plan.Phase, run: Callable[[Step], Outcome]) -> Iterator[Outcome]:
    if phase.beside <= 1:
        yield from map(run, phase.steps)
        return
    with ThreadPoolExecutor(phase.beside) as pool:
        for future in as_completed([pool.submit(run, step) for step in phase.steps]):
            yield future.result()


def describe(outcome: Outcome) -> str:
    """Return a line of progress."""
    counts = {
        kind: sum(row["kind"] == kind for row in outcome.rows)
        for kind in ("check", "test", "timing")
    }
    parts = [f"{number} {kind}s" for kind, number in counts.items() if number]
    parts += [outcome.detail] if outcome.detail else []
    said = f" ({'; '.join(parts)})" if parts else ""
    return f"{outcome.step}: {outcome.status} in {outcome.seconds:.1f} s{said}"[:300]


def carry_out(
    python: str,
    *,
    size: str,
    device: str,
    ops: Sequence[str] = plan.OPS,
    steps: Sequence[str] = plan.STEPS,
    build: Path = BUILD,
    results_folder: Path | None = None,
    show: Show = print,
) -> int:
    """Run everything, write the result file, show the table, and return the exit status.

    The status is 0 where nothing failed and nothing was cut off, whatever became of the goals. On a
    CPU the file is written beside the logs: its numbers are no results.
    """
    phases = plan.plan(size, device, ops=ops, steps=steps, workers=workers(device))
    started = time.monotonic()
    folder = build / "steps"
    outcomes = run_phases(phases, python, step_environment(device, build), folder, show)
    rows = [row for outcome in outcomes for row in outcome.rows]
    measurements = goals.Measurements(rows)
    verdicts = goals.judge_all(measurements, ops) if device == "cuda" else []
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "size": size,
        "seconds": round(time.monotonic() - started, 1),
        "dry_run": device != "cuda",
        "ops": list(ops),
        "asked_for": list(steps),
    }
    content = results.assemble(outcomes, verdicts, measurements, about)
    if results_folder is None:
        results_folder = RESULTS if device == "cuda" else build
    name = results.slug(content["gpu"]) if device == "cuda" else "dry-run"
    # Nothing less may take the place of a whole run of the same day.
    if size != "full":
        name += f"-{size}"
    elif (len(ops), len(steps)) != (len(plan.OPS), len(plan.STEPS)):
        name += "-part"
    path = results.write(content, results_folder, name)
    for line in table.lines(outcomes, verdicts, measurements, about):
        show(line)
    show(f"wrote {path}; logs of the steps: {folder}")
    return 1 if content["failures"] else 0
