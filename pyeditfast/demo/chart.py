"""The demonstration's picture: scores before and after on the left, seconds on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeditfast.demo.report import DemoResult

INCHES = (12.0, 4.5)
DOTS_PER_INCH = 120
BEFORE, OURS, THEIRS = "#c9ced6", "#2563eb", "#f0a03c"
PHASE = "#9dbcf5"
INK, MUTED = "#1f2933", "#67727e"


def require_matplotlib() -> None:
    """Raise ``ImportError`` with the remedy if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the demonstration draws with matplotlib: pip install pyeditfast[cli]"
        ) from error


def draw_chart(result: DemoResult, path: Path) -> None:
    """Draw ``result`` to the PNG file ``path``; raises ``ImportError`` without matplotlib."""
    require_matplotlib()
    # The object interface alone: pyplot would change the caller's figures and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.06)
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    _draw_scores(left, result)
    _draw_times(right, result)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _draw_scores(axes: Any, result: DemoResult) -> None:
    from pyeditfast.demo.report import SCORES

    series = list(zip(result.rows(), (BEFORE, OURS, THEIRS), strict=False))
    width = 0.8 / len(series)
    for number, ((name, scores, _), colour) in enumerate(series):
        middles = [i + (number - (len(series) - 1) / 2) * width for i in range(len(SCORES))]
        heights = [100 * (getattr(scores, key) or 0.0) for key in SCORES]
        bars = axes.bar(middles, heights, 0.92 * width, color=colour, label=name)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, color=INK)
    _bare(axes)
    axes.set_title(
        f"{result.facts} facts edited into a small Llama, in turns of {result.turn_size}",
        **_title(),
    )
    axes.set_xticks(range(len(SCORES)), [f"{what}\n({key})" for key, what in SCORES.items()])
    axes.set_yticks([])
    axes.set_ylim(0, 125)
    axes.set_ylabel("wanted answers, %", color=MUTED)
    axes.legend(loc="upper center", ncols=len(series), frameon=False, labelcolor=INK)


def _draw_times(axes: Any, result: DemoResult) -> None:
    phases = {name: spent for name, spent in result.report.seconds.items() if name != "total"}
    phases["the rest"] = max(0.0, result.seconds - sum(phases.values()))
    rows = [(name, spent, PHASE, "normal") for name, spent in phases.items()]
    for (name, _, spent), colour in zip(result.rows()[1:], (OURS, THEIRS), strict=False):
        rows.append((name, spent or 0.0, colour, "bold"))
    longest = max(spent for _, spent, _, _ in rows)
    for number, (_, spent, colour, weight) in enumerate(rows):
        place = _place(number, len(phases))
        axes.barh(place, spent, 0.72, color=colour)
        text = _duration(spent)
        if colour == OURS and result.speedup is not None:
            text += f"   {result.speedup:.1f} times as fast"
        axes.text(spent + 0.015 * longest, place, text, va="center", color=INK, fontweight=weight)
    _bare(axes)
    axes.set_title("Where the time goes, all edits", **_title())
    axes.set_yticks([_place(i, len(phases)) for i in range(len(rows))], [row[0] for row in rows])
    axes.set_xticks([])
    axes.set_xlim(0, 1.25 * longest)
    axes.invert_yaxis()


def _place(number: int, phases: int) -> float:
    """Return a row's height; a little room parts the phases from the totals."""
    return number if number < phases else number + 0.4


def _duration(seconds: float) -> str:
    value = 1e3 * seconds
    if value >= 1000:
        return f"{seconds:.2f} s"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def _title() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 13, "fontweight": "bold", "color": INK, "pad": 10}


def _bare(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(BEFORE)
    axes.tick_params(length=0, labelcolor=INK, labelsize=11)
