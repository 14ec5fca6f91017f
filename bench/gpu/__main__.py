"""``python -m bench.gpu``: check and time everything on this machine's GPU.

``--device cpu --size tiny`` goes through the same motions on a machine without one: tiny inputs,
Triton's interpreter, and a host clock whose times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu import interpreter, orchestrator, plan


def comma_separated(text: str) -> list[str]:
    """Return the parts of ``a,b,c``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main() -> int:
    """Choose a Python, run the plan in it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--size", choices=plan.SIZES, default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--venv", type=Path, help="a virtual environment to prefer, if it has CUDA")
    parser.add_argument("--ops", type=comma_separated, default=list(plan.OPS), help="a,b,c")
    parser.add_argument("--steps", type=comma_separated, default=list(plan.STEPS), help="a,b,c")
    parser.add_argument("--results", type=Path, help="where to write the result file")
    options = parser.parse_args()
    try:
        plan.plan(options.size, options.device, ops=options.ops, steps=options.steps)
    except ValueError as error:
        parser.error(str(error))
    python = sys.executable
    if options.device == "cuda":
        found, reason = interpreter.choose(interpreter.candidates(options.venv, python))
        print(f"bench.gpu: {reason}", file=sys.stdout if found else sys.stderr, flush=True)
        if found is None:
            return 2
        python = found.path
    return orchestrator.carry_out(
        python,
        size=options.size,
        device=options.device,
        ops=options.ops,
        steps=options.steps,
        results_folder=options.results,
        show=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
