"""The demonstration of UltraEdit: facts of an invented world, edited into a small model."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pyeditfast.data.edit import Edit
from pyeditfast.demo.chart import require_matplotlib
from pyeditfast.demo.report import DemoResult, Published, Sample, write_report
from pyeditfast.demo.training import (
    TrainingSettings,
    cached_folder,
    trained_model,
    training_record,
)
from pyeditfast.demo.world import World, WorldSettings
from pyeditfast.editors import EditReport, UltraEditConfig, UltraEditor
from pyeditfast.evaluation import evaluate

LR = 3.5e-3
"""UltraEdit's lr for this model; the published 1e-6 is for models a thousand times larger."""

REPEATS = 5
"""Timed runs of each procedure, in turns, on fresh copies of the model; the median counts."""


def run_demo(
    out: Path,
    *,
    facts: int = 100,
    turn_size: int = 25,
    seed: int = 0,
    cache: Path | None = None,
    published: bool = True,
    world: WorldSettings | None = None,
    training: TrainingSettings | None = None,
    print_line: Callable[[str], None] = print,
) -> DemoResult:
    """Train a small model on an invented world, edit some of its facts, and report.

    ``facts`` are edited in turns of ``turn_size``. ``seed`` makes the world, the model and the
    choice of edits. ``cache`` keeps the trained model, by default in ``out/model``. With
    ``published`` the published procedure edits the same facts into a copy of the same model, for
    its scores, its time and the difference of the weights. Writes ``report.png``, ``report.md``,
    ``report.json``, ``edited-model``, and for trying more, ``base-model`` and ``edits.json`` to
    ``out``. Raises ``ValueError`` if the world has too few facts and ``ImportError`` without
    matplotlib.
    """
    require_matplotlib()
    place = World(seed, world)
    edits = place.edits(facts)
    if turn_size < 1:
        raise ValueError(f"turn_size is {turn_size}; at least 1 is needed")
    cache = cache if cache is not None else out / "model"
    training = training if training is not None else TrainingSettings()
    size = place.settings
    print_line(
        f"An invented world: {size.people} people, {size.places} places, {size.companies} "
        f"companies, {len(place.facts)} facts in {size.phrasings} phrasings each"
    )
    with transformers_bars_hidden():
        model, tokenizer = trained_model(
            cache, seed, world=place, training=training, print_line=print_line
        )
        record = training_record(cached_folder(cache, seed, place, training))
        config = demo_config(model, turn_size)
        before = evaluate(model, tokenizer, edits)
        contest = _Contest(model, tokenizer, edits, config, with_published=published)
        beside = "" if contest.missing else ", beside the published procedure"
        print_line(f"Editing {facts} of them in turns of {turn_size}{beside}")
        contest.run()
        editor = contest.editor
        after = evaluate(editor.model, tokenizer, edits)
        outcome: Published | str | None = contest.missing
        if contest.theirs is not None:
            scores = evaluate(contest.theirs, tokenizer, edits)
            seconds = statistics.median(contest.their_seconds)
            outcome = Published(scores, seconds, *contest.difference())

        told = _samples(model, editor.model, tokenizer, first_of_each_kind(place, edits))
        out.mkdir(parents=True, exist_ok=True)
        editor.save(out / "edited-model")
        model.save_pretrained(out / "base-model")
        tokenizer.save_pretrained(out / "base-model")
    (out / "edits.json").write_text(json.dumps([asdict(edit) for edit in edits], indent=1) + "\n")
    result = DemoResult(
        seed=seed,
        facts=facts,
        turn_size=turn_size,
        world=place.settings,
        world_facts=len(place.facts),
        training=record,
        config=config,
        before=before,
        after=after,
        report=contest.median_report(),
        published=outcome,
        samples=told,
        threads=torch.get_num_threads(),
        folder=out,
    )
    write_report(result)
    return result


