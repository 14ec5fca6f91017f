"""The published files at hand, read as they are."""

from __future__ import annotations

import json

import pytest

from pyeditfast.data import Edit, Probe, load_edits

FIRST = {
    "counterfact-edit.json": Edit(
        prompt="The mother tongue of Danielle Darrieux is",
        target="English",
        subject="Danielle Darrieux",
        rephrase="Where Danielle Darrieux is from, people speak the language of",
        locality_prompt="Michel Rocard is a native speaker of",
        locality_target="French",
    ),
    "zsre-knowedit.json": Edit(
        prompt="Which family does Epaspidoceras belong to?",
        target="Noctuidae",
        subject="Epaspidoceras",
        rephrase="What family are Epaspidoceras?",
        locality_prompt="The taxon rank of Epaspidoceras is",
        locality_target="genus",
        portability=(
            Probe(
                "What is the common name for the family Epaspidoceras belongs to?", "Owlet moths"
            ),
        ),
    ),
    "wiki-recent-knowedit.json": Edit(
        prompt="The gender of Ingrīda Amantova is",
        target="female",
        subject="Ingrīda Amantova",
        locality_prompt="The place of birth of Ingrīda Amantova is",
        locality_target="Cēsis",
    ),
}
COUNTS = {
    "counterfact-edit.json": 10_000,
    "zsre-knowedit.json": 1_304,
    "wiki-recent-knowedit.json": 570,
}


@pytest.mark.parametrize("name", COUNTS)
def test_count_and_first_record(name, data_dir):
    edits = list(load_edits(data_dir / name))
    assert len(edits) == COUNTS[name]
    assert edits[0] == FIRST[name]
    assert all(edit.prompt and edit.target and edit.subject for edit in edits)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("counterfact-edit.json", "counterfact"),
        ("zsre-knowedit.json", "knowedit"),
        ("wiki-recent-knowedit.json", "knowedit"),
    ],
)
def test_the_layout_is_detected(name, layout, data_dir):
    path = data_dir / name
    assert list(load_edits(path, format=layout)) == list(load_edits(path))


def test_wiki_recent_records_without_locality_or_portability(data_dir):
    path = data_dir / "wiki-recent-knowedit.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    edits = list(load_edits(path))
    assert sum(edit.locality_prompt is None for edit in edits) == 155
    assert [edit.locality_prompt is None for edit in edits] == [not r["locality"] for r in raw]
    assert all((edit.locality_prompt is None) == (edit.locality_target is None) for edit in edits)
    assert sum(not record["portability"] for record in raw) == 466
    # One record more has a kind of probe with no probe in it.
    assert sum(edit.portability == () for edit in edits) == 467


def test_counterfact_prompts_with_several_targets(data_dir):
    targets: dict[str, list[str]] = {}
    for edit in load_edits(data_dir / "counterfact-edit.json"):
        targets.setdefault(edit.prompt, []).append(edit.target)
    assert sum(len(answers) - 1 for answers in targets.values()) == 83
    assert sum(len(set(answers)) > 1 for answers in targets.values()) == 62


def test_all_zsre_records_have_every_kind_of_probe(data_dir):
    edits = list(load_edits(data_dir / "zsre-knowedit.json"))
    assert all(edit.rephrase and edit.locality_target and edit.portability for edit in edits)
