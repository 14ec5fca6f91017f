"""What the demonstration of WISE found: as text, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyeditfast.demo.report import SCORES, Sample, percent, table
from pyeditfast.editors import EditReport, WiseConfig
from pyeditfast.editors.report import counted
from pyeditfast.evaluation import Scores
from pyeditfast.routing_plot import draw_routing


@dataclass(frozen=True)
class Serving:
    """Greedy generation with the side memory in place.

    ``answered``: the share of edited prompts that it answers with the new target. ``identical``:
    the share whose tokens are the same alone and in padded batches of ``batch``.
    """

    answered: float
    identical: float
    batch: int


@dataclass(frozen=True)
class WiseDemoResult:
    """What the demonstration did and found; ``str`` gives it as lines for a terminal.

    ``times``: seconds an edit takes by the published procedure and here, the reason why there is no
    comparison, or None where none was wanted. Files are in ``folder``.
    """

    seed: int
    facts: int
    config: WiseConfig
    before: Scores
    after: Scores
    report: EditReport
    thresholds: list[float]
    serving: Serving
    times: tuple[float, float] | str | None
    samples: list[Sample]
    threads: int
    folder: Path

    @property
    def picture(self) -> Path:
        """Return the path of the picture."""
        return self.folder / "report.png"

    def comparison(self) -> str:
        """Return in one sentence how long an edit takes by both procedures."""
        if not isinstance(self.times, tuple):
            return f"No comparison with the published procedure: {self.times or 'not wanted'}."
        published, ours = self.times
        return (
            f"An edit takes {ours:.2f} s, {published / ours:.1f} times less than by the published "
            f"procedure ({published:.2f} s)."
        )

    def served(self) -> str:
        """Return in one sentence what generation does."""
        return (
            f"Greedy generation answers {percent(self.serving.answered)} of the edited prompts "
            f"with the new target; {percent(self.serving.identical)} of the answers are the same "
            f"tokens alone and in padded batches of {self.serving.batch}."
        )

    def routed(self) -> str:
        """Return in one sentence where the router sends prompts."""
        routing = self.after.routing
        if routing is None:
            return "No prompt was routed."
        return (
            f"A side memory answers {percent(routing.efficacy)} of the edited prompts and "
            f"{percent(routing.generalization)} of their rephrasings; the main memory answers "
            f"{percent(routing.specificity)} of the untouched ones. Not routed: "
            f"{counted(len(self.report.not_routed), 'edit')}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "seed": self.seed,
            "facts": self.facts,
            "config": self.config.to_dict(),
            "threads": self.threads,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "report": self.report.to_dict(),
            "thresholds": self.thresholds,
            "serving": asdict(self.serving),
            "seconds_an_edit": self.times,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def rows(self) -> list[list[str]]:
        """Return the table of scores, a row for each state of the model."""
        return [
            [name, *(percent(getattr(scores, key)) for key in SCORES)]
            for name, scores in (("before editing", self.before), ("WISE", self.after))
        ]

    def __str__(self) -> str:
        lines = ["", " " * 20 + "".join(f"{label:>17}" for label in SCORES.values())]
        for name, *cells in self.rows():
            lines.append(f"{name:<20}" + "".join(f"{cell:>17}" for cell in cells))
        lines += ["", self.routed(), self.served(), self.comparison()]
        lines += ["", "What the model says before -> after:"]
        lines += [f"  {sample}" for sample in self.samples]
        lines += [
            "",
            f"Picture: {self.picture}",
            f"Report: {self.folder / 'report.md'}, {self.folder / 'report.json'}",
            f'Edited model: pyeditfast.load_model("{self.folder / "side-memories"}")',
        ]
        return "\n".join(lines)


def write_wise_report(result: WiseDemoResult) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png`` to the result's folder."""
    result.folder.mkdir(parents=True, exist_ok=True)
    (result.folder / "report.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    (result.folder / "report.md").write_text(_markdown(result))
    if result.after.routing is not None:
        draw_routing(result.after.routing, result.picture)


def _markdown(result: WiseDemoResult) -> str:
    config = result.config
    parts = [
        f"# {result.facts} facts edited into a side memory",
        "![Gaps of edited and untouched prompts, and the threshold](report.png)",
        table(["", *SCORES.values()], result.rows()),
        "Each score is the share of answer tokens that are the model's first choice, routed by the "
        "prompt alone.",
        result.routed(),
        result.served(),
        result.comparison(),
        "## Examples",
        table(
            ["prompt", "before", "after", "wanted"],
            [[s.prompt, s.before, s.after, s.target] for s in result.samples],
        ),
        "## Settings",
        f"WISE edits `{config.edit_module}` with {config.n_iter} steps an edit, lr "
        f"{config.edit_lr:g}, a mask of {config.mask_ratio:g}, margins {config.act_margin} and "
        f"thresholds at {config.act_ratio:g} of the smallest gap (threads: {result.threads}).",
    ]
    return "\n\n".join(parts) + "\n"
