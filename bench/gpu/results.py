"""The result file of a run: everything that was found, in one JSON object."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.goals import Measurements, Verdict, ratio_to
from bench.gpu.process import Outcome

SCHEMA = 1
"""Grows when a reader of the file would have to change."""


def slug(gpu: str) -> str:
    """Return a GPU's name as it stands in file names."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def assemble(
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
    measurements: Measurements,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of the file; ``about``: date, commit, size and what was asked for."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    devices = [row for row in rows if row["kind"] == "device"]
    device = devices[0] if devices else {"name": "unknown", "description": {}, "versions": {}}
    return {
        "schema": SCHEMA,
        **about,
        "gpu": device["name"],
        "device": device["description"],
        "versions": device["versions"],
        "steps": [
            {
                "step": outcome.step,
                "status": outcome.status,
                "seconds": round(outcome.seconds, 1),
                "detail": outcome.detail,
            }
            for outcome in outcomes
        ],
        "ceilings": [_bare(row) for row in rows if row["kind"] == "ceiling"],
        "checks": [_bare(row) for row in rows if row["kind"] == "check"],
        "tests": summary_of_tests(rows),
        "timings": [_timing(row, measurements) for row in measurements.timings],
        "editors": [_bare(row) for row in rows if row["kind"] == "editor"],
        "goals": [verdict.to_dict() for verdict in verdicts],
        "failures": failures(outcomes),
    }


def summary_of_tests(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many tests passed, and which did not."""
    tests = [row for row in rows if row["kind"] == "test"]
    others = [_bare(row) for row in tests if row["status"] in ("failed", "not available")]
    return {"counts": dict(Counter(row["status"] for row in tests)), "others": others}


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence for everything that failed or was cut off."""
    found = []
    for outcome in outcomes:
        details = [
            f"{_place(row)}: {row['detail']}"
            for row in outcome.rows
            if row.get("status") == "failed"
        ]
        found += [f"{outcome.step}: {detail}" for detail in details]
        if outcome.status == "cut off" or (outcome.status == "failed" and not details):
            found.append(f"{outcome.step}: {outcome.status}, {outcome.detail}")
    return found


def _place(row: dict[str, Any]) -> str:
    if row["kind"] != "check":
        return str(row.get("case", row["kind"]))
    backend = f" ({row['backend']})" if row["backend"] else ""
    return f"{row['op']}{backend}, {row['case']}, {row['what']}"


def _timing(row: dict[str, Any], measurements: Measurements) -> dict[str, Any]:
    entry = _bare(row)
    floor = measurements.floor(row)
    if floor is not None:
        entry["floor_seconds"], entry["bound"] = floor
        entry["of_floor"] = floor[0] / row["median_seconds"]
    if row["role"] == "ours":
        for role in ("published", "plain torch"):
            ratio = ratio_to(role)(measurements, row)
            if ratio is not None:
                entry[f"times_faster_than_{role.replace(' ', '_')}"] = ratio[0]
    return entry


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "kind"}


def write(content: dict[str, Any], folder: Path, name: str) -> Path:
    """Write the file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{content['date']}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
