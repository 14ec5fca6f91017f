"""Where queries go, for a person: edits that do not reach their side memory, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyeditfast.editors.report import counted
from pyeditfast.editors.side_memories import SideMemory, WrittenEdit
from pyeditfast.ops import choose_route


def reasons_not_routed(
    edits: Sequence[WrittenEdit], memories: Sequence[SideMemory], gaps: Tensor, thresholds: Tensor
) -> list[str | None]:
    """Return for each edit why its prompt does not go to the memory that holds it, None where it
    does; ``gaps`` ``[edits, memories]``, ``thresholds`` ``[memories]``.
    """
    holders = {id(edit): number for number, memory in enumerate(memories) for edit in memory.edits}
    routes = choose_route(gaps, thresholds.to(gaps.device)).tolist()
    reasons: list[str | None] = []
    for edit, route in zip(edits, routes, strict=True):
        holder = holders[id(edit)]
        if route == holder:
            reasons.append(None)
        elif route < 0:
            reasons.append("its gap passes no threshold; the main memory answers")
        else:
            reasons.append(f"side memory {holder} holds it; side memory {route} answers")
    return reasons


def explanation(gaps: Sequence[float], memories: Sequence[SideMemory]) -> str:
    """Return which of ``memories`` answers a query with ``gaps``, one a memory, and why."""
    if not memories:
        return "main memory: no edit has been made"
    above = [gap > memory.threshold for gap, memory in zip(gaps, memories, strict=True)]
    best = max(range(len(gaps)), key=lambda number: (above[number], gaps[number]))
    lines = [f"side memory {best} answers" if above[best] else "the main memory answers"]
    for number, memory in enumerate(memories):
        relation = ">" if above[number] else "<="
        lines.append(
            f"  side memory {number} ({counted(len(memory.edits), 'edit')}): "
            f"gap {gaps[number]:.4g} {relation} threshold {memory.threshold:.4g}"
        )
    return "\n".join(lines)
