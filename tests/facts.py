"""A few facts for tests that need edits but no data file."""

from __future__ import annotations

from pyeditfast import Edit

PEOPLE = ("Ada Moreau", "Bram Okafor", "Chiyo", "Dov Lindqvist", "Esi Tanaka de la Cruz", "Femi")
CITIES = ("Paris", "Ulaanbaatar", "Rio de Janeiro", "Oslo", "Addis Ababa")
QUESTIONS = (
    "{} was born in",
    "The birthplace of {} is the city of",
    "Where was {} born? In",
    "After many years abroad, and against the advice of the whole family, {} moved to",
)


def facts(count: int) -> list[Edit]:
    """Return ``count`` edits with distinct prompts of different lengths."""
    edits = []
    for number in range(count):
        person = f"{PEOPLE[number % len(PEOPLE)]} {number}"
        question = QUESTIONS[number % len(QUESTIONS)]
        other = QUESTIONS[(number + 1) % len(QUESTIONS)]
        edits.append(
            Edit(
                question.format(person),
                CITIES[number % len(CITIES)],
                rephrase=other.format(person),
                locality_prompt=f"The capital of country {number} is",
                locality_target=CITIES[(number + 2) % len(CITIES)],
            )
        )
    return edits
