"""Every published layout, field by field."""

from __future__ import annotations

import json

import pytest

from pyeditfast.data import FORMATS, Edit, Probe, load_edits
from pyeditfast.data.formats import LAYOUTS, detect_layout
from pyeditfast.errors import RecordError

MEND_ZSRE = {
    "src": "Where was Ada born?",
    "pred": "Paris",
    "rephrase": "In which city was Ada born?",
    "alt": "Oslo",
    "answers": ["London", "London, England"],
    "loc": "nq question: who wrote emma",
    "loc_ans": "Jane Austen",
    "cond": "London >> Oslo || Where was Ada born?",
}
ULTRAEDIT_ZSRE = {
    "subject": "Ada",
    "src": "Where was Ada born?",
    "rephrase": "In which city was Ada born?",
    "ans": "London",
    "loc": "nq question: who wrote emma",
    "loc_ans": "Jane Austen",
}
COUNTERFACT = {
    "case_id": 3,
    "prompt": "Ada speaks",
    "target_new": "Norse",
    "subject": "Ada",
    "ground_truth": "English",
    "rephrase_prompt": "The language of Ada is",
    "locality_prompt": "Emma speaks",
    "locality_ground_truth": "French",
}
ROME_COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} speaks",
        "relation_id": "P103",
        "target_new": {"str": "Norse", "id": "Q1"},
        "target_true": {"str": "English", "id": "Q2"},
        "subject": "Ada",
    },
    "paraphrase_prompts": ["The language of Ada is", "Ada talks in"],
    "neighborhood_prompts": ["Emma speaks", "Bob speaks"],
    "attribute_prompts": ["Olaf speaks"],
}
KNOWEDIT = {
    "subject": "Ada",
    "prompt": "The child of Ada is",
    "target_new": "Byron",
    "ground_truth": ["Anne"],
    "rephrase_prompt": "Who is the child of Ada?",
    "locality": {
        "Forgetfulness": [{"prompt": "not Byron", "ground_truth": [["Anne"]]}],
        "Relation_Specificity": [
            {"prompt": "no answer", "ground_truth": [[]]},
            {"prompt": "The spouse of Ada is", "ground_truth": [[], ["William", "Will"]]},
        ],
    },
    "portability": {
        "Reasoning": [
            {"prompt": "The grandchild of Ada is", "ground_truth": "Judith"},
            {"prompt": "nothing known", "ground_truth": []},
        ],
        "Logical_Generalization": [],
        "Subject_Aliasing": [{"prompt": "The child of A. L. is", "ground_truth": ["Byron"]}],
    },
}
ULTRAEDITBENCH = {
    "case_id": 0,
    "prompt": "Ada's field?",
    "rephrase_prompt": "What did Ada study?",
    "ans": "mathematics",
    "subject": "Ada",
    "loc": "Emma's field?",
    "loc_ans": "music",
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Ada",
    "update": "Who employs Ada?",
    "rephrase": "Where does Ada work?",
    "personas": "Tell me, mate, who employs Ada?",
    "ans": "the museum",
    "loc": "Who employs Emma?",
    "loc_ans": "the theatre",
    "mhop": "In which city is Ada's employer?",
    "mhop_ans": "London",
}
FEVER = {
    "prompt": "Ada was a painter.",
    "equiv_prompt": ["Ada painted.", "Painting was Ada's work."],
    "unrel_prompt": "Emma is a novel.",
    "alt": "SUPPORTS",
    "ans": None,
    "unrel_ans": "REFUTES",
}
WIKIBIO = {
    "text": "This is a passage about ada. ",
    "labels": "Ada was born in 1815.",
    "concept": "ada",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The place of death of ada is", "ground_truth": ["London"]},
            {"prompt": "ada place of death", "ground_truth": ["London"]},
        ]
    },
}
FLAT_HALLUCINATION = {
    "prompt": "This is a passage about ada.",
    "target_new": "Ada was born in 1815.",
    "subject": "ada",
    "locality_prompt": "Emma was written",
    "locality_ground_truth": "by Jane Austen",
}
OWN = {
    "prompt": "p",
    "target": "t",
    "subject": "s",
    "rephrase": "r",
    "locality_prompt": "lp",
    "locality_target": "lt",
    "portability": [{"prompt": "q", "target": "a"}, {"prompt": "q2", "target": "a2"}],
}

