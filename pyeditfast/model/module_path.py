"""Where a module lies in its model: its block, and what runs before it and behind it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pyeditfast.errors import UnsupportedWeightError

OUTPUT = ("o_proj", "out_proj")
"""Attention's last linear layer."""

QUERIES = ("q_proj",)
"""Attention's linear layer for queries."""


@dataclass(frozen=True)
class ModulePath:
    """Where the module ``name`` lies: its ``block``, the blocks ``before`` it, and the parts
    ``beside`` it in its block. ``last``: the parts of the model's last block that work on each
    position by itself and whose output is read at answer positions alone; ``last_attention``: the
    attention whose output is too, though it does not; ``last_queries``: what makes its queries,
    which are too unless something like a short convolution comes behind.
    """

    name: str
    module: nn.Module
    block: nn.Module
    before: list[nn.Module]
    beside: list[nn.Module]
    last: list[nn.Module]
    last_attention: list[nn.Module]
    last_queries: list[nn.Module]


def module_path(model: PreTrainedModel, name: str) -> ModulePath:
    """Return where the module ``name`` lies.

    Raises ``UnsupportedWeightError`` for a module that is not inside a block of the model.
    """
    parts = name.split(".")
    lists = [
        place
        for place in range(len(parts))
        if isinstance(model.get_submodule(".".join(parts[:place])), nn.ModuleList)
    ]
    if not lists:
        raise UnsupportedWeightError(f"{name} is not inside one of the model's blocks")
    place = lists[0]
    blocks = list(model.get_submodule(".".join(parts[:place])).children())
    number = int(parts[place])
    beside = []
    for depth in range(place + 1, len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        beside += [child for label, child in parent.named_children() if label != parts[depth]]
    read = ([], [], []) if number == len(blocks) - 1 else _read_at_answers(blocks[-1])
    module = model.get_submodule(name)
    return ModulePath(name, module, blocks[number], blocks[:number], beside, *read)


def _read_at_answers(
    block: nn.Module,
) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Return ``last``, ``last_attention`` and ``last_queries`` of the last ``block``."""

    def children(parent: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
        found = [part for name, part in parent.named_children() if name in names]
        return [part for part in found if len(inspect.signature(part.forward).parameters) == 1]

    attention = [parent for parent in block.modules() if children(parent, OUTPUT)]
    if len(attention) > 1:
        # One may read what another gives elsewhere.
        attention = []
    outputs, queries = (
        [part for parent in attention for part in children(parent, names)]
        for names in (OUTPUT, QUERIES)
    )
    return children(block, ("mlp",)) + outputs, attention, queries
