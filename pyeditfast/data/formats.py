"""The published layouts of an edit record, and how each becomes an `Edit`.

| layout | prompt | target | rephrase | locality prompt, target | portability |
|---|---|---|---|---|---|
| pyeditfast | prompt | target | rephrase | locality_prompt, locality_target | portability |
| zsre (MEND) | src | alt | rephrase | loc, loc_ans | |
| zsre (UltraEdit) | src | ans | rephrase | loc with "?", loc_ans | |
| counterfact | prompt | target_new | rephrase_prompt | locality_prompt, locality_ground_truth | |
| counterfact-rome | prompt | target_new | paraphrase_prompts | neighborhood_prompts | |
| knowedit | prompt | target_new | rephrase_prompt, rephrase | locality | portability |
| hallucination | text, prompt | labels, target_new | | locality, or as counterfact | |
| ultraeditbench | prompt | ans | rephrase_prompt | loc, loc_ans | |
| wikibigedit | update | ans | rephrase | loc, loc_ans | personas, mhop |
| fever | prompt | alt | equiv_prompt | unrel_prompt, unrel_ans | |

Prompt and target are required. The other fields may be missing or null (or NaN, which data
frames write for null), and are None then. `subject` is read in every layout, `concept` too in
hallucination. Fields not named here are ignored; so are true answers (`answers`,
`ground_truth`), which neither editor uses.

What the table does not say:

- zsre: a record with `ans` follows UltraEdit's loader, which also appends "?" to `loc` (here
  only if there is none yet); a record with `alt` alone follows MEND's.
- counterfact-rome: prompt, subject, target_new and target_true are nested in
  `requested_rewrite`; the prompt is a template with `{}` for the subject. Of the paraphrases and
  neighbours the first is taken; the neighbours' answer is `target_true`.
- knowedit, hallucination: the locality probe is the first that has an answer, those of
  `Relation_Specificity` first, then `Forgetfulness`, then others. If none has an answer it is
  the first probe, without a target. Ground truths are lists of aliases, nested to any depth;
  the first is taken. Portability holds every probe with an answer, in the file's order.
- wikibigedit: portability holds `personas`, whose answer is `ans`, then `mhop`, if they are there.
- fever: of several `equiv_prompt` the first is taken (the published loader draws one at random).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pyeditfast.data.edit import Edit, Probe
from pyeditfast.data.fields import (
    first_text,
    is_absent,
    key_list,
    missing,
    object_list,
    optional_object,
    optional_text,
    required_object,
    required_text,
)
from pyeditfast.errors import RecordError

Record = Mapping[str, object]


@dataclass(frozen=True)
class Layout:
    """One published layout of a record.

    Attributes:
        name: what `load_edits` calls it.
        required: groups of field names; a record has at least one name of every group.
        optional: the other fields that are read.
        convert: makes an `Edit` of a record, or raises `RecordError` with the field's name.
        marks: fields of which a record needs one to be taken for this layout unasked.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    convert: Callable[[Record], Edit]
    marks: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """Every field that `convert` reads."""
        return frozenset(self.optional).union(*self.required)

    def check(self, keys: Iterable[str]) -> None:
        """Raises `RecordError` if the keys lack a required field."""
        present = dict.fromkeys(keys)
        for group in self.required:
            if not any(name in present for name in group):
                raise missing("' or '".join(group), present)

    def matches(self, keys: frozenset[str]) -> bool:
        """Whether a record with these keys has this layout."""
        return all(keys.intersection(group) for group in self.required) and (
            not self.marks or bool(keys.intersection(self.marks))
        )


def detect_layout(keys: Iterable[str]) -> Layout:
    """The layout of a record with these keys.

    Raises:
        RecordError: none fits; the text lists the keys and what every layout needs.
    """
    present = frozenset(keys)
    for layout in LAYOUTS.values():
        if layout.matches(present):
            return layout
    known = "; ".join(_needs(layout) for layout in LAYOUTS.values())
    raise RecordError(
        f"no known layout has the keys {key_list(sorted(present))}; "
        f"layouts and the fields they need: {known}"
    )