EXPECTED = {
    "zsre mend": (
        "zsre",
        MEND_ZSRE,
        Edit(
            prompt="Where was Ada born?",
            target="Oslo",
            rephrase="In which city was Ada born?",
            locality_prompt="nq question: who wrote emma",
            locality_target="Jane Austen",
        ),
    ),
    "zsre ultraedit": (
        "zsre",
        ULTRAEDIT_ZSRE,
        Edit(
            prompt="Where was Ada born?",
            target="London",
            subject="Ada",
            rephrase="In which city was Ada born?",
            locality_prompt="nq question: who wrote emma?",
            locality_target="Jane Austen",
        ),
    ),
    "counterfact": (
        "counterfact",
        COUNTERFACT,
        Edit(
            prompt="Ada speaks",
            target="Norse",
            subject="Ada",
            rephrase="The language of Ada is",
            locality_prompt="Emma speaks",
            locality_target="French",
        ),
    ),
    "counterfact-rome": (
        "counterfact-rome",
        ROME_COUNTERFACT,
        Edit(
            prompt="Ada speaks",
            target="Norse",
            subject="Ada",
            rephrase="The language of Ada is",
            locality_prompt="Emma speaks",
            locality_target="English",
        ),
    ),
    "knowedit": (
        "knowedit",
        KNOWEDIT,
        Edit(
            prompt="The child of Ada is",
            target="Byron",
            subject="Ada",
            rephrase="Who is the child of Ada?",
            locality_prompt="The spouse of Ada is",
            locality_target="William",
            portability=(
                Probe("The grandchild of Ada is", "Judith"),
                Probe("The child of A. L. is", "Byron"),
            ),
        ),
    ),
    "ultraeditbench": (
        "ultraeditbench",
        ULTRAEDITBENCH,
        Edit(
            prompt="Ada's field?",
            target="mathematics",
            subject="Ada",
            rephrase="What did Ada study?",
            locality_prompt="Emma's field?",
            locality_target="music",
        ),
    ),
    "wikibigedit": (
        "wikibigedit",
        WIKIBIGEDIT,
        Edit(
            prompt="Who employs Ada?",
            target="the museum",
            subject="Ada",
            rephrase="Where does Ada work?",
            locality_prompt="Who employs Emma?",
            locality_target="the theatre",
            portability=(
                Probe("Tell me, mate, who employs Ada?", "the museum"),
                Probe("In which city is Ada's employer?", "London"),
            ),
        ),
    ),
    "fever": (
        "fever",
        {key: value for key, value in FEVER.items() if key != "ans"},
        Edit(
            prompt="Ada was a painter.",
            target="SUPPORTS",
            rephrase="Ada painted.",
            locality_prompt="Emma is a novel.",
            locality_target="REFUTES",
        ),
    ),
    "hallucination nested": (
        "hallucination",
        WIKIBIO,
        Edit(
            prompt="This is a passage about ada. ",
            target="Ada was born in 1815.",
            subject="ada",
            locality_prompt="The place of death of ada is",
            locality_target="London",
        ),
    ),
    "pyeditfast": (
        "pyeditfast",
        OWN,
        Edit("p", "t", "s", "r", "lp", "lt", (Probe("q", "a"), Probe("q2", "a2"))),
    ),
}


def uniform_ground_truth(members):
    """Makes every ground truth a list of lists: a Parquet column has one type."""
    answers = members.get("ground_truth")
    if isinstance(answers, str):
        members["ground_truth"] = [[answers]]
    elif answers and isinstance(answers[0], str):
        members["ground_truth"] = [answers]
    return members


def only(path, **arguments):
    (edit,) = load_edits(path, **arguments)
    return edit


@pytest.mark.parametrize("container", ["array", "lines", "parquet"])
@pytest.mark.parametrize("case", EXPECTED)
def test_layout_is_read_field_by_field_and_detected(case, container, write):
    layout, record, expected = EXPECTED[case]
    if container == "parquet" and layout == "knowedit":
        record = json.loads(json.dumps(record), object_hook=uniform_ground_truth)
    path = write([record], container)
    assert only(path, format=layout) == expected
    assert only(path) == expected
    assert detect_layout(record).name == layout


