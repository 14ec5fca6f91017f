"""Past edits that a side memory is trained on again (WISE, arXiv 2405.14768, appendix B.3)."""

from __future__ import annotations

import random

from pyeditfast.editors.side_memories import SideMemories, WrittenEdit
from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.editors.wise_prompts import PromptBuilder
from pyeditfast.editors.wise_training import PastQueries
from pyeditfast.model.query_batch import Query


class PastEdits:
    """Draws the past edits of each batch: one of every merged memory, which the memory in training
    shall leave to that one, and one of its own, which it shall keep.

    Published code draws anew at every step and runs the whole model for each; here one draw serves
    all steps of a batch, so that its prefix is run once.
    """

    def __init__(self, config: WiseConfig) -> None:
        self.config = config

    def draw(
        self, memories: SideMemories, builder: PromptBuilder, edits: int
    ) -> PastQueries | None:
        """Return the sequences to train on beside edit number ``edits``, None without any."""
        if not (self.config.replay and self.config.retrieve and memories.merged):
            return None
        chance = random.Random(f"replay {self.config.seed} {edits}")
        others = [
            self._sequences(builder, chance.choice(memory.edits)) for memory in memories.merged
        ]
        own: list[WrittenEdit] = [edit for shard in memories.shards for edit in shard.edits]
        if memories.current is not None:
            own += memories.current.edits
        return PastQueries(others, self._sequences(builder, chance.choice(own)) if own else [])

    def _sequences(self, builder: PromptBuilder, written: WrittenEdit) -> list[Query]:
        built = builder.edit_queries(written.edit, written.locality_prompt)
        # It was trained on once, so it can be built.
        assert not isinstance(built, str), built
        return built.sequences
