"""What the kernels shall reach on an H200-class GPU, as data, and how a run compares with it.

Every measured number is a ratio of two numbers of one run. The cases are those of ``cases/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COPY = "copy"
MATMULS = ("bf16", "fp32", "fp64")

PLAIN_BACKENDS = ("torch", "reference")
"""Backends that are plain torch and so cannot reach a goal."""


@dataclass(frozen=True)
class Goal:
    """A bound on one metric of one case; ``by_bound``: it depends on what bounds the op."""

    op: str
    case: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    by_bound: Mapping[str, float] | None = None


OF_CEILING = {"matmul": 0.70, "copy": 0.80}

GRAM = ("1 of 100 × 14336", "2 of 400 × 14336", "18 of 400 × 14336", "1 of 1024 × 14336")
LARGE_GRAM = ("2 of 2048 × 14336", "1 of 4096 × 14336")
SHIFTS = ("2 of 100", "2 of 400")
LARGE_SHIFTS = ("2 of 1024", "1 of 4096")
SOLVES = ("2 of 400, 4096 columns", "2 of 1024, 4096 columns", "18 of 400, 4096 columns")

GOALS = (
    *(Goal("gram", f"bf16, {case}", "of the ceiling", by_bound=OF_CEILING) for case in LARGE_GRAM),
    *(
        Goal("gram", f"bf16, {case}", "against plain torch", at_least=1.0)
        for case in (*GRAM, *LARGE_GRAM)
    ),
    *(
        Goal("apply_shift", f"bf16, {case} → 4096 × 14336", "of the ceiling", by_bound=OF_CEILING)
        for case in LARGE_SHIFTS
    ),
    *(
        Goal("apply_shift", f"bf16, {case} → 4096 × 14336", "against plain torch", at_least=1.0)
        for case in (*SHIFTS, *LARGE_SHIFTS)
    ),
    Goal("solve_shift", "solve and apply, 2 of 400", "against published", at_least=100.0),
    Goal("solve_shift", "solve and apply, 2 of 400", "against plain torch", at_least=2.0),
    *(
        Goal("routed_linear", case, "of bare matmuls", at_most=1.05)
        for case in ("prefill, 1 × 512 tokens, 2 memories", "prefill, 8 × 64 tokens, 2 memories")
    ),
    *(
        Goal("routed_linear", f"decode, 16 rows, {rest}", "of copy bandwidth", at_least=0.85)
        for rest in ("one memory in use", "three memories in use")
    ),
    Goal("routed_linear", "prefill, 1 × 512 tokens, 2 memories", "no host sync", at_least=1.0),
    Goal("routed_linear", "prefill, 1 × 512 tokens, 2 memories", "CUDA graph", at_least=1.0),
    Goal("masked_sgd", "product, 240 tokens", "of copy bandwidth", at_least=0.80),
    Goal("masked_sgd", "product, 240 tokens", "against plain torch", at_least=5.0),
    *(Goal("cholesky_solve", case, "against plain torch", at_least=2.0) for case in SOLVES),
    *(
        Goal("magnitude_threshold", f"{dtype}, 1e8 elements", "of copy bandwidth", at_least=0.70)
        for dtype in ("bf16", "fp32")
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured; ``outcome``: met, missed, or why neither."""

    goal: Goal
    wanted: float | None
    measured: float | None
    backend: str
    outcome: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "op": self.goal.op,
            "case": self.goal.case,
            "metric": self.goal.metric,
            "sense": "at most" if self.goal.at_most is not None else "at least",
            "wanted": self.wanted,
            "measured": self.measured,
            "backend": self.backend,
            "outcome": self.outcome,
        }


class Measurements:
    """The rows of a run, for questions about one op in one case."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.timings = [row for row in rows if row["kind"] == "timing"]
        self.checks = [row for row in rows if row["kind"] == "check"]
        self.ceilings: dict[str, float] = {}
        for row in rows:
            if row["kind"] == "ceiling":
                # The better of two measurements is the harder ceiling.
                known = self.ceilings.get(row["name"], 0.0)
                self.ceilings[row["name"]] = max(known, row["value"])

    def of(self, op: str, case: str, *roles: str) -> list[dict[str, Any]]:
        """Return the timings of a case in some roles, the fastest first."""
        found = [
            row
            for row in self.timings
            if row["op"] == op and row["case"] == case and row["role"] in roles
        ]
        return sorted(found, key=lambda row: row["median_seconds"])

    def floor(self, row: dict[str, Any]) -> tuple[float, str] | None:
        """Return the least seconds that a timing's work takes here, and what bounds it."""
        bandwidth, rate = self.ceilings.get(COPY), self.ceilings.get(row["unit"])
        if not bandwidth or not rate:
            return None
        moving, computing = row["bytes"] / bandwidth, row["flops"] / rate
        if max(moving, computing) <= 0.0:
            return None
        return max((moving, "copy"), (computing, "matmul"))

    def failed(self, op: str, backend: str) -> bool:
        """Say whether an op failed a check in a backend."""
        return any(
            row["status"] == "failed" and row["op"] == op and row["backend"] in (backend, "")
            for row in self.checks
        )


