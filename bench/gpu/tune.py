"""``python -m bench.gpu.tune``: find the fastest configuration of every kernel on this GPU.

Times what ``tunable()`` in each file of ``kernels/`` offers and writes
``kernels/tuned_configs/<gpu>.json``, from which the launchers take their configurations. Each op
runs in a process of its own; an op that fails keeps what the file said of it.
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


def tunable_ops() -> list[str]:
    """Return the kernels' files that define ``tunable``."""
    files = sorted((REPOSITORY / "kernels").glob("*.py"))
    return [path.stem for path in files if "\ndef tunable(" in path.read_text(encoding="utf-8")]


def phases(ops: list[str], device: str, size: str) -> list[Phase]:
    """Return the plan: the device, then op after op."""
    common = ("--device", device, "--size", size)
    look = Step("device", ("-m", "bench.gpu.device", *common), 60)
    steps = [
        Step(f"tune {op}", ("-m", "bench.gpu.candidates", *common, "--op", op), LIMIT) for op in ops
    ]
    return [
        Phase("look", 60, (look,)),
        Phase("tune", 60 + LIMIT * len(ops), tuple(steps)),
    ]


def content_of(outcomes: list[Outcome], before: dict[str, Any]) -> dict[str, Any]:
    """Return the file's content: what was found, and ``before`` for the ops that failed."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    device = next(row for row in rows if row["kind"] == "device")
    known = before.get("configurations", {}) if before.get("gpu") == device["name"] else {}
    found: dict[str, Any] = dict(known)
    for outcome in outcomes:
        tuned = [row for row in outcome.rows if row["kind"] == "tuned"]
        if outcome.status == "passed" and tuned:
            found[tuned[0]["op"]] = {
                row["shape_class"]: {
                    "config": row["config"],
                    "median_seconds": row["median_seconds"],
                }
                for row in tuned
            }
    return {
        "gpu": device["name"],
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "driver": device["description"].get("driver"),
        "versions": device["versions"],
        "configurations": found,
    }


def main() -> int:
    """Choose a Python, tune in it, write the file, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--venv", type=Path, help="a virtual environment to prefer, if it has CUDA")
    parser.add_argument("--ops", type=lambda text: text.split(","), help="a,b,c (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write the file")
    options = parser.parse_args()
    ops = options.ops or tunable_ops()
    unknown = sorted(set(ops) - set(tunable_ops()))
    if unknown:
        parser.error(f"nothing to tune in {unknown[0]!r}; choose from {', '.join(tunable_ops())}")
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
    for op, classes in content["configurations"].items():
        for shape_class, entry in classes.items():
            times = ", ".join(
                f"{config} {1e6 * value:.0f} µs"
                for config, value in entry["median_seconds"].items()
            )
            print(f"{op}, {shape_class}: {entry['config']} ({times})")
    failed = [outcome for outcome in outcomes if outcome.status != "passed"]
    for outcome in failed:
        print(f"failed: {describe(outcome)}")
    print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
