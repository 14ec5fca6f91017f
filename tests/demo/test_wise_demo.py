"""The demonstration of WISE from end to end, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pyeditfast import WiseEditor, load_model
from pyeditfast.demo.training import TrainingSettings
from pyeditfast.demo.wise_report import WiseDemoResult
from pyeditfast.demo.wise_run import run_wise_demo
from pyeditfast.demo.world import WorldSettings

WORLD = WorldSettings(people=4, places=4, companies=4, phrasings=2)
TINY = TrainingSettings(
    hidden=96, layers=2, heads=2, intermediate=192, vocabulary=500, passes=20, batch=16, lr=3e-3
)


def small_demo(out: Path, *, facts: int = 5, published: bool = True) -> WiseDemoResult:
    return run_wise_demo(
        out,
        facts=facts,
        seed=1,
        cache=out.parent / "cache",
        published=published,
        world=WORLD,
        training=TINY,
        print_line=lambda line: None,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> WiseDemoResult:
    return small_demo(tmp_path_factory.mktemp("wise-demo") / "out")


def test_it_edits_and_routes(result: WiseDemoResult) -> None:
    assert (result.report.edits, result.report.rejected) == (5, [])
    assert result.before.efficacy is not None and result.after.efficacy is not None
    # A model this small that knows its world: with less of either, edits are luck.
    assert result.before.efficacy < 0.5 < result.after.efficacy
    assert result.after.routing is not None and result.after.routing.efficacy is not None
    routed = 5 - len(result.report.not_routed)
    assert result.after.routing.efficacy == pytest.approx(routed / 5)
    assert len(result.thresholds) == 1


def test_it_serves_alone_and_in_batches(result: WiseDemoResult) -> None:
    assert result.serving.identical == 1.0
    assert result.after.exact is not None
    # Teacher-forced and generated answers are right for the same prompts.
    assert result.serving.answered == pytest.approx(result.after.exact["efficacy"])


def test_it_compares_with_the_published_procedure(result: WiseDemoResult) -> None:
    assert isinstance(result.times, tuple) and min(result.times) > 0
    assert "by the published procedure" in result.comparison()


def test_one_fact_is_enough(result: WiseDemoResult) -> None:
    alone = small_demo(result.folder.parent / "one", facts=1)
    assert alone.report.edits == 1
    assert isinstance(alone.times, tuple) and min(alone.times) > 0


def test_it_can_do_without_it(result: WiseDemoResult, tmp_path: Path) -> None:
    alone = small_demo(result.folder.parent / "alone", published=False)
    assert alone.comparison() == "No comparison with the published procedure: not wanted."
    # The same seed makes the same edits.
    assert alone.thresholds == result.thresholds


def test_it_writes_report_picture_and_side_memories(result: WiseDemoResult) -> None:
    report = json.loads((result.folder / "report.json").read_text())
    assert report["serving"] == {"answered": result.serving.answered, "identical": 1.0, "batch": 16}
    markdown = (result.folder / "report.md").read_text()
    assert (
        "# 5 facts edited into a side memory" in markdown and result.samples[0].prompt in markdown
    )
    with Image.open(result.picture) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    model, _ = load_model(result.folder / "side-memories")
    assert type(model.get_submodule(result.config.edit_module)).__name__ == "WiseLinear"
    assert WiseEditor.load(result.folder / "side-memories").edits == 5


def test_the_terminal_gets_a_compact_table(result: WiseDemoResult) -> None:
    lines = str(result).splitlines()
    assert lines[1].split() == ["edited", "facts", "other", "phrasings", "untouched", "facts"]
    assert lines[2].startswith("before editing") and lines[3].startswith("WISE")
    assert any(line.startswith("Edited model: pyeditfast.load_model(") for line in lines)


def test_too_many_facts_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 edits were asked for"):
        run_wise_demo(tmp_path / "out", facts=1000, world=WORLD, training=TINY)
    assert not (tmp_path / "out").exists()
