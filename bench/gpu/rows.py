"""What steps report: one JSON object a line, in a file that nothing else writes to.

Standard output is left to compilers and libraries; it goes to the step's log.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

VARIABLE = "PYEDITFAST_GPU_ROWS"
"""The environment variable that holds the path of the file."""

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "device": {"name": str, "description": dict, "versions": dict},
    "ceiling": {"name": str, "value": float, "unit": str},
    "begin": {"case": str},
    "check": {"op": str, "backend": str, "case": str, "what": str, "status": str, "detail": str},
    "test": {"case": str, "status": str, "detail": str},
    "timing": {
        "op": str,
        "case": str,
        "form": str,
        "role": str,
        "median_seconds": float,
        "quartiles_seconds": list,
        "rounds": int,
        "host_seconds": float,
        "flops": float,
        "unit": str,
        "bytes": float,
    },
    "editor": {"editor": str, "case": str, "form": str, "median_seconds": float, "detail": str},
    "tuned": {"op": str, "shape_class": str, "config": str, "median_seconds": dict},
    "fastest": {"op": str, "size_class": str, "backend": str, "median_seconds": dict},
    "note": {"status": str, "detail": str},
}
"""By kind of row, the fields that it must have and their types; it may have more."""

STATUSES = ("passed", "failed", "skipped", "not available")

ROLES = ("ours", "kernel only", "plain torch", "less exact", "bare", "published")


def emit(kind: str, **fields: Any) -> None:
    """Write a row and flush it, so that it outlives a crash."""
    row = {"kind": kind, **{name: _finite(value) for name, value in fields.items()}}
    problem = problem_of(row)
    if problem:
        raise ValueError(f"not a row: {problem}: {row}")
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Return ``value``, or None for a NaN or an infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows in a file, and what is wrong with its other lines."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    if not path.exists():
        return rows, problems
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line, parse_constant=_refuse)
        except ValueError:
            problems.append(f"a line is not JSON: {line[:80]!r}")
            continue
        problem = problem_of(row)
        if problem:
            problems.append(f"a row is wrong: {problem}: {line[:80]!r}")
        else:
            rows.append(row)
    return rows, problems


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def problem_of(row: Any) -> str | None:
    """Return what is wrong with a row, or None."""
    if not isinstance(row, dict):
        return "it is not an object"
    fields = FIELDS.get(str(row.get("kind")))
    if fields is None:
        return f"its kind is {row.get('kind')!r}"
    for name, wanted in fields.items():
        value = row.get(name)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, wanted):
            return f"{name} is {value!r}"
    if "status" in fields and row["status"] not in STATUSES:
        return f"status is {row['status']!r}"
    if "role" in fields and row["role"] not in ROLES:
        return f"role is {row['role']!r}"
    return None
