"""Which steps there are, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.places import REPOSITORY
from bench.gpu.process import Step

OPS = (
    "gram",
    "apply_shift",
    "solve_shift",
    "routed_linear",
    "masked_sgd",
    "activation_gap",
    "cholesky_solve",
    "magnitude_threshold",
    "ties_merge",
    "covariance",
    "running_moments",
    "edit_values",
    "random_mask",
)
"""The ops by the weight of their goals: where time runs short, the last ones are cut off."""

TIMED_TOGETHER = (
    ("gram", "apply_shift", "solve_shift"),
    ("routed_linear", "masked_sgd", "activation_gap"),
    ("cholesky_solve", "magnitude_threshold", "ties_merge"),
    ("covariance", "running_moments", "edit_values", "random_mask"),
)
"""The ops that one process times: starting one takes as long as timing a case."""

STEPS = ("device", "build", "correctness", "tests", "sanitizer", "ceilings", "timing", "editors")
"""What ``--steps`` chooses from."""

SIZES = ("tiny", "small", "full")


@dataclass(frozen=True)
class Phase:
    """Steps that may run beside each other, over by ``deadline`` seconds after the start."""

    name: str
    deadline: float
    steps: tuple[Step, ...]
    beside: int = 1


def plan(
    size: str,
    device: str,
    *,
    ops: Sequence[str] = OPS,
    steps: Sequence[str] = STEPS,
    workers: int = 1,
) -> list[Phase]:
    """Return the phases of a run; times are measured in the last one, where nothing runs beside."""
    for name, given, known in (("op", ops, OPS), ("step", steps, STEPS)):
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"unknown {name} {unknown[0]!r}; choose from {', '.join(known)}")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    build = {"full": _full, "small": _small, "tiny": _tiny}[size]
    phases = build(_Maker(size, device), ops, workers)
    kept = []
    for phase in phases:
        members = tuple(step for step in phase.steps if step.name.split()[0] in steps)
        if members:
            kept.append(Phase(phase.name, phase.deadline, members, phase.beside))
    return kept


@dataclass(frozen=True)
class _Maker:
    size: str
    device: str

    def module(self, name: str, label: str, limit: float, *options: str) -> Step:
        arguments = ("-m", f"bench.gpu.{name}", "--device", self.device, "--size", self.size)
        resumes = name in ("correctness", "timing")
        return Step(label, (*arguments, *options), limit, resumes)

    def of_ops(self, name: str, ops: Sequence[str], limit: float) -> Step:
        label = f"{name} {ops[0]}" if len(ops) == 1 else f"{name} of {len(ops)} ops, {ops[0]} first"
        return self.module(name, label, limit, "--ops", ",".join(ops))


def _full(make: _Maker, ops: Sequence[str], workers: int) -> list[Phase]:
    groups = [tuple(op for op in group if op in ops) for group in TIMED_TOGETHER]
    timing = [make.of_ops("timing", group, 110) for group in groups if group]
    checks = [
        *(make.of_ops("correctness", (op,), 120) for op in ops),
        *tests(150),
        *(
            make.module("sanitizer", f"sanitizer {tool}", 150, "--tool", tool)
            for tool in SANITIZERS
        ),
    ]
    times = [
        make.module("ceilings", "ceilings", 25),
        *timing[:2],
        make.module("editors", "editors", 60),
        *timing[2:],
        make.module("ceilings", "ceilings again", 20),
    ]
    return [
        Phase("look", 60, (make.module("device", "device", 60),)),
        Phase("build", 160, (make.module("build", "build csrc", 100),)),
        Phase("check", 290, tuple(checks), workers),
        Phase("time", 460, tuple(times)),
    ]


def _small(make: _Maker, ops: Sequence[str], workers: int) -> list[Phase]:
    shares = [tuple(ops[number::4]) for number in range(4)]
    checks = [make.of_ops("correctness", share, 40) for share in shares if share]
    times = [
        make.module("ceilings", "ceilings", 10),
        make.of_ops("timing", ops, 25),
        make.module("editors", "editors", 20),
    ]
    return [
        Phase("look", 15, (make.module("device", "device", 15),)),
        Phase("build", 30, (make.module("build", "build csrc", 20, "--if-missing"),)),
        Phase("check", 60, tuple(checks), workers),
        Phase("time", 90, tuple(times)),
    ]


def _tiny(make: _Maker, ops: Sequence[str], workers: int) -> list[Phase]:
    quick = Step("tests of one file", (*PYTEST, str(Path("tests", "test_phases.py"))), 60)
    return [
        Phase("look", 60, (make.module("device", "device", 60),)),
        Phase("build", 120, (make.module("build", "build csrc", 60, "--if-missing"),)),
        Phase("check", 420, (make.of_ops("correctness", ops, 300), quick), workers),
        Phase(
            "time",
            900,
            (
                make.module("ceilings", "ceilings", 60),
                make.of_ops("timing", ops, 300),
                make.module("editors", "editors", 120),
            ),
        ),
    ]


SANITIZERS = ("memcheck", "racecheck")

PYTEST = (
    *("-m", "pytest", "-q", "-p", "bench.gpu.pytest_rows", "-p", "no:cacheprovider"),
    *("--maxfail=10", "--continue-on-collection-errors"),
    *("--deselect", "tests/test_cli.py::test_the_command_is_installed"),
)
"""Ten failures, not one: what a run on a rented GPU leaves unsaid costs another run. Nothing is
installed here, so nothing else is left out.
"""


def tests(limit: float, folder: Path = REPOSITORY / "tests") -> list[Step]:
    """Return the test suite as steps: a process for each kernel's file and for every folder."""
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        name = path.relative_to(folder.parent)
        group = str(name) if path.parent.name == "kernels" else str(name.parent)
        groups.setdefault(group, []).append(str(name))
    return [Step(f"tests of {group}", (*PYTEST, *files), limit) for group, files in groups.items()]
