"""WISE (arXiv 2405.14768): edits in side memories, and a router that sends queries to them."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyeditfast.data.edit import Edit
from pyeditfast.editors import wise_files
from pyeditfast.editors.interrupts import interrupt_held_back
from pyeditfast.editors.presets import default_wise_module
from pyeditfast.editors.report import EditReport, Rejection, counted
from pyeditfast.editors.side_memories import SideMemories, SideMemory, WrittenEdit
from pyeditfast.editors.turns import Turn, gather_turns
from pyeditfast.editors.wise_config import SLOT, WiseConfig
from pyeditfast.editors.wise_graph import StepGraphs
from pyeditfast.editors.wise_module import gap_activation, require_feed_forward, require_unrouted
from pyeditfast.editors.wise_past import PastEdits
from pyeditfast.editors.wise_prompts import PromptBuilder, pad_token, sample_templates
from pyeditfast.editors.wise_routes import explanation, reasons_not_routed
from pyeditfast.editors.wise_thresholds import Calibration, calibrate
from pyeditfast.editors.wise_training import EditQueries, SideMemoryTraining
from pyeditfast.errors import EditRejectedError
from pyeditfast.model.capture import frozen
from pyeditfast.model.edit_modules import find_edit_modules
from pyeditfast.model.memory import is_out_of_memory, peak_memory, reset_peak_memory
from pyeditfast.model.query_batch import Query
from pyeditfast.model.query_gaps import prompt_gaps
from pyeditfast.model.query_routing import Route
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.sequences import context_length, vocabulary_size
from pyeditfast.model.wise_linear import WiseLinear, install, remove
from pyeditfast.ops import MOST_IN_A_KERNEL
from pyeditfast.phases import PhaseClock

logger = logging.getLogger(__name__)


class WiseEditor:
    """Writes edits into side memories of one module of a causal language model, and routes.

    ``model`` is any Transformers causal language model with ``nn.Linear`` or ``Conv1D`` MLPs in
    bf16, fp16 or float32; ``tokenizer`` is its own. The module ``config.edit_module`` is replaced
    by a ``WiseLinear``, which answers as it did until an edit is made; ``detach`` puts it back. The
    main memory is never changed. Raises ``UnknownModuleError``, ``UnsupportedWeightError`` or
    ``ValueError`` for a module that cannot be edited.

    Memory beside the model: a matrix of the module's size for each side memory, be it trained,
    waiting for a merge or merged. While a batch is trained also a copy of what its steps can
    change, so that one that fails is undone: ``mask_ratio`` of a matrix in 16 bits, a whole one in
    float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: WiseConfig | None = None,
    ) -> None:
        config = config if config is not None else WiseConfig()
        if not isinstance(config, WiseConfig):
            raise TypeError(f"config is a {type(config).__name__}; a WiseConfig is needed")
        require_unrouted(model)
        if config.chat_template and not tokenizer.chat_template:
            raise ValueError("chat_template is set, and the tokenizer has no chat template")
        if config.edit_module is None:
            config = dataclasses.replace(config, edit_module=default_wise_module(model))
            logger.info("edit_module not given; editing %s", config.edit_module)
        assert config.edit_module is not None
        module = find_edit_modules(model, [config.edit_module])[0]
        require_feed_forward(config.edit_module)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.runner = ModelRunner(model)
        self.templates = config.templates
        self.memories = SideMemories(module.weight, config)
        self.edits = 0
        self.records = 0
        self.calibrations: list[Calibration] = []
        self._past = PastEdits(config)
        self._graphs = StepGraphs()
        self._module_name = config.edit_module
        self._activation = gap_activation(model, config.activation)
        self.layer: WiseLinear = install(
            model, config.edit_module, activation=self._activation, reduction=config.reduction
        )

    def edit(
        self,
        edits: Iterable[Edit],
        *,
        strict: bool = False,
        progress: bool = False,
        total: int | None = None,
        report: EditReport | None = None,
    ) -> EditReport:
        """Carry out ``edits``, ``config.batch_size`` at a time, and report.

        Any iterable, read as it goes. An edit that cannot be used, or whose loss is not finite, is
        left out and reported; with ``strict`` it raises ``EditRejectedError`` instead. Edits that
        the router does not send to a side memory by their prompt alone are reported as
        ``not_routed``. ``records`` counts what was read, rejected edits included. An interrupt is
        delivered between two batches. Raises ``ValueError`` after ``detach``.
        """
        report = report if report is not None else EditReport()
        self._require_attached()
        self._follow_the_model()
        clock = PhaseClock(self.runner.devices)
        reset_peak_memory(self.runner.devices)
        if total is None and isinstance(edits, Sequence):
            total = len(edits)
        start = time.perf_counter()
        written: list[tuple[int, WrittenEdit]] = []
        bar = tqdm(total=total, unit="edit", desc="WISE", disable=not progress)
        # A caller's inference mode would forbid the gradients.
        with bar, torch.inference_mode(False):
            builder = self._builder()
            turns = gather_turns(
                edits,
                self.tokenizer,
                self.config.batch_size,
                context_length(self.model),
                vocabulary_size(self.model),
            )
            try:
                first = self.records
                for turn in turns:
                    before = self.records
                    try:
                        self._run_turn(turn, builder, strict, clock, first, written)
                    finally:
                        # A held back interrupt arrives when the batch is done.
                        if self.records > before:
                            report.edits += len(turn.edits)
                            report.turns += bool(turn.edits)
                            report.rejected.extend(turn.rejected)
                            bar.update(turn.consumed)
            finally:
                with clock.phase("routes"):
                    self._settle_routes(builder, written, report)
                report.seconds = {**clock.seconds(), "total": time.perf_counter() - start}
                report.peak_memory_bytes = peak_memory(self.runner.devices)
        return report

    def _follow_the_model(self) -> None:
        """Take the memories from the model, which may have been moved or converted."""
        self.memories.main = self.layer.main.detach()
        for memory, weight in zip(self.memories.all(), self.layer.side_weights, strict=True):
            memory.weight = weight

    def _builder(self) -> PromptBuilder:
        if self.templates is None:
            with frozen(self.model), self.layer.suspended():
                self.templates = sample_templates(self.model, self.tokenizer, self.config.seed)
            logger.info("templates: %s", self.templates)
        return PromptBuilder(self.model, self.tokenizer, self.config, self.templates)

    def _run_turn(
        self,
        turn: Turn,
        builder: PromptBuilder,
        strict: bool,
        clock: PhaseClock,
        first: int,
        written: list[tuple[int, WrittenEdit]],
    ) -> None:
        """Carry out a batch and add its edits to ``written``; ``first`` records were read before
        this run.
        """
        queries: dict[int, EditQueries] = {}
        texts: dict[int, WrittenEdit] = {}
        with clock.phase("tokenize"):
            for index, edit in list(turn.edits.items()):
                locality_prompt = builder.locality_prompt(edit, first + index)
                built = builder.edit_queries(edit, locality_prompt)
                if isinstance(built, str):
                    turn.reject(index, built)
                    continue
                queries[index] = built
                texts[index] = WrittenEdit(edit, locality_prompt)
        _raise_if(strict, turn)
        if not queries:
            self.records += turn.consumed
            return
        with interrupt_held_back():
            try:
                self._train(turn, builder, queries, texts, clock)
            finally:
                self.memories.end_batch()
            written.extend((index, texts[index]) for index in turn.edits)
            self.edits += len(turn.edits)
            self.records += turn.consumed
            try:
                with clock.phase("merge"):
                    self.memories.close_shard_if_full()
            finally:
                self._publish()
        _raise_if(strict, turn)

    def _train(
        self,
        turn: Turn,
        builder: PromptBuilder,
        queries: dict[int, EditQueries],
        texts: dict[int, WrittenEdit],
        clock: PhaseClock,
    ) -> None:
        try:
            with frozen(self.model), self.layer.suspended():
                with clock.phase("prefix"):
                    memory = self.memories.trainable()
                    training = SideMemoryTraining(
                        self.runner,
                        self._module_name,
                        self.memories.main,
                        memory.weight,
                        self._bias(),
                        self.config,
                        self._activation,
                        list(queries.values()),
                        self._past.draw(self.memories, builder, self.edits),
                        pad_token=pad_token(self.tokenizer),
                        graphs=self._graphs,
                    )
                with clock.phase("steps"):
                    outcome = training.run(self.memories.mask_seed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for index in queries:
                turn.reject(index, f"out of memory: {str(error).splitlines()[0]}")
            return
        if not outcome.finite:
            steps = counted(outcome.steps, "step")
            for index in queries:
                turn.reject(index, f"the loss is not finite after {steps}; the edit was undone")
            return
        for index, gap in zip(queries, outcome.in_gaps, strict=True):
            memory.note(gap, texts[index], self.config.act_ratio)

    def _bias(self) -> Tensor | None:
        bias = self.layer.bias
        return None if bias is None else bias.detach()

    def _publish(self) -> None:
        """Let the router know the memories as they are."""
        memories = self.memories.all()
        if len(memories) > MOST_IN_A_KERNEL >= len(self.layer.side_weights):
            logger.warning(
                "%d side memories are more than the GPU kernels take (%d); "
                "they are routed without them, which is slower",
                len(memories),
                MOST_IN_A_KERNEL,
            )
        self.layer.set_memories(
            [memory.weight for memory in memories], [memory.threshold for memory in memories]
        )

    def _settle_routes(
        self, builder: PromptBuilder, written: list[tuple[int, WrittenEdit]], report: EditReport
    ) -> None:
        """Calibrate where that is wanted, and note which edits no side memory answers."""
        if not written:
            return
        if self.config.calibrate:
            self._calibrate(builder)
            report.calibrations = list(self.calibrations)
        edits = [edit for _, edit in written]
        prompts = [builder.prompt_query(edit.edit.prompt) for edit in edits]
        queries = [query for query in prompts if isinstance(query, Query)]
        memories = self.memories.all()
        gaps = self._gaps(queries, memories)
        reasons = reasons_not_routed(edits, memories, gaps, self.layer.thresholds)
        for (index, edit), reason in zip(written, reasons, strict=True):
            if reason is not None:
                report.not_routed.append(
                    Rejection(index, edit.edit.prompt, edit.edit.target, reason)
                )

    def _calibrate(self, builder: PromptBuilder) -> None:
        self.calibrations = []
        for memory in self.memories.all():
            inside = [builder.prompt_query(edit.edit.prompt) for edit in memory.edits]
            outside = [builder.prompt_query(edit.locality_prompt) for edit in memory.edits]
            queries = [query for query in (*inside, *outside) if isinstance(query, Query)]
            gaps = self._gaps(queries, [memory])[:, 0].tolist()
            result = calibrate(gaps[: len(inside)], gaps[len(inside) :])
            memory.threshold = result.threshold
            self.calibrations.append(result)
        self._publish()

    def _gaps(self, queries: Sequence[Query], memories: Sequence[SideMemory]) -> Tensor:
        """Return the gaps ``[queries, memories]`` of prompts."""
        self._follow_the_model()
        with frozen(self.model), self.layer.suspended():
            return prompt_gaps(
                self.runner,
                self._module_name,
                queries,
                self.memories.main,
                [memory.weight for memory in memories],
                bias=self._bias(),
                activation=self._activation,
                reduction=self.config.reduction,
                pad_token=pad_token(self.tokenizer),
            )

    def routes(self) -> list[Route]:
        """Return the memory, the gaps and the thresholds of each row of the model's last query."""
        return self.layer.routes()

    def explain(self, prompt: str) -> str:
        """Return, for a person, which memory answers ``prompt`` and why."""
        # Templates play no part; sampling them would be a surprise.
        builder = PromptBuilder(self.model, self.tokenizer, self.config, self.templates or (SLOT,))
        query = builder.prompt_query(prompt)
        if isinstance(query, str):
            raise ValueError(query)
        memories = self.memories.all()
        gaps = self._gaps([query], memories)[0].tolist() if memories else []
        return explanation(gaps, memories)

    def detach(self) -> PreTrainedModel:
        """Take the side memories off the model, which is then as it was before, and return it.

        Raises ``ValueError`` where that was done already.
        """
        self._require_attached()
        remove(self.model, self._module_name)
        return self.model

    def _require_attached(self) -> None:
        if self.model.get_submodule(self._module_name) is not self.layer:
            raise ValueError(
                f"{self._module_name} of the model no longer holds these side memories; they were "
                "detached: save them and load them on a model"
            )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the side memories and the editor's state to ``directory`` (safetensors and JSON).

        Only what differs from the base model is written; ``WiseEditor.load(directory)`` or
        ``pyeditfast.load_model(directory)`` puts it on the base model again.
        """
        self._follow_the_model()
        wise_files.save(Path(directory), self)

    def export(self, directory: str | os.PathLike[str]) -> None:
        """Write a plain checkpoint whose module has the weight of the one side memory.

        It needs no pyeditfast and has no router: every query is answered by the side memory. Raises
        ``ValueError`` unless there is exactly one.
        """
        self._follow_the_model()
        wise_files.export(Path(directory), self)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | None = None,
    ) -> WiseEditor:
        """Return the editor that ``save`` wrote, with its side memories on ``model``.

        Without ``model`` the base model is loaded by the name it had, in ``dtype`` on ``device``.
        Raises ``FileNotFoundError`` for a directory that ``save`` did not write, or whose base
        model is gone, and ``ValueError`` for a base model with other weights.
        """
        return wise_files.load(cls, Path(directory), model, dtype=dtype, device=device)

    def restore(
        self,
        memories: SideMemories,
        templates: tuple[str, ...] | None,
        edits: int,
        records: int,
    ) -> None:
        """Take over a saved state."""
        self.memories = memories
        self.templates = templates
        self.edits, self.records = edits, records
        self._publish()


def _raise_if(strict: bool, turn: Turn) -> None:
    if strict and turn.rejected:
        raise EditRejectedError(str(turn.rejected[0]))