def demo_config(model: PreTrainedModel, turn_size: int) -> UltraEditConfig:
    """Return UltraEdit's settings for a trained model of this demonstration.

    The last down projection: there the keys of a fact's phrasings are most alike. ``variance`` is
    the published one, so that the weights can be compared with those of the published procedure.
    """
    last = model.config.num_hidden_layers - 1
    return UltraEditConfig(
        edit_modules=[f"model.layers.{last}.mlp.down_proj"],
        lr=LR,
        turn_size=turn_size,
        variance="published",
    )


class _Contest:
    """Both procedures on the same edits, timed in turns on fresh copies after a warm-up."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        config: UltraEditConfig,
        *,
        with_published: bool,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.edits = edits
        self.config = config
        self.missing: str | None = None if with_published else "it was left out on request"
        self.reports: list[EditReport] = []
        self.their_seconds: list[float] = []
        self.theirs: PreTrainedModel | None = None
        self.editor: UltraEditor
        if with_published:
            try:
                import pyeditfast_published.ultraedit  # noqa: F401
            except ImportError as error:
                self.missing = f"it cannot be imported ({error}); it comes with the source"

    def run(self) -> None:
        """Edit ``REPEATS`` times with each procedure and keep the last models."""
        warm_up = self.edits[: self.config.turn_size]
        self._edit(warm_up)
        if self.missing is None:
            self._edit_as_published(warm_up)
        for _ in range(REPEATS):
            self.editor, report = self._edit(self.edits)
            self.reports.append(report)
            if self.missing is None:
                self.theirs, seconds = self._edit_as_published(self.edits)
                self.their_seconds.append(seconds)

    def median_report(self) -> EditReport:
        """Return the report of the run that took the median time."""
        return sorted(self.reports, key=lambda report: report.seconds["total"])[REPEATS // 2]

    def difference(self) -> tuple[float, float]:
        """Return the largest difference of an edited weight, and that of the change (Frobenius)."""
        assert self.theirs is not None
        largest, apart, change = 0.0, 0.0, 0.0
        for item in self.editor.modules:
            name = f"{item.name}.weight"
            ours, theirs, start = (
                _weight(model, name) for model in (self.editor.model, self.theirs, self.model)
            )
            largest = max(largest, float((ours - theirs).abs().max()))
            apart += float((ours - theirs).square().sum())
            change += float((theirs - start).square().sum())
        return largest, (apart / change) ** 0.5

    def _edit(self, edits: Sequence[Edit]) -> tuple[UltraEditor, EditReport]:
        editor = UltraEditor(copy.deepcopy(self.model), self.tokenizer, self.config)
        return editor, editor.edit(edits, strict=True)

    def _edit_as_published(self, edits: Sequence[Edit]) -> tuple[PreTrainedModel, float]:
        from pyeditfast_published.ultraedit import PublishedUltraEdit

        config = self.config
        model = copy.deepcopy(self.model)
        editor = PublishedUltraEdit(
            model,
            self.tokenizer,
            list(config.edit_modules or ()),
            lr=config.lr,
            micro_batch=config.micro_batch,
            ridge=config.ridge,
            variance="published",
        )
        pairs = [(edit.prompt, edit.target) for edit in edits]
        start = time.perf_counter()
        editor.edit(pairs, turn_size=config.turn_size)
        return model, time.perf_counter() - start


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_parameter(name).detach().double()


def first_of_each_kind(world: World, edits: Sequence[Edit]) -> list[Edit]:
    """Return the first edit about a person, a place and a company, where there is one."""
    firsts = (
        next((edit for edit in edits if edit.subject in names), None)
        for names in world.subjects.values()
    )
    return [edit for edit in firsts if edit is not None]


def _samples(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
) -> list[Sample]:
    """Return what both models answer to the prompts of ``edits``."""
    return [
        Sample(
            edit.prompt,
            edit.target,
            _completion(before, tokenizer, edit.prompt),
            _completion(after, tokenizer, edit.prompt),
        )
        for edit in edits
    ]


def _completion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return what greedy generation adds to ``prompt``, up to the full stop."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        # transformers' models have it from a mixin that PreTrainedModel does not name.
        generate: Any = model.generate
        told = generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).split(".")[0].strip()


@contextmanager
def transformers_bars_hidden() -> Iterator[None]:
    """Keep out the bars that Transformers draws while it reads and writes files."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
