"""The demonstration of WISE: facts of an invented world, edited into a side memory and served."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyeditfast.data.edit import Edit
from pyeditfast.demo.chart import require_matplotlib
from pyeditfast.demo.report import Sample
from pyeditfast.demo.run import first_of_each_kind, transformers_bars_hidden
from pyeditfast.demo.training import TrainingSettings, trained_model
from pyeditfast.demo.wise_report import Serving, WiseDemoResult, write_wise_report
from pyeditfast.demo.world import World, WorldSettings
from pyeditfast.editors import WiseConfig, WiseEditor
from pyeditfast.editors.wise_prompts import LOCALITY_POOL, pad_token
from pyeditfast.evaluation import evaluate

BATCH = 16
"""Prompts that are answered together, padded on the left."""

TIMED_EDITS = 5
"""Edits that both procedures make for the comparison of their times."""


def run_wise_demo(
    out: Path,
    *,
    facts: int = 100,
    seed: int = 0,
    cache: Path | None = None,
    published: bool = True,
    world: WorldSettings | None = None,
    training: TrainingSettings | None = None,
    print_line: Callable[[str], None] = print,
) -> WiseDemoResult:
    """Train a small model on an invented world, edit ``facts`` of it with WISE, and report.

    ``cache`` keeps the trained model, by default where the demonstration of UltraEdit beside
    ``out`` has it, else in ``out/model``. With ``published`` the published procedure makes the
    first few edits too, for its time. Writes ``report.png`` (the gaps of all prompts and the
    threshold), ``report.md``, ``report.json`` and ``side-memories`` to ``out``. Raises
    ``ValueError`` if the world has too few facts and ``ImportError`` without matplotlib.
    """
    require_matplotlib()
    place = World(seed, world)
    edits = place.edits(facts)
    training = training if training is not None else TrainingSettings()
    cache = cache if cache is not None else _cache(out)
    print_line(f"An invented world with {len(place.facts)} facts")
    with transformers_bars_hidden():
        base, tokenizer = trained_model(
            cache, seed, world=place, training=training, print_line=print_line
        )
        config = wise_demo_config(base)
        before = evaluate(base, tokenizer, edits)
        times = _times(base, tokenizer, edits[:TIMED_EDITS], config) if published else None
        print_line(f"Editing {facts} of them, one after the other")
        editor = WiseEditor(copy.deepcopy(base), tokenizer, config)
        report = editor.edit(edits, strict=True)
        after = evaluate(editor.model, tokenizer, edits, exact=True)
        serving = serve(editor, edits)
        told = _samples(base, editor, first_of_each_kind(place, edits))
        for model in (base, editor.model):
            model.config.name_or_path = str((out / "base-model").resolve())
        out.mkdir(parents=True, exist_ok=True)
        base.save_pretrained(out / "base-model")
        tokenizer.save_pretrained(out / "base-model")
        editor.save(out / "side-memories")
    (out / "edits.json").write_text(json.dumps([asdict(edit) for edit in edits], indent=1) + "\n")
    result = WiseDemoResult(
        seed=seed,
        facts=facts,
        config=editor.config,
        before=before,
        after=after,
        report=report,
        thresholds=[memory.threshold for memory in editor.memories.all()],
        serving=serving,
        times=times,
        samples=told,
        threads=torch.get_num_threads(),
        folder=out,
    )
    write_wise_report(result)
    return result


def wise_demo_config(model: PreTrainedModel) -> WiseConfig:
    """Return WISE's settings for a trained model of this demonstration.

    The last down projection, as for UltraEdit; margins as small as the gaps of a model this narrow,
    and one template, since the world's sentences stand alone.
    """
    last = model.config.num_hidden_layers - 1
    return WiseConfig(
        edit_module=f"model.layers.{last}.mlp.down_proj",
        n_iter=70,
        mask_ratio=0.3,
        act_margin=(1.0, 6.0, 4.0),
        act_ratio=0.75,
        templates=["{}"],
    )


def serve(editor: WiseEditor, edits: Sequence[Edit]) -> Serving:
    """Return how greedy generation answers the edited prompts, one at a time and in batches."""
    prompts = [edit.prompt for edit in edits]
    targets = [editor.tokenizer(" " + edit.target)["input_ids"] for edit in edits]
    longest = max(len(target) for target in targets)
    alone = [_answers(editor, [prompt], longest)[0] for prompt in prompts]
    together = [
        answer
        for start in range(0, len(prompts), BATCH)
        for answer in _answers(editor, prompts[start : start + BATCH], longest)
    ]
    right = [answer[: len(target)] == target for answer, target in zip(alone, targets, strict=True)]
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    return Serving(sum(right) / len(right), same / len(alone), BATCH)


def _samples(base: PreTrainedModel, editor: WiseEditor, edits: Sequence[Edit]) -> list[Sample]:
    """Return what both models answer, cut to the length of the target: WISE trains its tokens, not
    where the answer ends.
    """
    tokenizer = editor.tokenizer
    told = []
    for edit in edits:
        length = len(tokenizer(" " + edit.target)["input_ids"])
        before, after = (
            str(tokenizer.decode(_generated(model, tokenizer, [edit.prompt], length)[0])).strip()
            for model in (base, editor.model)
        )
        told.append(Sample(edit.prompt, edit.target, before, after))
    return told


def _answers(editor: WiseEditor, prompts: list[str], tokens: int) -> list[list[int]]:
    return _generated(editor.model, editor.tokenizer, prompts, tokens)


def _generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int
) -> list[list[int]]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    # transformers' models have it from a mixin that PreTrainedModel does not name.
    generate: Any = model.generate
    with torch.inference_mode():
        told = generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=pad_token(tokenizer),
        )
    rows: list[list[int]] = told[:, inputs["input_ids"].shape[1] :].tolist()
    # A row that ends before the others of its batch is padded.
    pad = pad_token(tokenizer)
    return [list(itertools.takewhile(lambda token: token != pad, row)) for row in rows]


def _times(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    config: WiseConfig,
) -> tuple[float, float] | str:
    """Return the seconds an edit takes by the published procedure and here, or why not."""
    try:
        from pyeditfast_published.wise import PublishedWise
    except ImportError as error:
        return f"it cannot be imported ({error}); it comes with the source"
    assert config.edit_module is not None
    theirs = PublishedWise(
        copy.deepcopy(model),
        tokenizer,
        config.edit_module,
        templates=config.templates or ("{}",),
        n_iter=config.n_iter,
        edit_lr=config.edit_lr,
        mask_ratio=config.mask_ratio,
        act_margin=config.act_margin,
        quirks="none",
    )
    ours = WiseEditor(copy.deepcopy(model), tokenizer, config)
    their_seconds, our_seconds = [], []
    for number, edit in enumerate(edits):
        locality = edit.locality_prompt or LOCALITY_POOL[number]
        start = time.perf_counter()
        theirs.edit(edit.prompt, edit.target, locality)
        middle = time.perf_counter()
        ours.edit([edit], strict=True)
        their_seconds.append(middle - start)
        our_seconds.append(time.perf_counter() - middle)
    # The first edit sets libraries up.
    return median_low(their_seconds[1:] or their_seconds), median_low(
        our_seconds[1:] or our_seconds
    )


def _cache(out: Path) -> Path:
    beside = out.parent / "demo" / "model"
    return beside if beside.is_dir() else out / "model"
