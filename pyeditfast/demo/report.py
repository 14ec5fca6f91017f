"""What the demonstration found: as text for the terminal, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyeditfast.demo.chart import draw_chart
from pyeditfast.demo.world import WorldSettings
from pyeditfast.editors import EditReport, UltraEditConfig
from pyeditfast.evaluation import Scores

SCORES = {
    "efficacy": "edited facts",
    "generalization": "other phrasings",
    "specificity": "untouched facts",
}
"""The scores shown, and what each is measured on."""


@dataclass(frozen=True)
class Sample:
    """An edited fact and what greedy generation makes of its prompt before and after."""

    prompt: str
    target: str
    before: str
    after: str

    def __str__(self) -> str:
        missed = "" if self.after == self.target else f' (wanted "{self.target}")'
        return f'{self.prompt}: "{self.before}" -> "{self.after}"{missed}'


@dataclass(frozen=True)
class Published:
    """The published procedure on the same edits.

    ``seconds`` is the median of its runs. ``largest_difference`` is that of an edited weight after
    its run and after ours; ``relative_difference`` the Frobenius norm of all these differences over
    that of its change.
    """

    scores: Scores
    seconds: float
    largest_difference: float
    relative_difference: float


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration did and found; ``str`` gives it as lines for a terminal.

    ``training`` is the record of the trained model. ``report`` is that of the run with the median
    time. ``published`` is the published procedure's outcome or the reason why there is none. Files
    are in ``folder``.
    """

    seed: int
    facts: int
    turn_size: int
    world: WorldSettings
    world_facts: int
    training: dict[str, Any]
    config: UltraEditConfig
    before: Scores
    after: Scores
    report: EditReport
    published: Published | str | None
    samples: list[Sample]
    threads: int
    folder: Path

    @property
    def seconds(self) -> float:
        """Return the seconds that all edits took."""
        return self.report.seconds["total"]

    @property
    def speedup(self) -> float | None:
        """Return the published procedure's seconds over ours, None without it."""
        if not isinstance(self.published, Published):
            return None
        return self.published.seconds / self.seconds

    @property
    def picture(self) -> Path:
        """Return the path of the picture."""
        return self.folder / "report.png"

    @property
    def edited_model(self) -> Path:
        """Return the folder of the edited model and its tokenizer."""
        return self.folder / "edited-model"

    def rows(self) -> list[tuple[str, Scores, float | None]]:
        """Return name, scores and seconds of each state of the model."""
        rows: list[tuple[str, Scores, float | None]] = [
            ("before editing", self.before, None),
            ("pyeditfast", self.after, self.seconds),
        ]
        if isinstance(self.published, Published):
            rows.append(("published procedure", self.published.scores, self.published.seconds))
        return rows

    def comparison(self) -> str:
        """Return in one sentence how the two procedures compare, or why they cannot be compared."""
        if not isinstance(self.published, Published):
            return f"No comparison with the published procedure: {self.published}."
        return (
            f"{self.speedup:.1f} times as fast as the published procedure. The edited weights "
            f"differ by {self.published.largest_difference:.1e} at most, and the change by "
            f"{self.published.relative_difference:.1e} of its Frobenius norm."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "seed": self.seed,
            "facts": self.facts,
            "turn_size": self.turn_size,
            "world": {**asdict(self.world), "facts": self.world_facts},
            "training": self.training,
            "config": self.config.to_dict(),
            "threads": self.threads,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "seconds": self.report.seconds,
            "edits_per_second": self.report.edits_per_second,
            "peak_memory_bytes": self.report.peak_memory_bytes,
            "published": asdict(self.published)
            if isinstance(self.published, Published)
            else {"missing": self.published},
            "speedup": self.speedup,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.facts} facts edited in turns of {self.turn_size}, "
            f"{self.report.edits_per_second:.0f} a second",
            "",
            f"{'':20}" + "".join(f"{name:>17}" for name in SCORES.values()) + f"{'time':>10}",
        ]
        for name, scores, seconds in self.rows():
            time = f"{1e3 * seconds:.0f} ms" if seconds is not None else ""
            lines.append(
                f"{name:20}"
                + "".join(f"{percent(getattr(scores, key)):>17}" for key in SCORES)
                + f"{time:>10}"
            )
        lines += ["", self.comparison(), "", "What the model says before -> after:"]
        lines += [f"  {sample}" for sample in self.samples]
        lines += [
            "",
            f"Picture: {self.picture}",
            f"Report: {self.folder / 'report.md'}, {self.folder / 'report.json'}",
            f'Edited model: AutoModelForCausalLM.from_pretrained("{self.edited_model}")',
        ]
        return "\n".join(lines)


def write_report(result: DemoResult) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png`` to the result's folder."""
    result.folder.mkdir(parents=True, exist_ok=True)
    (result.folder / "report.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    (result.folder / "report.md").write_text(markdown(result))
    draw_chart(result, result.picture)


def markdown(result: DemoResult) -> str:
    """Return the report as Markdown."""
    config, training, world = result.config, result.training, result.world
    modules = ", ".join(f"`{name}`" for name in config.edit_modules or ())
    phases = [
        [name, f"{1e3 * seconds:.1f} ms"]
        for name, seconds in sorted(result.report.seconds.items(), key=lambda item: -item[1])
    ]
    parts = [
        f"# {result.facts} facts edited into a small model",
        "![Scores before and after, and where the time goes](report.png)",
        table(
            ["", *SCORES.values(), "time"],
            [
                [
                    name,
                    *(percent(getattr(scores, key)) for key in SCORES),
                    f"{1e3 * seconds:.0f} ms" if seconds is not None else "",
                ]
                for name, scores, seconds in result.rows()
            ],
        ),
        "Each score is the share of answer tokens that are the model's first choice: of the edited "
        "facts in the phrasing that was edited (efficacy), of the same facts in another phrasing "
        "(generalization), and of facts about subjects that no edit touched, against their true "
        "answers (specificity). Before editing the wanted answers do not score zero: the later "
        "tokens of a long answer follow from its first.",
        result.comparison(),
        "## Where the time goes",
        table(["phase", "time"], phases),
        "## Examples",
        table(
            ["prompt", "before", "after", "wanted"],
            [[s.prompt, s.before, s.after, s.target] for s in result.samples],
        ),
        "## Settings",
        f"World of seed {result.seed}: {world.people} people, {world.places} places and "
        f"{world.companies} companies, {result.world_facts} facts in {world.phrasings} phrasings "
        f"each. The model has {training['parameters']:,} parameters and was trained for "
        f"{len(training['losses'])} passes over {training['statements']:,} sentences in "
        f"{training['seconds']:.0f} s, to a loss of {training['losses'][-1]:.4f}.",
        f"UltraEdit edits {modules} with lr {config.lr:g}, ridge {config.ridge:g}, micro-batches "
        f"of {config.micro_batch} and the {config.variance} variance, in turns of "
        f"{result.turn_size} (threads: {result.threads}). Times are medians of runs on fresh "
        "copies of the model, after a warm-up turn.",
    ]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(score: float | None) -> str:
    """Return a share as text, a dash for None."""
    return "-" if score is None else f"{100 * score:.1f} %"
