"""Draws ``docs/benchmarks.md`` and ``docs/benchmarks.png`` from the newest CPU result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from record import BASELINES

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"


def newest() -> list[tuple[Path, dict[str, Any]]]:
    """Return the newest CPU result file, and the newest of each part that is no older, with their
    contents.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted((REPOSITORY / "bench" / "results").glob("cpu-*.json")):
        content = json.loads(path.read_text())
        found[path.stem.removesuffix(content["date"])] = (path, content)
    if "cpu-" not in found:
        raise SystemExit("no result file; run `make bench` first")
    whole = found["cpu-"][1]["date"]
    return [entry for name, entry in sorted(found.items()) if entry[1]["date"] >= whole]


def remarks(entry: dict[str, Any]) -> str:
    """Return the figures of an entry beside its time."""
    parts = []
    if "relative_error" in entry:
        parts.append(f"error {entry['relative_error']:.1e}")
    if "peak_bytes_beyond_inputs" in entry:
        parts.append(f"peak {entry['peak_bytes_beyond_inputs'] / 1e6:.0f} MB beyond the inputs")
    if "peak_matrices_beyond_the_model" in entry:
        matrices = entry["peak_matrices_beyond_the_model"]
        parts.append(f"peak {matrices} times the matrix beyond the model")
    if "relative_difference_of_change" in entry:
        difference = entry["relative_difference_of_change"]
        against = "the published change" if "WISE" in entry["group"] else "that in float64"
        parts.append(f"change differs from {against} by {difference:.1e}")
    if "tokens" in entry:
        parts.append(f"{entry['tokens'] / entry['median_seconds']:.0f} tokens/s")
    if "least_bytes" in entry:
        rate = entry["least_bytes"] / entry["median_seconds"]
        parts.append(f"{rate / 1e9:.1f} GB/s of {entry['least_bytes'] / 1e6:.0f} MB at the least")
    if entry.get("equal_to_the_reference"):
        parts.append("equal to the reference bit for bit")
    if entry.get("equal_to_torch"):
        parts.append("equal to torch bit for bit")
    return ", ".join(parts)


def page(files: list[tuple[Path, dict[str, Any]]]) -> str:
    """Return the Markdown page."""
    head = [
        "# Benchmarks",
        "",
        "Drawn by `bench/draw.py`; do not edit. The forms of a group were timed in the same run,",
        "the same way, on fresh random inputs; only the ratios carry over to another machine.",
        "No GPU has run this code yet.",
    ]
    return "\n".join(head) + "".join("\n\n" + table(path, content) for path, content in files)


def table(path: Path, content: dict[str, Any]) -> str:
    """Return the table of one result file."""
    baselines = [
        name
        for name in BASELINES
        if any(f"times_faster_than_{name}" in entry for entry in content["results"])
    ]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    lines = [
        f"From `{path.relative_to(REPOSITORY)}`: {content['date']}, commit {content['commit']}, "
        f"{content['cores']} cores of {content['cpu']}, {content['gpu']}; {versions}.",
        "",
        f"| what | form | median | quartiles | against {' or '.join(baselines)} | |",
        "|---|---|---|---|---|---|",
    ]
    for entry in content["results"]:
        low, high = entry["quartiles_seconds"]
        ratios = [
            f"{entry[key]:.1f}×" + ("" if name == BASELINES[0] else f" {name}")
            for name in baselines
            if (key := f"times_faster_than_{name}") in entry
        ]
        lines.append(
            f"| {entry['group']} | {entry['name']} | {entry['median_seconds']:.3g} s "
            f"| {low:.3g} to {high:.3g} s | {''.join(ratios)} | {remarks(entry)} |"
        )
    return "\n".join(lines) + "\n"


def picture(files: list[tuple[Path, dict[str, Any]]], target: Path) -> None:
    """Draw how many times faster than published each group is."""
    content = files[0][1]
    bars = [
        (entry["group"], entry["times_faster_than_published"])
        for _, part in files
        for entry in part["results"]
        if entry["name"] == "pyeditfast" and "times_faster_than_published" in entry
    ][::-1]
    figure = Figure(figsize=(9, 0.55 * len(bars) + 1.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # From 1, where both are as fast: what is slower reaches to the left.
    widths = [ratio - 1 for _, ratio in bars]
    axes.barh([name for name, _ in bars], widths, left=1, color="#3b6fb6", height=0.6)
    for place, (_, ratio) in enumerate(bars):
        axes.text(max(ratio, 1) * 1.03, place, f"{ratio:.1f}×", va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, *(ratio for _, ratio in bars)), 2 * max(ratio for _, ratio in bars))
    axes.set_xlabel("times faster than published (median, same run)")
    axes.set_title(f"{content['cores']} CPU cores, {content['date']}", loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def main() -> None:
    """Write both files."""
    files = newest()
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.md").write_text(page(files))
    picture(files, DOCS / "benchmarks.png")
    names = ", ".join(path.name for path, _ in files)
    print(f"wrote docs/benchmarks.md and docs/benchmarks.png from {names}")


if __name__ == "__main__":
    main()