def _needs(layout: Layout) -> str:
    groups = [*layout.required, *([layout.marks] if layout.marks else [])]
    return f"{layout.name} ({', '.join('|'.join(group) for group in groups)})"


def _pyeditfast(record: Record) -> Edit:
    probes = tuple(
        Probe(
            required_text(probe, "prompt", prefix=f"portability[{position}]."),
            required_text(probe, "target", prefix=f"portability[{position}]."),
        )
        for position, probe in enumerate(object_list("portability", record.get("portability")))
    )
    return Edit(
        prompt=required_text(record, "prompt"),
        target=required_text(record, "target"),
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase"),
        locality_prompt=optional_text(record, "locality_prompt"),
        locality_target=optional_text(record, "locality_target"),
        portability=probes,
    )


def _zsre(record: Record) -> Edit:
    target = required_text(record, "ans", "alt")
    locality_prompt = optional_text(record, "loc")
    as_ultraedit = not is_absent(record.get("ans"))
    if as_ultraedit and locality_prompt is not None and not locality_prompt.endswith("?"):
        locality_prompt += "?"
    return Edit(
        prompt=required_text(record, "src"),
        target=target,
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase"),
        locality_prompt=locality_prompt,
        locality_target=optional_text(record, "loc_ans"),
    )


def _counterfact(record: Record) -> Edit:
    return Edit(
        prompt=required_text(record, "prompt"),
        target=required_text(record, "target_new"),
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase_prompt"),
        locality_prompt=optional_text(record, "locality_prompt"),
        locality_target=optional_text(record, "locality_ground_truth"),
    )


def _counterfact_rome(record: Record) -> Edit:
    rewrite = required_object(record, "requested_rewrite")
    path = "requested_rewrite."
    subject = required_text(rewrite, "subject", prefix=path)
    template = required_text(rewrite, "prompt", prefix=path)
    if "{}" not in template:
        raise RecordError(f"field '{path}prompt' has no {{}} for the subject: {template!r:.80}")
    new = required_object(rewrite, "target_new", path)
    true = optional_object(rewrite, "target_true", path)
    neighbour = first_text("neighborhood_prompts", record.get("neighborhood_prompts"))
    neighbour_target = optional_text(true, "str", prefix=f"{path}target_true.")
    return Edit(
        prompt=template.replace("{}", subject),
        target=required_text(new, "str", prefix=f"{path}target_new."),
        subject=subject,
        rephrase=first_text("paraphrase_prompts", record.get("paraphrase_prompts")),
        locality_prompt=neighbour,
        locality_target=None if neighbour is None else neighbour_target,
    )


_LOCALITY_ORDER = ("Relation_Specificity", "Forgetfulness")


def _nested_probes(
    record: Record, name: str, order: tuple[str, ...] = ()
) -> list[tuple[str, str | None]]:
    """Prompt and first answer of every probe under ``name``, the kinds in ``order`` first."""
    kinds = optional_object(record, name)
    ordered = [kind for kind in order if kind in kinds]
    ordered += [kind for kind in kinds if kind not in order]
    probes = []
    for kind in ordered:
        path = f"{name}.{kind}"
        for position, probe in enumerate(object_list(path, kinds[kind])):
            place = f"{path}[{position}]"
            prompt = first_text(f"{place}.prompt", probe.get("prompt"))
            if prompt is None:
                raise missing("prompt", probe, prefix=f"{place}.")
            answer = first_text(f"{place}.ground_truth", probe.get("ground_truth"))
            probes.append((prompt, answer if answer and answer.strip() else None))
    return probes


def _nested_locality(record: Record) -> tuple[str | None, str | None]:
    probes = _nested_probes(record, "locality", _LOCALITY_ORDER)
    answered = (probe for probe in probes if probe[1] is not None)
    return next(answered, probes[0] if probes else (None, None))


def _knowedit(record: Record) -> Edit:
    locality_prompt, locality_target = _nested_locality(record)
    return Edit(
        prompt=required_text(record, "prompt"),
        target=required_text(record, "target_new"),
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase_prompt", "rephrase"),
        locality_prompt=locality_prompt,
        locality_target=locality_target,
        portability=tuple(
            Probe(prompt, answer)
            for prompt, answer in _nested_probes(record, "portability")
            if answer is not None
        ),
    )


