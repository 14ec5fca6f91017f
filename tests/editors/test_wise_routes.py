"""Which edits reach the side memory that holds them, and what a person is told."""

from __future__ import annotations

import torch
from wise_worlds import EDITS, editor

from pyeditfast.editors.side_memories import SideMemory, WrittenEdit
from pyeditfast.editors.wise_routes import reasons_not_routed


def test_an_edit_has_to_reach_the_memory_that_holds_it():
    # Two equal edits, written twice, are told apart.
    edits = [WrittenEdit(edit, "x") for edit in (*EDITS[:3], EDITS[0])]
    memories = [
        SideMemory(torch.zeros(1, 1), 2.0, 2.0, edits[:2]),
        SideMemory(torch.zeros(1, 1), 3.0, 3.0, edits[2:]),
    ]
    gaps = torch.tensor([[2.5, 2.9], [2.5, 3.5], [1.0, 2.9], [2.5, 2.9]])
    assert reasons_not_routed(edits, memories, gaps, torch.tensor([2.0, 3.0])) == [
        None,
        "side memory 0 holds it; side memory 1 answers",
        "its gap passes no threshold; the main memory answers",
        "side memory 1 holds it; side memory 0 answers",
    ]


def test_the_report_tells_what_explain_tells():
    wise = editor(save_freq=1, merge_freq=100, act_ratio=0.3)
    report = wise.edit(EDITS)
    told = {item.index: item.reason for item in report.not_routed}
    for number, edit in enumerate(EDITS):
        answers = wise.explain(edit.prompt).splitlines()[0]
        if number in told:
            assert told[number].endswith(answers)
        else:
            assert answers == f"side memory {number} answers"
    # Both kinds are there, else this shows nothing.
    assert 0 < len(told) < len(EDITS)
