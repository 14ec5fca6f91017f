from __future__ import annotations

import dataclasses

import pytest

from pyeditfast.data import Edit, Probe


def test_edit_needs_only_prompt_and_target():
    edit = Edit("Where is Rome?", "Italy")
    assert dataclasses.astuple(edit) == ("Where is Rome?", "Italy", None, None, None, None, ())


def test_edit_is_frozen_hashable_and_has_no_other_attributes():
    edit = Edit("p", "t", portability=(Probe("q", "a"),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.prompt = "other"
    assert not hasattr(edit, "__dict__")
    assert len({edit, Edit("p", "t", portability=(Probe("q", "a"),))}) == 1


def test_empty_texts_are_left_to_the_editors():
    assert Edit("", "").prompt == ""
    assert Probe("", "").target == ""


def test_locality_prompt_and_target_are_independent():
    assert Edit("p", "t", locality_prompt="q").locality_target is None
    assert Edit("p", "t", locality_target="a").locality_prompt is None


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize(
    ("value", "shown"), [(None, "NoneType: None"), (7, "int: 7"), (["a"], r"list: \['a'\]")]
)
def test_required_text_has_its_type_checked(field, value, shown):
    arguments = {"prompt": "p", "target": "t", field: value}
    with pytest.raises(TypeError, match=rf"Edit\.{field} must be str, got {shown}"):
        Edit(**arguments)
    with pytest.raises(TypeError, match=rf"Probe\.{field} must be str, got {shown}"):
        Probe(**arguments)


@pytest.mark.parametrize("field", ["subject", "rephrase", "locality_prompt", "locality_target"])
def test_optional_text_has_its_type_checked(field):
    with pytest.raises(TypeError, match=rf"Edit\.{field} must be str or None, got float: 0\.5"):
        Edit("p", "t", **{field: 0.5})


def test_portability_must_be_a_tuple_of_probes():
    with pytest.raises(TypeError, match=r"portability must be a tuple of Probe, got list: \[\]"):
        Edit("p", "t", portability=[])
    with pytest.raises(TypeError, match=r"portability\[1\] must be a Probe, got tuple: \('q', 'a'"):
        Edit("p", "t", portability=(Probe("q", "a"), ("q", "a")))


def test_a_long_value_is_shortened_in_the_error():
    with pytest.raises(TypeError) as caught:
        Edit(["x" * 1000], "t")
    assert len(str(caught.value)) < 200
