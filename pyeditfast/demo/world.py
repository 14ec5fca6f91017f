"""A small fictional world: people, places and companies, and what is true of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from pyeditfast.data.edit import Edit, Probe

SLOT = "{x}"
"""Where a phrasing takes the subject."""

MOST_PHRASINGS = 5
"""The phrasings that the word list has for every relation."""


@dataclass(frozen=True)
class WorldSettings:
    """The size of a world: how many ``people``, ``places`` and ``companies`` it has.

    ``phrasings`` is how many statements of each fact there are. Raises ``ValueError`` for a number
    out of range.
    """

    people: int = 48
    places: int = 44
    companies: int = 44
    phrasings: int = 4

    def __post_init__(self) -> None:
        for name in ("people", "places", "companies"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 4 are needed")
        if not 2 <= self.phrasings <= MOST_PHRASINGS:
            raise ValueError(f"phrasings is {self.phrasings}; 2 to {MOST_PHRASINGS} are possible")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: the kinds of its subject and of its answer, and its phrasings.

    A phrasing is a statement up to the answer, with ``{x}`` for the subject.
    """

    name: str
    subject: str
    answer: str
    phrasings: tuple[str, ...]

    def prompt(self, phrasing: int, subject: str) -> str:
        """Return phrasing number ``phrasing`` for ``subject``."""
        return self.phrasings[phrasing].replace(SLOT, subject)


@dataclass(frozen=True)
class Fact:
    """``answer`` is what the statements of ``relation`` about ``subject`` end with."""

    subject: str
    relation: Relation
    answer: str


class World:
    """The facts of an invented world, the same for the same ``seed`` and ``settings``.

    ``subjects`` are names by kind (person, place, company); ``answers`` the possible answers by
    kind; ``facts`` hold one answer for every subject and relation that go together. Answers are
    dealt out, so that two subjects share one only where a relation has more subjects than answers.
    """

    def __init__(self, seed: int = 0, settings: WorldSettings | None = None) -> None:
        self.seed = seed
        self.settings = settings if settings is not None else WorldSettings()
        self._words = words = _words()
        syllables = words["syllables"]
        # random.Random seeded with text depends on nothing but the text.
        draw = random.Random(f"world {seed}")
        self.subjects = {
            "person": _people(draw, syllables, self.settings.people),
            "place": _names(draw, syllables, ("place", "place_end"), self.settings.places),
            "company": _names(draw, syllables, ("company", "company_end"), self.settings.companies),
        }
        self.answers: dict[str, list[str]] = {**words["pools"], **self.subjects}
        self.relations = tuple(
            Relation(
                relation["name"],
                relation["subject"],
                relation["answer"],
                tuple(relation["phrasings"][: self.settings.phrasings]),
            )
            for relation in words["relations"]
        )
        self.facts = tuple(
            Fact(subject, relation, answer)
            for relation in self.relations
            for subject, answer in zip(
                self.subjects[relation.subject],
                _dealt(draw, self.answers[relation.answer]),
                strict=False,
            )
        )

    def statements(self) -> list[Probe]:
        """Return every fact in every phrasing: what a model of this world is trained on."""
        return [
            Probe(fact.relation.prompt(number, fact.subject), fact.answer)
            for fact in self.facts
            for number in range(len(fact.relation.phrasings))
        ]

    def edits(self, count: int) -> list[Edit]:
        """Return ``count`` edits of facts about half of the subjects, spread over the relations.

        Each gives a fact another answer of the same kind: ``prompt`` is one phrasing of it,
        ``rephrase`` another. The locality probe is a true fact, in any phrasing, about a subject of
        the half that no edit touches; these too are spread evenly over the relations. No fact
        occurs twice. Raises ``ValueError`` if the world is too small.
        """
        draw = random.Random(f"edits {self.seed}")
        edited: set[str] = set()
        for names in self.subjects.values():
            edited.update(draw.sample(names, len(names) // 2))
        changed = self._spread(draw, (fact for fact in self.facts if fact.subject in edited))
        kept = self._spread(draw, (fact for fact in self.facts if fact.subject not in edited))
        if not 1 <= count <= min(len(changed), len(kept)):
            raise ValueError(
                f"{count} edits were asked for; a world of {len(self.facts)} facts "
                f"allows 1 to {min(len(changed), len(kept))}"
            )
        # Unshuffled, all edits of one relation would have their probes from one other.
        kept = kept[:count]
        draw.shuffle(kept)
        edits = []
        for fact, other in zip(changed[:count], kept, strict=True):
            wrong = [
                answer for answer in self.answers[fact.relation.answer] if answer != fact.answer
            ]
            asked, rephrased = draw.sample(range(len(fact.relation.phrasings)), 2)
            probe = draw.randrange(len(other.relation.phrasings))
            edits.append(
                Edit(
                    prompt=fact.relation.prompt(asked, fact.subject),
                    target=draw.choice(wrong),
                    subject=fact.subject,
                    rephrase=fact.relation.prompt(rephrased, fact.subject),
                    locality_prompt=other.relation.prompt(probe, other.subject),
                    locality_target=other.answer,
                )
            )
        draw.shuffle(edits)
        return edits

    def _spread(self, draw: random.Random, facts: Iterable[Fact]) -> list[Fact]:
        """Order facts at random, one of each relation in turn."""
        names = [relation.name for relation in self.relations]
        draw.shuffle(names)
        groups: dict[str, list[Fact]] = {name: [] for name in names}
        for fact in facts:
            groups[fact.relation.name].append(fact)
        for group in groups.values():
            draw.shuffle(group)
        longest = max(len(group) for group in groups.values())
        return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]

    def to_dict(self) -> dict[str, Any]:
        """Return all that this world follows from, as JSON-ready values."""
        return {"seed": self.seed, **asdict(self.settings), "words": self._words}


def _words() -> dict[str, Any]:
    words: dict[str, Any] = json.loads(
        files("pyeditfast.demo").joinpath("words.json").read_text(encoding="utf-8")
    )
    return words


def _dealt(draw: random.Random, answers: Sequence[str]) -> Iterator[str]:
    """Deal out all answers in random order, then all of them again, and so on."""
    while True:
        yield from draw.sample(answers, len(answers))


def _names(
    draw: random.Random, syllables: dict[str, list[str]], parts: Sequence[str], count: int
) -> list[str]:
    names = [""]
    for part in parts:
        names = [name + syllable for name in names for syllable in syllables[part]]
    if count > len(names):
        raise ValueError(f"{count} names were asked for; the syllables make {len(names)}")
    return draw.sample(names, count)


def _people(draw: random.Random, syllables: dict[str, list[str]], count: int) -> list[str]:
    last = _names(draw, syllables, ("last", "last_end"), count)
    first = _names(draw, syllables, ("first", "second"), min(count, 250))
    return [f"{first[i % len(first)]} {name}" for i, name in enumerate(last)]
