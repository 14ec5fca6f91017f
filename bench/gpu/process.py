"""One step in a process of its own, with a time limit, begun again behind a case that crashed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import rows
from bench.gpu.places import REPOSITORY

DEVICE_IS_LOST = 75
"""Exit status of a step that has reported an error after which its process can use no GPU."""

MOST_RESTARTS = 3

POLL = 0.2
"""Seconds between two looks at a running process."""


@dataclass(frozen=True)
class Step:
    """What to run: ``arguments`` of the Python, at most ``limit`` seconds.

    ``resumes``: the step takes ``--after CASE`` and goes on behind that case, so that it can be
    begun again behind one that crashed, or that reported nothing for ``quiet`` seconds.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    resumes: bool = False
    quiet: float = 60.0


@dataclass
class Outcome:
    """How a step ended: passed, failed, cut off, or not available."""

    step: str
    status: str
    seconds: float
    detail: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_step(
    step: Step, python: str, environment: dict[str, str], folder: Path, deadline: float
) -> Outcome:
    """Run a step until its limit or ``deadline`` (of ``time.monotonic``), whichever is first."""
    start = time.monotonic()
    stop = min(start + step.limit, deadline)
    if stop - start < 1.0:
        return Outcome(step.name, "cut off", 0.0, "not started: no time was left")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / step.name.replace(" ", "-").replace("/", "-")
    log, row_file = place.with_suffix(".log"), place.with_suffix(".rows")
    for path in (log, row_file):
        path.unlink(missing_ok=True)
    resumed: tuple[str, ...] = ()
    crashes: list[dict[str, Any]] = []
    for attempt in range(MOST_RESTARTS + 1):
        code = _run(step, resumed, python, environment, log, row_file, stop)
        found, problems = rows.read(row_file)
        unfinished = _unfinished(found)
        no_time = code is None and time.monotonic() > stop - 1.0
        if code == 0 or no_time or not step.resumes or attempt == MOST_RESTARTS:
            break
        if unfinished is not None:
            reason = (
                f"{_ended(code)}: {last_lines(log)}" if code else f"hung for {step.quiet:.0f} s"
            )
            crashes.append(_crash_row(unfinished, reason))
        last = _last_begun(found)
        if last is None or resumed == ("--after", last):
            break
        resumed = ("--after", last)
    found += crashes
    status, detail = _judge(code, found, problems, unfinished, log, stop - start)
    return Outcome(step.name, status, time.monotonic() - start, detail, found)


def _run(
    step: Step,
    resumed: tuple[str, ...],
    python: str,
    environment: dict[str, str],
    log: Path,
    row_file: Path,
    stop: float,
) -> int | None:
    """Return the exit status, or None for a process that had to be stopped.

    It is stopped at ``stop``, and where it resumes also when its rows have not grown for long.
    """
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [python, *step.arguments, *resumed],
            cwd=REPOSITORY,
            env={**environment, rows.VARIABLE: str(row_file)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        size, grown = 0, time.monotonic()
        try:
            while time.monotonic() < stop:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL)
                now = row_file.stat().st_size if row_file.exists() else 0
                if now != size:
                    size, grown = now, time.monotonic()
                if step.resumes and time.monotonic() - grown > step.quiet:
                    break
            return None
        finally:
            # Its children too: a compiler, a sanitizer, a test's subprocess.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _judge(
    code: int | None,
    found: list[dict[str, Any]],
    problems: list[str],
    unfinished: str | None,
    log: Path,
    limit: float,
) -> tuple[str, str]:
    failed = [row for row in found if row.get("status") == "failed"]
    if code is None:
        place = f" in {unfinished}" if unfinished else ""
        return "cut off", f"stopped after {limit:.0f} s{place}"
    if problems:
        return "failed", f"{len(problems)} unreadable rows: {problems[0]}"
    if failed:
        return "failed", f"{len(failed)} failed"
    if code != 0:
        return "failed", f"{_ended(code)}: {last_lines(log)}"
    if not found:
        return "failed", f"it reported nothing: {last_lines(log)}"
    notes = [row for row in found if row["kind"] == "note"]
    if any(row["status"] == "not available" for row in notes):
        return "not available", notes[-1]["detail"]
    return "passed", notes[-1]["detail"] if notes else ""


def _ended(code: int) -> str:
    if code >= 0:
        return f"it ended with status {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"


def _last_begun(found: list[dict[str, Any]]) -> str | None:
    begun = [row["case"] for row in found if row["kind"] == "begin"]
    return begun[-1] if begun else None


def _unfinished(found: list[dict[str, Any]]) -> str | None:
    """Return the case that had begun and reported nothing, if the last one is such."""
    if found and found[-1]["kind"] == "begin":
        return str(found[-1]["case"])
    return None


def _crash_row(case: str, detail: str) -> dict[str, Any]:
    op, _, name = case.partition(": ")
    return {
        "kind": "check",
        "op": op,
        "backend": "",
        "case": name or case,
        "what": "runs",
        "status": "failed",
        "detail": detail,
    }


def last_lines(log: Path, characters: int = 300) -> str:
    """Return the end of a log as one line."""
    if not log.exists():
        return "no output"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-characters:] or "no output"
