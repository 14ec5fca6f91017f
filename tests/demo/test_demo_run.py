"""The demonstration from end to end, in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from pyeditfast import UltraEditor, evaluate, load_model
from pyeditfast.demo.report import DemoResult, Published
from pyeditfast.demo.run import REPEATS, run_demo
from pyeditfast.demo.training import TrainingSettings
from pyeditfast.demo.world import World, WorldSettings

WORLD = WorldSettings(people=4, places=4, companies=4, phrasings=2)
TINY = TrainingSettings(
    hidden=48, layers=2, heads=2, intermediate=96, vocabulary=500, passes=8, batch=16, lr=3e-3
)


def small_demo(
    out: Path, lines: list[str], *, published: bool = True, **changes: int
) -> DemoResult:
    return run_demo(
        out,
        facts=changes.get("facts", 7),
        turn_size=3,
        seed=1,
        cache=out.parent / "cache",
        published=published,
        world=WORLD,
        training=TINY,
        print_line=lines.append,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, lines: list[str]) -> DemoResult:
    return small_demo(folder / "out", lines)


def test_it_tells_what_it_does(result: DemoResult, lines: list[str]) -> None:
    assert "4 people" in lines[0] and "68 facts in 2 phrasings" in lines[0]
    assert sum("pass " in line for line in lines) == TINY.passes
    assert lines[-1] == "Editing 7 of them in turns of 3, beside the published procedure"


def test_it_edits(result: DemoResult) -> None:
    assert (result.report.edits, result.report.turns, result.report.rejected) == (7, 3, [])
    assert result.before.counts == {
        "efficacy": 7,
        "generalization": 7,
        "specificity": 7,
        "portability": 0,
    }
    assert result.before.efficacy is not None and result.after.efficacy is not None
    assert result.after.efficacy > result.before.efficacy


def test_both_procedures_agree(result: DemoResult) -> None:
    assert isinstance(result.published, Published)
    assert result.published.scores == result.after
    assert 0 < result.published.relative_difference < 1e-3
    assert 0 < result.published.largest_difference < 1e-3
    assert result.speedup == pytest.approx(result.published.seconds / result.seconds)


def test_the_edited_model_opens_with_the_scores_reported(result: DemoResult, folder: Path) -> None:
    model, tokenizer = load_model(result.edited_model)
    edits = World(1, WORLD).edits(7)
    assert evaluate(model, tokenizer, edits) == result.after
    editor = UltraEditor.load(result.edited_model)
    assert editor.config == result.config
    assert editor.edits == 7
    trained, _ = load_model(next((folder / "cache").iterdir()))
    changed = {
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, trained.state_dict()[name])
    }
    assert changed == {"model.layers.1.mlp.down_proj.weight"}


def test_the_picture_is_one(result: DemoResult) -> None:
    with Image.open(result.picture) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        assert 1000 <= width <= 2000 and 0.3 <= height / width <= 0.5
        scores = picture.convert("RGB").crop((0, 0, width // 2, height))
        colours = scores.getcolors(width * height)
    drawn = {colour for _, colour in colours}
    for bar in ("#c9ced6", "#2563eb", "#f0a03c"):
        assert tuple(bytes.fromhex(bar[1:])) in drawn


def test_the_reports_hold_the_numbers(result: DemoResult) -> None:
    told = json.loads((result.folder / "report.json").read_text())
    assert told == json.loads(json.dumps(result.to_dict()))
    assert told["after"]["efficacy"] == result.after.efficacy
    assert told["seconds"]["total"] == result.seconds
    text = (result.folder / "report.md").read_text()
    assert "report.png" in text
    for scores in (result.before, result.after):
        assert f"{100 * (scores.specificity or 0):.1f} %" in text
    for sample in result.samples:
        assert sample.prompt in text


def test_the_terminal_gets_a_compact_table(result: DemoResult) -> None:
    text = str(result)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    for name, scores in (
        ("before editing", result.before),
        ("pyeditfast", result.after),
        ("published procedure", result.after),
    ):
        for score in (scores.efficacy, scores.generalization, scores.specificity):
            assert f"{100 * (score or 0):.1f} %" in rows[name]
    assert f"{result.speedup:.1f} times as fast" in text
    assert f'from_pretrained("{result.edited_model}")' in text
    assert len(result.samples) == 3
    assert max(len(line) for line in text.splitlines()) < 160


def test_a_sample_tells_what_was_wanted_only_where_it_was_missed(result: DemoResult) -> None:
    for sample in result.samples:
        assert ("wanted" in str(sample)) == (sample.after != sample.target)


def test_the_same_again_from_an_empty_cache(result: DemoResult, tmp_path: Path) -> None:
    again = small_demo(tmp_path / "out", [])
    assert (again.before, again.after, again.samples) == (
        result.before,
        result.after,
        result.samples,
    )
    one, _ = load_model(result.edited_model)
    two, _ = load_model(again.edited_model)
    assert all(torch.equal(one.state_dict()[name], t) for name, t in two.state_dict().items())


def test_without_the_published_procedure(folder: Path, result: DemoResult) -> None:
    alone = small_demo(folder / "alone", [], published=False)
    assert alone.after == result.after
    assert alone.speedup is None
    assert "No comparison with the published procedure: it was left out on request." in str(alone)
    assert alone.picture.is_file()
    assert json.loads((alone.folder / "report.json").read_text())["speedup"] is None


def test_a_missing_published_procedure_is_told(
    folder: Path, result: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyeditfast_published.ultraedit", None)
    alone = small_demo(folder / "missing", [])
    assert isinstance(alone.published, str)
    assert "cannot be imported" in str(alone)
    assert alone.after == result.after


def test_the_median_run_is_reported(
    folder: Path, result: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = iter([100.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    edit = UltraEditor.edit

    def timed(self: UltraEditor, *args: object, **options: object) -> object:
        report = edit(self, *args, **options)  # type: ignore[arg-type]
        report.seconds["total"] = next(totals)
        return report

    monkeypatch.setattr(UltraEditor, "edit", timed)
    alone = small_demo(folder / "median", [], published=False)
    assert REPEATS == 5
    # The first of the six is the warm-up.
    assert alone.seconds == 3.0
    assert next(totals, None) is None


def test_what_cannot_be_done_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 edits were asked for"):
        small_demo(tmp_path / "out", [], facts=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install pyeditfast\[cli\]"):
        small_demo(tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_left_as_it_was(
    folder: Path, result: DemoResult, capfd: pytest.CaptureFixture[str]
) -> None:
    pyplot = "matplotlib.pyplot" in sys.modules
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        small_demo(folder / "quiet", [], published=False)
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not shown:
            transformers_logging.disable_progress_bar()
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
