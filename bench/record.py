"""Turns pytest-benchmark's JSON into a result file under ``bench/results``.

``python bench/record.py [--part NAME] REPORT.json [MORE.json ...]`` keeps medians and spreads, the
ratio of each group's baseline (the form called published, else the one called torch) to the
others, the commit, the machine and the versions; nothing else. A run of some suites alone is a
part, in a file of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BASELINES = ("published", "torch")
RESULTS = Path(__file__).resolve().parent / "results"


def commit() -> str:
    """Return the commit of the working tree, marked where it has changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """Return the result file's content for a pytest-benchmark report."""
    entries = []
    for run in report["benchmarks"]:
        stats = run["stats"]
        entries.append(
            {
                "group": run["group"],
                "name": run["name"],
                "median_seconds": stats["median"],
                "quartiles_seconds": [stats["q1"], stats["q3"]],
                "rounds": stats["rounds"],
                **run["extra_info"],
            }
        )
    medians = {(entry["group"], entry["name"]): entry["median_seconds"] for entry in entries}
    for entry in entries:
        group = entry["group"]
        baseline = next((name for name in BASELINES if (group, name) in medians), None)
        if baseline not in (None, entry["name"]):
            ratio = medians[group, baseline] / entry["median_seconds"]
            entry[f"times_faster_than_{baseline}"] = round(ratio, 2)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    return {
        "date": report["datetime"][:10],
        "commit": commit(),
        "cpu": report["machine_info"]["cpu"].get("brand_raw", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": device,
        "versions": {
            name: version(name) for name in ("pyeditfast", "torch", "transformers", "numpy")
        },
        "results": entries,
    }


def main(paths: list[str], part: str | None = None) -> None:
    """Write one result file for the reports at ``paths`` and print its ratios.

    A group that a later report has again is taken from there, whole.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        report = json.loads(Path(path).read_text())
        groups.update({run["group"]: [] for run in report["benchmarks"]})
        for run in report["benchmarks"]:
            groups[run["group"]].append(run)
    content = summarise({**report, "benchmarks": [run for runs in groups.values() for run in runs]})
    kind = "cpu" if content["gpu"] == "CPU only" else content["gpu"].lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    name = f"{kind}-{part}" if part else kind
    target = RESULTS / f"{name}-{content['date']}.json"
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for entry in content["results"]:
        ratios = [
            f" | {entry[key]:.1f} times faster than {name}"
            for name in BASELINES
            if (key := f"times_faster_than_{name}") in entry
        ]
        print(
            f"{entry['group']} | {entry['name']} | median {entry['median_seconds']:.3g} s"
            + "".join(ratios)
        )
    print(f"wrote {target.relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part")
    parser.add_argument("reports", nargs="+")
    arguments = parser.parse_args()
    main(arguments.reports, arguments.part)
