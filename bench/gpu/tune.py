"""``python -m bench.gpu.tune``: find the fastest configurations and backends on this GPU.

Times what ``tunable()`` in each file of ``kernels/`` offers, and the backends of each op for which
``size_classes()`` in ``bench/gpu/cases`` lists sizes, and writes
``kernels/tuned_configs/<gpu>.json``, from which launchers and ops choose. Each op runs in a process
of its own; an op that fails keeps what the file said of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from bench.gpu import interpreter
from bench.gpu.orchestrator import describe, run_phases
from bench.gpu.places import BUILD, REPOSITORY, commit, step_environment
from bench.gpu.plan import Phase
from bench.gpu.process import Outcome, Step
from bench.gpu.results import slug

FOLDER = REPOSITORY / "kernels" / "tuned_configs"

LIMIT = 180.0

BACKENDS_LIMIT = 300.0

BUILD_LIMIT = 100.0


def tunable_ops() -> list[str]:
    """Return the kernels' files that define ``tunable``."""
    return _defining("tunable", REPOSITORY / "kernels")


def measured_ops() -> list[str]:
    """Return the ops whose backends are measured: those with ``size_classes``."""
    return _defining("size_classes", REPOSITORY / "bench" / "gpu" / "cases")


def _defining(function: str, folder: Path) -> list[str]:
    return [
        path.stem
        for path in sorted(folder.glob("*.py"))
        if f"\ndef {function}(" in path.read_text(encoding="utf-8")
    ]


def phases(ops: list[str], device: str, size: str) -> list[Phase]:
    """Return the plan: the device, what backends need, then op after op."""
    common = ("--device", device, "--size", size)

    def step(module: str, label: str, limit: float, *options: str, **more: Any) -> Step:
        return Step(label, ("-m", f"bench.gpu.{module}", *common, *options), limit, **more)

    configurations = [
        step("candidates", f"tune {op}", LIMIT, "--op", op) for op in ops if op in tunable_ops()
    ]
    backends = [
        step(
            *("fastest_backend", f"backends of {op}", BACKENDS_LIMIT, "--op", op),
            resumes=True,
            # A large class in float64, of which some GPUs have little.
            quiet=BACKENDS_LIMIT / 2,
        )
        for op in ops
        if op in measured_ops()
    ]
    build = [step("build", "build csrc", BUILD_LIMIT, "--if-missing")] if backends else []
    steps = (*configurations, *backends)
    built = 60 + sum(step.limit for step in build)
    found = [
        Phase("look", 60, (step("device", "device", 60),)),
        Phase("build", built, tuple(build)),
        Phase("tune", built + sum(step.limit for step in steps), steps),
    ]
    return [phase for phase in found if phase.steps]


def content_of(outcomes: list[Outcome], before: dict[str, Any]) -> dict[str, Any]:
    """Return the file's content: what was found, and ``before`` for the ops that failed.

    Of an op's backends, the classes that were measured before the step was cut off count too.
    """
    rows = [row for outcome in outcomes for row in outcome.rows]
    device = next(row for row in rows if row["kind"] == "device")
    known = before if before.get("gpu") == device["name"] else {}
    configurations: dict[str, Any] = dict(known.get("configurations", {}))
    backends: dict[str, Any] = dict(known.get("backends", {}))
    for outcome in outcomes:
        tuned = _entries(outcome, "tuned", "shape_class", "config")
        fastest = _entries(outcome, "fastest", "size_class", "backend")
        if outcome.status == "passed":
            configurations |= tuned
            backends |= fastest
        elif outcome.status == "cut off" and not _has_failed(outcome):
            for op, classes in fastest.items():
                backends[op] = {**backends.get(op, {}), **classes}
    return {
        "gpu": device["name"],
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "driver": device["description"].get("driver"),
        "versions": device["versions"],
        "configurations": configurations,
        "backends": backends,
    }


def _has_failed(outcome: Outcome) -> bool:
    return any(row.get("status") == "failed" for row in outcome.rows)


def _entries(outcome: Outcome, kind: str, of_class: str, chosen: str) -> dict[str, Any]:
    """Return what a step chose, by op and class."""
    found: dict[str, Any] = {}
    for row in outcome.rows:
        if row["kind"] == kind:
            entry = {name: row[name] for name in (chosen, "median_seconds")}
            found.setdefault(row["op"], {})[row[of_class]] = entry
    return found


def main() -> int:
    """Choose a Python, tune in it, write the file, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--venv", type=Path, help="a virtual environment to prefer, if it has CUDA")
    parser.add_argument("--ops", type=lambda text: text.split(","), help="a,b,c (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write the file")
    options = parser.parse_args()
    known = [*tunable_ops(), *measured_ops()]
    ops = options.ops or known
    unknown = sorted(set(ops) - set(known))
    if unknown:
        parser.error(f"nothing to tune in {unknown[0]!r}; choose from {', '.join(known)}")
    python = sys.executable
    if options.device == "cuda":
        found, reason = interpreter.choose(interpreter.candidates(options.venv, python))
        print(f"bench.gpu.tune: {reason}", file=sys.stdout if found else sys.stderr, flush=True)
        if found is None:
            return 2
        python = found.path
    # What is written for a CPU is no result, and must not be taken for one.
    folder = options.folder or (FOLDER if options.device == "cuda" else BUILD / "tuned_configs")
    outcomes = run_phases(
        phases(ops, options.device, options.size),
        python,
        step_environment(options.device),
        BUILD / "steps",
        lambda line: print(line, flush=True),
    )
    if not any(row["kind"] == "device" for outcome in outcomes for row in outcome.rows):
        return 1
    name = next(row["name"] for row in outcomes[0].rows if row["kind"] == "device")
    path = folder / f"{slug(name)}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = content_of(outcomes, before)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for section, key in (("configurations", "config"), ("backends", "backend")):
        for op, classes in content[section].items():
            for of_class, entry in classes.items():
                times = ", ".join(
                    f"{name} {1e6 * value:.0f} µs"
                    for name, value in entry["median_seconds"].items()
                )
                print(f"{op}, {of_class}: {entry[key]} ({times})")
    # Without nvcc there is no CUDA form to measure, and torch stays the choice.
    failed = [outcome for outcome in outcomes if outcome.status not in ("passed", "not available")]
    for outcome in failed:
        print(f"failed: {describe(outcome)}")
    print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
