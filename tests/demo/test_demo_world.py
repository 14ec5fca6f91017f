"""The invented world of the demonstration."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from pyeditfast.data import Probe
from pyeditfast.demo.world import MOST_PHRASINGS, SLOT, Fact, World, WorldSettings

SMALL = WorldSettings(people=12, places=8, companies=8, phrasings=3)


def facts_by_prompt(world: World) -> dict[str, Fact]:
    return {
        fact.relation.prompt(number, fact.subject): fact
        for fact in world.facts
        for number in range(len(fact.relation.phrasings))
    }


def test_the_same_seed_gives_the_same_world_and_edits() -> None:
    one, two = World(3, SMALL), World(3, SMALL)
    assert one.facts == two.facts
    assert one.statements() == two.statements()
    assert one.edits(20) == two.edits(20)
    assert one.to_dict() == two.to_dict()


def test_another_seed_gives_another_world() -> None:
    assert World(0, SMALL).subjects != World(1, SMALL).subjects
    assert World(0, SMALL).edits(20) != World(1, SMALL).edits(20)


def test_the_default_world_is_the_same_in_every_process() -> None:
    # A set's order would differ with the process's hash seed. Changes when the word list does.
    world = World()
    told = json.dumps(
        [[edit.prompt, edit.target, edit.locality_prompt] for edit in world.edits(100)]
    )
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "bbb95fee8e57b09c"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_subject_has_one_answer_for_each_of_its_relations(seed: int) -> None:
    world = World(seed)
    names = [name for group in world.subjects.values() for name in group]
    assert len(set(names)) == len(names) == 48 + 44 + 44
    pairs = Counter((fact.subject, fact.relation.name) for fact in world.facts)
    assert set(pairs.values()) == {1}
    assert len(pairs) == sum(len(world.subjects[r.subject]) for r in world.relations)
    assert all(fact.answer in world.answers[fact.relation.answer] for fact in world.facts)


def test_an_answer_is_shared_only_where_a_relation_has_more_subjects_than_answers() -> None:
    world = World(5)
    for relation in world.relations:
        shares = Counter(fact.answer for fact in world.facts if fact.relation == relation)
        subjects, answers = (
            len(world.subjects[relation.subject]),
            len(world.answers[relation.answer]),
        )
        assert max(shares.values()) == -(-subjects // answers)


def test_the_word_list_is_whole() -> None:
    world = World(0, WorldSettings(phrasings=MOST_PHRASINGS))
    phrasings = [text for relation in world.relations for text in relation.phrasings]
    assert len(phrasings) == MOST_PHRASINGS * len(world.relations)
    assert len(set(phrasings)) == len(phrasings)
    assert all(text.count(SLOT) == 1 for text in phrasings)
    assert all(text == text.strip() and not text.endswith(SLOT) for text in phrasings)
    for answers in world.answers.values():
        assert len(set(answers)) == len(answers) >= 40


def test_the_statements_are_every_fact_in_every_phrasing() -> None:
    world = World(0, SMALL)
    known = facts_by_prompt(world)
    assert len(known) == len(world.statements()) == 3 * len(world.facts)
    assert all(
        statement == Probe(statement.prompt, known[statement.prompt].answer)
        for statement in world.statements()
    )


@pytest.mark.parametrize(("seed", "settings"), [(0, None), (1, None), (2, SMALL), (3, SMALL)])
def test_edits_and_probes_never_meet(seed: int, settings: WorldSettings | None) -> None:
    world = World(seed, settings)
    count = 100 if settings is None else 40
    edits = world.edits(count)
    known = facts_by_prompt(world)
    assert len(edits) == count
    edited = {edit.subject for edit in edits}
    for edit in edits:
        fact, again = known[edit.prompt], known[str(edit.rephrase)]
        assert fact == again and fact.subject == edit.subject
        assert edit.prompt != edit.rephrase
        assert edit.target != fact.answer
        assert edit.target in world.answers[fact.relation.answer]
        untouched = known[str(edit.locality_prompt)]
        assert untouched.answer == edit.locality_target
        assert untouched.subject not in edited
    for prompts in (
        [known[edit.prompt] for edit in edits],
        [known[str(edit.locality_prompt)] for edit in edits],
    ):
        assert len(set(prompts)) == count
        spread = Counter(fact.relation.name for fact in prompts)
        assert len(spread) == len(world.relations)
        if settings is None:
            assert max(spread.values()) - min(spread.values()) <= 1


def test_too_many_edits_are_refused_with_the_most_there_can_be() -> None:
    world = World(0, SMALL)
    most = 6 * 8 + 4 * 5 + 4 * 4
    assert len(world.edits(most)) == most
    with pytest.raises(ValueError, match=rf"{most + 1} edits.*1 to {most}"):
        world.edits(most + 1)
    with pytest.raises(ValueError, match="0 edits"):
        world.edits(0)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="places is 3"):
        WorldSettings(places=3)
    with pytest.raises(ValueError, match=r"phrasings is 6; 2 to 5"):
        WorldSettings(phrasings=6)
    with pytest.raises(ValueError, match=r"201 names.*make 200"):
        World(0, WorldSettings(companies=201))