def _hallucination(record: Record) -> Edit:
    locality_prompt, locality_target = _nested_locality(record)
    if locality_prompt is None:
        locality_prompt = optional_text(record, "locality_prompt")
        locality_target = optional_text(record, "locality_ground_truth")
    return Edit(
        prompt=required_text(record, "text", "prompt"),
        target=required_text(record, "labels", "target_new"),
        subject=optional_text(record, "subject", "concept"),
        locality_prompt=locality_prompt,
        locality_target=locality_target,
    )


def _ultraeditbench(record: Record) -> Edit:
    return Edit(
        prompt=required_text(record, "prompt"),
        target=required_text(record, "ans"),
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase_prompt"),
        locality_prompt=optional_text(record, "loc"),
        locality_target=optional_text(record, "loc_ans"),
    )


def _wikibigedit(record: Record) -> Edit:
    target = required_text(record, "ans")
    personas = optional_text(record, "personas")
    multi_hop = optional_text(record, "mhop")
    multi_hop_target = optional_text(record, "mhop_ans")
    probes = []
    if personas is not None:
        probes.append(Probe(personas, target))
    if multi_hop is not None and multi_hop_target is not None:
        probes.append(Probe(multi_hop, multi_hop_target))
    return Edit(
        prompt=required_text(record, "update"),
        target=target,
        subject=optional_text(record, "subject"),
        rephrase=optional_text(record, "rephrase"),
        locality_prompt=optional_text(record, "loc"),
        locality_target=optional_text(record, "loc_ans"),
        portability=tuple(probes),
    )


def _fever(record: Record) -> Edit:
    return Edit(
        prompt=required_text(record, "prompt"),
        target=required_text(record, "alt"),
        subject=optional_text(record, "subject"),
        rephrase=first_text("equiv_prompt", record.get("equiv_prompt")),
        locality_prompt=optional_text(record, "unrel_prompt"),
        locality_target=optional_text(record, "unrel_ans"),
    )


_PLAIN_LOCALITY = ("locality_prompt", "locality_ground_truth")

# The order is that of detection: a layout comes before those whose fields it also has.
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "pyeditfast",
            (("prompt",), ("target",)),
            ("subject", "rephrase", "locality_prompt", "locality_target", "portability"),
            _pyeditfast,
        ),
        Layout(
            "zsre", (("src",), ("ans", "alt")), ("subject", "rephrase", "loc", "loc_ans"), _zsre
        ),
        Layout(
            "counterfact-rome",
            (("requested_rewrite",),),
            ("paraphrase_prompts", "neighborhood_prompts"),
            _counterfact_rome,
        ),
        Layout(
            "wikibigedit",
            (("update",), ("ans",)),
            ("subject", "rephrase", "loc", "loc_ans", "personas", "mhop", "mhop_ans"),
            _wikibigedit,
        ),
        Layout(
            "ultraeditbench",
            (("prompt",), ("ans",)),
            ("subject", "rephrase_prompt", "loc", "loc_ans"),
            _ultraeditbench,
        ),
        Layout(
            "fever",
            (("prompt",), ("alt",)),
            ("subject", "equiv_prompt", "unrel_prompt", "unrel_ans"),
            _fever,
        ),
        Layout(
            "hallucination",
            (("text", "prompt"), ("labels", "target_new")),
            ("subject", "concept", "locality", *_PLAIN_LOCALITY),
            _hallucination,
            marks=("text", "labels"),
        ),
        Layout(
            "knowedit",
            (("prompt",), ("target_new",)),
            ("subject", "rephrase_prompt", "rephrase", "locality", "portability"),
            _knowedit,
            marks=("locality", "portability"),
        ),
        Layout(
            "counterfact",
            (("prompt",), ("target_new",)),
            ("subject", "rephrase_prompt", *_PLAIN_LOCALITY),
            _counterfact,
        ),
    )
}

FORMATS: tuple[str, ...] = ("auto", *LAYOUTS)
"""Every name that `load_edits` takes as ``format``."""
