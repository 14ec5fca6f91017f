"""The picture of the routes: what it shows, and that no routing makes it fail."""

from __future__ import annotations

import math
import sys
import warnings

import pytest

from pyeditfast.routing_plot import draw_routing
from pyeditfast.routing_scores import RoutingScores

pytest.importorskip("matplotlib")


def scores(gaps, thresholds=(2.0,), memories=None, shares=None) -> RoutingScores:
    shares = shares or {}
    return RoutingScores(
        **{kind: shares.get(kind, 0.5) for kind in gaps},
        counts={kind: len(row) for kind, row in gaps.items()},
        thresholds=thresholds,
        gaps=gaps,
        memories=memories or {kind: [0] * len(row) for kind, row in gaps.items()},
    )


def drawn(monkeypatch, path, routing):
    """Draw ``routing`` and return the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = []
    original = FigureCanvasAgg.print_png

    def print_png(self, *arguments, **options):
        figures.append(self.figure)
        return original(self, *arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_routing(routing, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def bars(axes) -> list[tuple[float, float, float]]:
    """Return left edge, right edge and height of each bar that is there."""
    from matplotlib.patches import Rectangle

    found = []
    for bar in axes.containers[0]:
        assert isinstance(bar, Rectangle)
        if bar.get_height():
            found.append((bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()))
    return found


def test_rows_bars_and_legend(monkeypatch, tmp_path):
    gaps = {
        "efficacy": [3.0, 2.1, 9.0, 1.9],
        "specificity": [0.1, 0.2, 2.05],
        "generalization": [4.0, 0.5],
    }
    shares = {"efficacy": 0.75, "generalization": 0.5, "specificity": 2 / 3}
    figure = drawn(monkeypatch, tmp_path / "gaps.png", scores(gaps, shares=shares))
    assert len(figure.axes) == 3
    # From top to bottom: edit prompts, rephrasings, locality prompts.
    for axes, kind in zip(figure.axes, ("efficacy", "generalization", "specificity"), strict=True):
        assert axes.get_xscale() == "log"
        assert axes.get_ylabel() == "prompts"
        assert sum(height for _, _, height in bars(axes)) == len(gaps[kind])
        above = sum(height for left, _, height in bars(axes) if left >= 2.0 * (1 - 1e-9))
        assert above == sum(gap > 2.0 for gap in gaps[kind])
        # No bar lies on both sides of the threshold.
        for left, right, _ in bars(axes):
            assert left >= 2.0 * (1 - 1e-9) or right <= 2.0 * (1 + 1e-9)
        assert list(axes.lines[0].get_xdata()) == [2.0, 2.0]
    assert figure.axes[-1].get_xlabel() == "activation gap"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "edit prompts: 75.0 % of 4 to a side memory",
        "rephrasings: 50.0 % of 2 to a side memory",
        "locality prompts: 33.3 % of 3 to a side memory",
        "threshold 2",
    ]


def test_several_memories_share_one_axis(monkeypatch, tmp_path):
    gaps = {"efficacy": [3.0, 30.0, 5.0]}
    routing = scores(gaps, (2.0, 20.0), {"efficacy": [0, 1, 1]})
    figure = drawn(monkeypatch, tmp_path / "gaps.png", routing)
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == [1.0, 1.0]
    low, high = sorted(bars(axes))
    assert low[0] <= 0.25 <= low[1] and low[2] == 1
    assert high[0] <= 1.5 <= high[1] and high[2] == 2
    assert "threshold" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("gaps", "threshold"),
    [
        ([1.0], 1.0),
        ([0.0, 0.0, 3.0], 2.0),
        ([1e-12, 1e6], 1e-3),
        ([3.0, 3.1], 2.9),
        ([1.0, 2.0], 0.0),
        ([1.0, 2.0], math.inf),
        ([1.0, math.inf, math.nan], 0.5),
        ([0.0], 3.0),
    ],
)
def test_strange_gaps_are_drawn(monkeypatch, tmp_path, gaps, threshold):
    routing = scores({"efficacy": gaps, "specificity": gaps}, (threshold,))
    figure = drawn(monkeypatch, tmp_path / "gaps.png", routing)
    numbers = [gap for gap in gaps if not math.isnan(gap)]
    for axes in figure.axes:
        assert sum(height for _, _, height in bars(axes)) == len(numbers)
    assert ("left edge" in figure.axes[-1].get_xlabel()) == (0.0 in gaps)


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no gap is a finite number above 0"):
        draw_routing(scores({"efficacy": [0.0]}, (0.0,)), tmp_path / "gaps.png")


def test_a_missing_matplotlib_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install pyeditfast\[cli\]"):
        draw_routing(scores({"efficacy": [1.0]}), tmp_path / "gaps.png")
