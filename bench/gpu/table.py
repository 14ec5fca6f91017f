"""The short table at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu.goals import PLAIN_BACKENDS, Measurements, Verdict, of_ceiling, ratio_to
from bench.gpu.process import Outcome
from bench.gpu.results import failures, summary_of_tests

MOST_FAILURES = 25


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows as lines with aligned columns."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))  # noqa: B905
        yield line.rstrip()


def seconds(value: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def lines(
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
    measurements: Measurements,
    about: dict[str, Any],
) -> Iterator[str]:
    """Yield the table: steps, checks, times, goals, failures."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    yield ""
    for row in rows:
        if row["kind"] == "device":
            versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
            yield f"{row['name']}; {versions}; commit {about['commit']}; size {about['size']}"
    yield from _checks(measurements, rows)
    yield from _ceilings(measurements)
    yield from _times(measurements)
    yield from _editors(rows, measurements)
    yield from _goals(verdicts)
    yield from _failures(outcomes)


def _checks(measurements: Measurements, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in measurements.checks:
        if row["what"].startswith("is timed") and row["status"] == "not available":
            continue
        counts.setdefault((row["op"], row["backend"]), Counter())[row["status"]] += 1
    if counts:
        yield ""
        table: list[tuple[str, ...]] = [
            ("checks", "backend", "passed", "failed", "skipped", "not available")
        ]
        for (op, backend), count in counts.items():
            table.append((op, backend, *(str(count[status] or "") for status in table[0][2:])))
        yield from columns(table)
    tests = summary_of_tests(rows)["counts"]
    if tests:
        yield ""
        yield "test suite: " + ", ".join(f"{number} {status}" for status, number in tests.items())


def _ceilings(measurements: Measurements) -> Iterator[str]:
    if measurements.ceilings:
        yield ""
        parts = [
            f"copy {rate / 1e12:.2f} TB/s"
            if name == "copy"
            else f"{name} {rate / 1e12:.3g} TFLOP/s"
            for name, rate in measurements.ceilings.items()
        ]
        yield "ceilings: " + ", ".join(parts)


def _times(measurements: Measurements) -> Iterator[str]:
    head = ("op", "case", "backend", "median", "× published", "× torch", "of floor", "bound")
    table = [head]
    for row in measurements.timings:
        if row["role"] not in ("ours", "kernel only") or _is_beside_a_kernel(row, measurements):
            continue
        label = row["form"] if row["role"] == "ours" else f"{row['form']}, {row['role']}"
        share = of_ceiling(measurements, row)
        ratios = (ratio_to(role)(measurements, row) for role in ("published", "plain torch"))
        table.append(
            (
                row["op"],
                row["case"],
                label,
                seconds(row["median_seconds"]),
                *(f"{ratio[0]:.3g}" if ratio else "" for ratio in ratios),
                f"{100 * share[0]:.0f} %" if share else "",
                share[1] if share else "",
            )
        )
    if len(table) > 1:
        yield ""
        yield from columns(table)


def _is_beside_a_kernel(row: dict[str, Any], measurements: Measurements) -> bool:
    """Say whether a row is of a plain backend of an op that a kernel computed too."""
    if row["form"] not in PLAIN_BACKENDS:
        return False
    found = measurements.of(row["op"], row["case"], "ours")
    return any(other["form"] not in PLAIN_BACKENDS for other in found)


def _editors(rows: Sequence[dict[str, Any]], measurements: Measurements) -> Iterator[str]:
    """Beside the times: that of one forward pass at the rate of a bf16 product."""
    table = [("editor", "case", "form", "median", "forward pass", "")]
    rate = measurements.ceilings.get("bf16")
    for row in rows:
        if row["kind"] == "editor":
            floor = seconds(row["flops"] / rate) if rate and row.get("flops") else ""
            cells = (row["editor"], row["case"], row["form"])
            table.append((*cells, seconds(row["median_seconds"]), floor, row["detail"]))
    if len(table) > 1:
        yield ""
        yield from columns(table)


def _goals(verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not verdicts:
        return
    yield ""
    table = [("goal", "case", "metric", "wanted", "measured", "")]
    for verdict in verdicts:
        goal = verdict.goal
        sense = "≤" if goal.at_most is not None else "≥"
        wanted = f"{sense} {verdict.wanted:g}" if verdict.wanted is not None else ""
        measured = f"{verdict.measured:.3g}" if verdict.measured is not None else ""
        table.append((goal.op, goal.case, goal.metric, wanted, measured, verdict.outcome))
    yield from columns(table)
    counts = Counter(verdict.outcome for verdict in verdicts)
    yield "goals: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items())


def _failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield ""
    for outcome in outcomes:
        if outcome.status == "not available":
            yield f"not available: {outcome.step}: {outcome.detail}"
    found = failures(outcomes)
    if not found:
        yield "nothing failed"
        return
    yield f"{len(found)} failures:"
    for failure in found[:MOST_FAILURES]:
        yield f"  {failure[:300]}"
    if len(found) > MOST_FAILURES:
        yield f"  … and {len(found) - MOST_FAILURES} more, in the result file"