def test_every_layout_has_a_case():
    assert {layout for layout, _, _ in EXPECTED.values()} == set(LAYOUTS)
    assert list(FORMATS) == ["auto", *LAYOUTS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_optional_fields_may_be_missing_null_or_nan(layout, write):
    record = next(record for name, record, _ in EXPECTED.values() if name == layout)
    required = {name for group in LAYOUTS[layout].required for name in group}
    bare = {key: value for key, value in record.items() if key in required}
    for filler in ({}, dict.fromkeys(LAYOUTS[layout].optional, None)):
        edit = only(write([{**bare, **filler}]), format=layout)
        assert edit.rephrase is None
        assert edit.locality_prompt is None
        assert edit.locality_target is None
        assert edit.portability == ()
    nan = dict.fromkeys(LAYOUTS[layout].optional, float("nan"))
    assert only(write([{**bare, **nan}]), format=layout) == edit


def test_hallucination_flat_layout(write):
    path = write([FLAT_HALLUCINATION])
    expected = Edit(
        prompt="This is a passage about ada.",
        target="Ada was born in 1815.",
        subject="ada",
        locality_prompt="Emma was written",
        locality_target="by Jane Austen",
    )
    assert only(path, format="hallucination") == expected
    assert only(path) == expected


def test_zsre_takes_the_true_answer_of_a_record_that_has_both(write):
    edit = only(write([{**MEND_ZSRE, "ans": "London"}]))
    assert (edit.target, edit.locality_prompt) == ("London", "nq question: who wrote emma?")
    edit = only(write([{**MEND_ZSRE, "ans": None}]))
    assert (edit.target, edit.locality_prompt) == ("Oslo", "nq question: who wrote emma")


def test_zsre_question_mark_is_not_doubled(write):
    assert only(write([{**ULTRAEDIT_ZSRE, "loc": "who?"}])).locality_prompt == "who?"


def test_rome_braces_in_a_subject_or_template_are_text(write):
    braces = {"subject": "{0} {x}", "prompt": "In {y}, {} speaks"}
    rewrite = {**ROME_COUNTERFACT["requested_rewrite"], **braces}
    assert only(write([{"requested_rewrite": rewrite}])).prompt == "In {y}, {0} {x} speaks"


def test_knowedit_takes_forgetfulness_if_nothing_else_has_an_answer(write):
    locality = {
        "Relation_Specificity": [{"prompt": "a", "ground_truth": [["  "]]}],
        "Forgetfulness": [{"prompt": ["b", "c"], "ground_truth": "x"}],
    }
    edit = only(write([{**KNOWEDIT, "locality": locality}]))
    assert (edit.locality_prompt, edit.locality_target) == ("b", "x")


def test_knowedit_keeps_a_locality_prompt_without_any_answer(write):
    locality = {"Relation_Specificity": [{"prompt": "a", "ground_truth": [[]]}, {"prompt": "b"}]}
    edit = only(write([{**KNOWEDIT, "locality": locality}]))
    assert (edit.locality_prompt, edit.locality_target) == ("a", None)


def test_knowedit_without_locality_and_portability(write):
    edit = only(write([{**KNOWEDIT, "locality": {}, "portability": {}}]))
    assert (edit.locality_prompt, edit.locality_target, edit.portability) == (None, None, ())


def test_wikibigedit_without_multi_hop(write):
    for missing in ({"mhop": None, "mhop_ans": None}, {"mhop": "asked", "mhop_ans": None}):
        edit = only(write([{**WIKIBIGEDIT, **missing}]))
        assert edit.portability == (Probe("Tell me, mate, who employs Ada?", "the museum"),)


def test_fever_with_one_equivalent_prompt(write):
    record = {**EXPECTED["fever"][1], "equiv_prompt": "Ada painted."}
    assert only(write([record])).rephrase == "Ada painted."


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_required_field_is_named_with_the_keys(layout, write):
    record = next(record for name, record, _ in EXPECTED.values() if name == layout)
    for group in LAYOUTS[layout].required:
        damaged = {key: value for key, value in record.items() if key not in group}
        path = write([record, {**damaged, "odd": 1}])
        stream = load_edits(path, format=layout)
        next(stream)
        with pytest.raises(RecordError) as caught:
            next(stream)
        text = str(caught.value)
        assert text.startswith(
            f"{path}: index 1: field '{group[0]}'"
            if len(group) == 1
            else f"{path}: index 1: field "
        )
        assert all(f"'{name}'" in text for name in group)
        assert "is missing; the keys are " in text
        assert "'odd'" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_that_is_read_has_its_type_checked(layout, write):
    record = next(record for name, record, _ in EXPECTED.values() if name == layout)
    for field in LAYOUTS[layout].fields & set(record):
        path = write([{**record, field: 42}])
        with pytest.raises(RecordError) as caught:
            list(load_edits(path, format=layout))
        text = str(caught.value)
        assert text.startswith(f"{path}: index 0: field '{field}' must be ")
        assert text.endswith("got number: 42")


@pytest.mark.parametrize(
    ("layout", "record", "text"),
    [
        (
            "pyeditfast",
            {**OWN, "portability": [{"prompt": "q", "target": "a"}, {"prompt": "q"}]},
            "field 'portability[1].target' is missing; the keys are 'prompt'",
        ),
        (
            "pyeditfast",
            {**OWN, "portability": ["q"]},
            "field 'portability[0]' must be an object, got text: 'q'",
        ),
        (
            "pyeditfast",
            {**OWN, "portability": [{"prompt": None, "target": "a"}]},
            "field 'portability[0].prompt' must be text, got null",
        ),
        (
            "knowedit",
            {**KNOWEDIT, "locality": {"Reasoning": [{"ground_truth": "a"}]}},
            "field 'locality.Reasoning[0].prompt' is missing; the keys are 'ground_truth'",
        ),
        (
            "knowedit",
            {**KNOWEDIT, "portability": {"Reasoning": [{"prompt": "p", "ground_truth": [[3]]}]}},
            "field 'portability.Reasoning[0].ground_truth' must be text, got number: 3",
        ),
        (
            "knowedit",
            {**KNOWEDIT, "locality": {"Reasoning": {"prompt": "p"}}},
            "field 'locality.Reasoning' must be a list of objects, got object: {'prompt': 'p'}",
        ),
        (
            "counterfact-rome",
            {"requested_rewrite": {"prompt": "speaks", "subject": "Ada"}},
            "field 'requested_rewrite.prompt' has no {} for the subject: 'speaks'",
        ),
        (
            "counterfact-rome",
            {"requested_rewrite": {"prompt": "{} speaks", "subject": "Ada"}},
            "field 'requested_rewrite.target_new' is missing; the keys are 'prompt', 'subject'",
        ),
        (
            "counterfact-rome",
            {"requested_rewrite": {"prompt": "{}", "subject": "Ada", "target_new": {"str": 1}}},
            "field 'requested_rewrite.target_new.str' must be text, got number: 1",
        ),
    ],
)
def test_a_nested_field_is_named_by_its_path(layout, record, text, write):
    path = write([record])
    with pytest.raises(RecordError) as caught:
        list(load_edits(path, format=layout))
    assert str(caught.value) == f"{path}: index 0: {text}"


def test_a_null_required_field_is_named(write):
    path = write([COUNTERFACT, {**COUNTERFACT, "target_new": None}], "lines")
    with pytest.raises(RecordError) as caught:
        list(load_edits(path))
    assert str(caught.value) == (
        f"{path}: line 2 (index 1): field 'target_new' must be text, got null"
    )


@pytest.mark.parametrize("container", ["array", "lines", "parquet"])
def test_unknown_keys_list_the_known_layouts(container, write):
    path = write([{"question": "q", "reply": "a"}], container)
    with pytest.raises(RecordError) as caught:
        list(load_edits(path, on_error="skip", report=lambda error: None))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "no known layout has the keys 'question', 'reply'" in text
    assert "zsre (src, ans|alt)" in text
    assert "knowedit (prompt, target_new, locality|portability)" in text
    assert all(name in text for name in LAYOUTS)


def test_the_layout_is_that_of_the_first_record(write):
    path = write([ULTRAEDITBENCH, COUNTERFACT])
    stream = load_edits(path)
    next(stream)
    with pytest.raises(
        RecordError, match=r"index 1: field 'ans' is missing; the keys are 'case_id'"
    ):
        next(stream)