def ours(rows: Measurements, op: str, case: str) -> dict[str, Any] | None:
    """Return the fastest timing of the op itself, its kernels before plain torch."""
    found = rows.of(op, case, "ours")
    kernels = [row for row in found if row["form"] not in PLAIN_BACKENDS]
    return next(iter(kernels or found), None)


def ratio_to(
    role: str, inverse: bool = False
) -> Callable[[Measurements, dict[str, Any]], tuple[float, str] | None]:
    """Return the metric "times as fast as the fastest form in ``role``", or its inverse."""

    def metric(rows: Measurements, own: dict[str, Any]) -> tuple[float, str] | None:
        others = rows.of(own["op"], own["case"], role)
        if not others:
            return None
        ratio = others[0]["median_seconds"] / own["median_seconds"]
        return (1.0 / ratio if inverse else ratio), ""

    return metric


def of_ceiling(rows: Measurements, own: dict[str, Any]) -> tuple[float, str] | None:
    """Return the floor over the time, and what bounds the op."""
    floor = rows.floor(own)
    return None if floor is None else (floor[0] / own["median_seconds"], floor[1])


def of_copy(rows: Measurements, own: dict[str, Any]) -> tuple[float, str] | None:
    """Return the bytes that have to be moved a second over the bandwidth of a copy."""
    bandwidth = rows.ceilings.get(COPY)
    if not bandwidth:
        return None
    return own["bytes"] / own["median_seconds"] / bandwidth, "copy"


METRICS: dict[str, Callable[[Measurements, dict[str, Any]], tuple[float, str] | None]] = {
    "of the ceiling": of_ceiling,
    "of copy bandwidth": of_copy,
    "against plain torch": ratio_to("plain torch"),
    "against published": ratio_to("published"),
    "of bare matmuls": ratio_to("bare", inverse=True),
}

CHECKS = ("no host sync", "CUDA graph")
"""Metrics that are checks: 1 where all backends but plain torch pass, 0 where one fails."""


def judge(goal: Goal, rows: Measurements) -> Verdict:
    """Compare one goal with what was measured."""
    if goal.metric in CHECKS:
        return _judge_check(goal, rows)
    own = ours(rows, goal.op, goal.case)
    wanted = goal.at_least if goal.at_most is None else goal.at_most
    if own is None:
        return Verdict(goal, wanted, None, "", "not measured")
    backend = own["form"]
    found = METRICS[goal.metric](rows, own)
    if found is None:
        return Verdict(goal, wanted, None, backend, "nothing to compare with")
    measured, bound = found
    if goal.by_bound is not None:
        wanted = goal.by_bound[bound]
    assert wanted is not None
    if rows.failed(goal.op, backend):
        return Verdict(goal, wanted, measured, backend, "void: its checks failed")
    if backend in PLAIN_BACKENDS:
        return Verdict(goal, wanted, measured, backend, "no kernel ran")
    met = measured >= wanted if goal.at_most is None else measured <= wanted
    return Verdict(goal, wanted, measured, backend, "met" if met else "missed")


def _judge_check(goal: Goal, rows: Measurements) -> Verdict:
    found = [
        row
        for row in rows.checks
        if row["op"] == goal.op
        and row["what"] == goal.metric
        and row["case"] == goal.case
        and row["status"] in ("passed", "failed")
        and row["backend"] not in PLAIN_BACKENDS
    ]
    if not found:
        return Verdict(goal, goal.at_least, None, "", "not measured")
    passed = all(row["status"] == "passed" for row in found)
    backends = ", ".join(sorted({row["backend"] for row in found}))
    measured = 1.0 if passed else 0.0
    return Verdict(goal, goal.at_least, measured, backends, "met" if passed else "missed")


def judge_all(rows: Measurements, ops: Sequence[str]) -> list[Verdict]:
    """Compare every goal of ``ops`` with what was measured."""
    return [judge(goal, rows) for goal in GOALS if goal.op in ops]
