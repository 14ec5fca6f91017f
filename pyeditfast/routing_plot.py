"""The picture of a router's decisions: gaps of edited and unrelated prompts, and the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyeditfast.routing_scores import ANSWERED_BY_MAIN, RoutingScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

LABELS = {
    "efficacy": "edit prompts",
    "generalization": "rephrasings",
    "portability": "portability prompts",
    "specificity": "locality prompts",
}
"""The kinds of prompts, from top to bottom, and what the picture calls them."""

COLOURS = {
    "efficacy": "#2563eb",
    "generalization": "#7aa7f7",
    "portability": "#9a7fe0",
    "specificity": "#f0a03c",
}
INK, MUTED, RULE, SIDE = "#1f2933", "#67727e", "#c9ced6", "#eef3fe"
WIDTH, HEAD, ROW = 9.0, 2.0, 1.2
"""Inches: the picture's width, what surrounds the rows, and a row."""
DOTS_PER_INCH = 120
BINS = 60
NAMED_SHARE = 0.25
"""Part of the axis on either side of the threshold that is kept for the name of that side."""


def require_matplotlib() -> None:
    """Raise ``ImportError`` with the remedy if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install pyeditfast[cli]") from error


def draw_routing(routing: RoutingScores, path: Path) -> None:
    """Draw the gaps of ``routing`` and the threshold to the PNG file ``path``.

    One histogram for each kind of prompt, over a logarithmic axis. With several side memories, each
    with a threshold of its own, the axis has each gap over its threshold. Raises ``ImportError``
    without matplotlib and ``ValueError`` where no gap is a finite number above 0.
    """
    require_matplotlib()
    # The object interface alone: pyplot would change the caller's figures and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    alone = len(routing.thresholds) == 1
    gaps = {
        kind: routing.gaps[kind] if alone else routing.relative_gaps(kind)
        for kind in LABELS
        if kind in routing.gaps
    }
    threshold = routing.thresholds[0] if alone else 1.0
    edges = _edges([value for row in gaps.values() for value in row], threshold)
    figure = Figure(
        figsize=(WIDTH, HEAD + ROW * len(gaps)),
        dpi=DOTS_PER_INCH,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    rows = figure.subplots(len(gaps), 1, sharex=True, squeeze=False)[:, 0]
    handles = []
    for axes, (kind, row) in zip(rows, gaps.items(), strict=True):
        held = [min(max(value, edges[0]), edges[-1]) for value in row if not math.isnan(value)]
        axes.hist(held, bins=edges, color=COLOURS[kind])
        line = _dress(axes, threshold, edges)
        handles.append(Patch(color=COLOURS[kind], label=_told(routing, kind)))
    line.set_label(
        f"threshold {threshold:.3g}"
        if alone
        else f"threshold of each of the {len(routing.thresholds)} side memories"
    )
    _name_sides(rows[0])
    rows[-1].set_xlabel(_axis_name(alone, gaps), color=MUTED, labelpad=6)
    figure.align_ylabels(rows)
    figure.suptitle("Which prompts a side memory answers", **_title())
    figure.legend(
        handles=[*handles, line],
        loc="outside lower center",
        ncols=2,
        columnspacing=3,
        frameon=False,
        labelcolor=INK,
    )
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _edges(gaps: Sequence[float], threshold: float) -> list[float]:
    """Return the borders of the bins, equally wide in the logarithm.

    Either side of the threshold has room for its name.
    """
    drawn = [value for value in (*gaps, threshold) if 0 < value < math.inf]
    if not drawn:
        raise ValueError("no gap is a finite number above 0; there is nothing to draw")
    low, high = math.log(min(drawn) / 1.1), math.log(max(drawn) * 1.1)
    if not 0 < threshold < math.inf:
        return [math.exp(low + (high - low) * number / BINS) for number in range(BINS + 1)]
    centre, room = math.log(threshold), NAMED_SHARE * (high - low) / (1 - NAMED_SHARE)
    low, high = min(low, centre - room), max(high, centre + room)
    width = (high - low) / BINS
    below, above = math.ceil((centre - low) / width), math.ceil((high - centre) / width)
    # No bar may lie on both sides.
    return [threshold * math.exp(number * width) for number in range(-below, above + 1)]


def _dress(axes: Axes, threshold: float, edges: Sequence[float]) -> Line2D:
    """Set up a row's axes and return the line at the threshold."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ratio = edges[-1] / edges[0]
    # A threshold of 0 or infinity is an edge of the picture.
    place = min(max(threshold, edges[0]), edges[-1])
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    if ratio < 5:
        axes.xaxis.set_major_locator(MaxNLocator(7))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 2000 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.set_ylabel("prompts", color=MUTED)
    axes.tick_params(length=0, pad=6, labelcolor=INK)
    axes.axvspan(place, edges[-1], color=SIDE, zorder=0, linewidth=0)
    return axes.axvline(place, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))


def _name_sides(axes: Axes) -> None:
    options: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom", "color": MUTED}
    axes.text(0.0, 1.04, "the main memory answers", ha="left", **options)
    axes.text(1.0, 1.04, "a side memory answers", ha="right", **options)


def _told(routing: RoutingScores, kind: str) -> str:
    share: float = getattr(routing, kind)
    answered = 1.0 - share if kind == ANSWERED_BY_MAIN else share
    return f"{LABELS[kind]}: {100 * answered:.1f} % of {routing.counts[kind]:,} to a side memory"


def _axis_name(alone: bool, gaps: dict[str, list[float]]) -> str:
    name = "activation gap" if alone else "activation gap / threshold of the side memory"
    if any(value <= 0 for row in gaps.values() for value in row):
        name += " (gaps of 0 at the left edge)"
    return name


def _title() -> dict[str, Any]:
    return {"x": 0.02, "ha": "left", "fontsize": 13, "fontweight": "bold", "color": INK}
