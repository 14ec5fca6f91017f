"""The record that every reader yields and both editors take."""

from __future__ import annotations

from dataclasses import dataclass


def _check_text(owner: str, field: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{owner}.{field} must be str, got {type(value).__name__}: {value!r:.80}")


def _check_optional_text(owner: str, field: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"{owner}.{field} must be str or None, got {type(value).__name__}: {value!r:.80}"
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """A question and its expected answer.

    Raises:
        TypeError: a field is not text.
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _check_text("Probe", "prompt", self.prompt)
        _check_text("Probe", "target", self.target)


@dataclass(frozen=True, slots=True)
class Edit:
    """One fact to write into a model, with the prompts that measure the result.

    Only types are checked here. An empty prompt or target is a valid record: the editors
    reject and report it, because what is empty also depends on the tokenizer.

    Attributes:
        prompt: what the model is asked, without the answer.
        target: what it shall answer. No leading space: the editors add it.
        subject: the entity that the fact is about.
        rephrase: another phrasing of ``prompt`` with the same target (generalization).
        locality_prompt: an unrelated prompt whose answer must not change (specificity).
        locality_target: the answer to ``locality_prompt``. It may be None beside a prompt:
            WISE needs the prompt alone.
        portability: prompts whose answers follow from the edited fact.

    Raises:
        TypeError: a field has another type; the text names the field and shows the value.
    """

    prompt: str
    target: str
    subject: str | None = None
    rephrase: str | None = None
    locality_prompt: str | None = None
    locality_target: str | None = None
    portability: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        _check_text("Edit", "prompt", self.prompt)
        _check_text("Edit", "target", self.target)
        _check_optional_text("Edit", "subject", self.subject)
        _check_optional_text("Edit", "rephrase", self.rephrase)
        _check_optional_text("Edit", "locality_prompt", self.locality_prompt)
        _check_optional_text("Edit", "locality_target", self.locality_target)
        if not isinstance(self.portability, tuple):
            raise TypeError(
                "Edit.portability must be a tuple of Probe, "
                f"got {type(self.portability).__name__}: {self.portability!r:.80}"
            )
        for position, probe in enumerate(self.portability):
            if not isinstance(probe, Probe):
                raise TypeError(
                    f"Edit.portability[{position}] must be a Probe, "
                    f"got {type(probe).__name__}: {probe!r:.80}"
                )
