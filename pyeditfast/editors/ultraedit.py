"""UltraEdit (arXiv 2505.14679): closed-form lifelong editing, a turn of edits at a time."""

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

from pyeditfast import checkpoints
from pyeditfast.data.edit import Edit
from pyeditfast.editors.interrupts import interrupt_held_back
from pyeditfast.editors.presets import default_modules
from pyeditfast.editors.report import EditReport
from pyeditfast.editors.turns import Turn, gather_turns
from pyeditfast.editors.ultraedit_config import UltraEditConfig
from pyeditfast.errors import EditRejectedError, NumericalError, PassTooLargeError
from pyeditfast.model.edit_modules import EditModule, find_edit_modules
from pyeditfast.model.gradients import TurnGradients, turn_gradients
from pyeditfast.model.memory import peak_memory, reset_peak_memory
from pyeditfast.model.passes import longest_first
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.sequences import AnswerSequence, context_length, vocabulary_size
from pyeditfast.ops import (
    RunningMoments,
    Shift,
    apply_shift_,
    check_shift,
    edit_values,
    solve_shift,
)
from pyeditfast.phases import PhaseClock

logger = logging.getLogger(__name__)


class UltraEditor:
    """Edits a causal language model in place, turn after turn.

    ``model`` is any Transformers causal language model with ``nn.Linear`` or ``Conv1D`` MLPs in
    bf16, fp16 or float32; ``tokenizer`` is its own. Raises ``UnknownModuleError`` or
    ``UnsupportedWeightError`` if a module of the configuration cannot be edited.

    After every whole turn the model is consistent: an error or an interrupt leaves it as the last
    whole turn did.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: UltraEditConfig | None = None,
    ) -> None:
        config = config if config is not None else UltraEditConfig()
        if config.edit_modules is None:
            config = dataclasses.replace(config, edit_modules=default_modules(model))
            logger.info("edit_modules not given; editing %s", ", ".join(config.edit_modules or ()))
        assert config.edit_modules is not None
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.modules = find_edit_modules(model, config.edit_modules)
        self.runner = ModelRunner(
            model,
            tokens_per_pass=config.tokens_per_pass,
            graph_layers=_layers_from(model, self.modules),
        )
        self.moments: dict[tuple[int, int], RunningMoments] = {}
        for item in self.modules:
            if item.shape not in self.moments:
                self.moments[item.shape] = RunningMoments(
                    sum(item.shape), config.variance, device=item.weight.device
                )
        if config.rounding == "stochastic":
            wide = [item.name for item in self.modules if item.weight.element_size() != 2]
            if wide:
                raise ValueError(
                    f'rounding="stochastic" is for 16-bit weights; {wide[0]} is not one'
                )
        self.remainders: dict[str, Tensor] = {}
        if config.rounding == "compensated":
            self.remainders = {item.name: torch.zeros_like(item.weight) for item in self.modules}
        self.turns = 0
        self.edits = 0
        self.records = 0

    def edit(
        self,
        edits: Iterable[Edit],
        *,
        strict: bool = False,
        progress: bool = False,
        total: int | None = None,
        report: EditReport | None = None,
    ) -> EditReport:
        """Carry out ``edits`` in turns of ``config.turn_size`` and report.

        Any iterable, read as it goes. An edit that cannot be used is left out and reported; with
        ``strict`` the first one raises ``EditRejectedError`` instead, before its turn changes
        anything. A last turn that is not full is edited. ``progress`` shows a bar with edits per
        second and the time left. ``records`` counts what was read up to the last whole turn,
        rejected edits included, so that a stopped run can go on from there; a ``report`` passed in
        is filled turn by turn and outlives an error.
        """
        report = report if report is not None else EditReport()
        clock = PhaseClock(self.runner.devices)
        reset_peak_memory(self.runner.devices)
        if total is None and isinstance(edits, Sequence):
            total = len(edits)
        start = time.perf_counter()
        bar = tqdm(total=total, unit="edit", desc="UltraEdit", disable=not progress)
        # A caller's inference mode would forbid the gradients.
        with bar, torch.inference_mode(False):
            turns = gather_turns(
                edits,
                self.tokenizer,
                self.config.turn_size,
                context_length(self.model),
                vocabulary_size(self.model),
            )
            try:
                while True:
                    with clock.phase("tokenize"):
                        turn = next(turns, None)
                    if turn is None:
                        break
                    self._run_turn(turn, strict, clock)
                    report.edits += len(turn.edits)
                    report.turns += bool(turn.edits)
                    report.rejected.extend(turn.rejected)
                    bar.update(turn.consumed)
                    if turn.rejected:
                        bar.set_postfix(rejected=len(report.rejected))
            finally:
                report.seconds = {**clock.seconds(), "total": time.perf_counter() - start}
                report.peak_memory_bytes = peak_memory(self.runner.devices)
        return report

    def _run_turn(self, turn: Turn, strict: bool, clock: PhaseClock) -> None:
        _raise_if(strict, turn)
        shifts: list[Shift] = []
        moments = self.moments
        gradients, ordered = self._gradients(turn, clock)
        _raise_if(strict, turn)
        if gradients is not None:
            weights, segments = loss_weights(gradients.rows, self.config.micro_batch)
            with clock.phase("normalize"):
                moments = self._updated_moments(gradients, weights, segments)
            with clock.phase("solve"):
                shifts = self._solve(gradients, weights, moments)
        with interrupt_held_back():
            with clock.phase("apply"):
                self._apply(shifts)
            self.moments = moments
            self.turns += bool(ordered)
            self.edits += len(ordered)
            self.records += turn.consumed

    def _gradients(
        self, turn: Turn, clock: PhaseClock
    ) -> tuple[TurnGradients | None, list[AnswerSequence]]:
        """Return the gradients of the edits that have usable ones; reject the others."""
        ordered = longest_first(turn.sequences)
        while ordered:
            try:
                gradients = turn_gradients(self.runner, self.modules, ordered, clock)
            except PassTooLargeError as error:
                if error.index is None:
                    raise
                turn.reject(error.index, str(error))
                ordered = [sequence for sequence in ordered if sequence.index != error.index]
                continue
            bad = set(gradients.non_finite_sequences())
            if not bad:
                return gradients, ordered
            for number in sorted(bad):
                turn.reject(ordered[number].index, "a key or a gradient is NaN or infinite")
            kept = [number for number in range(len(ordered)) if number not in bad]
            ordered = [ordered[number] for number in kept]
            return (gradients.select(kept) if kept else None), ordered
        return None, ordered

    def _updated_moments(
        self, gradients: TurnGradients, weights: Tensor, segments: list[int]
    ) -> dict[tuple[int, int], RunningMoments]:
        moments = {shape: held.copy() for shape, held in self.moments.items()}
        for item, key, grad in zip(self.modules, gradients.key_of, gradients.grads, strict=True):
            keys = gradients.keys[key]
            grads = weighted(grad, weights, keys.device)
            moments[item.shape].update(keys, grads, segments=segments)
        return moments

    def _solve(
        self,
        gradients: TurnGradients,
        weights: Tensor,
        moments: dict[tuple[int, int], RunningMoments],
    ) -> list[Shift]:
        """Return one shift a module; modules that read the same keys share one factorization."""
        shifts: dict[int, Shift] = {}
        for key, keys in enumerate(gradients.keys):
            members = [i for i, used in enumerate(gradients.key_of) if used == key]
            values = [
                edit_values(
                    keys,
                    weighted(gradients.grads[i], weights, keys.device),
                    moments[self.modules[i].shape],
                    self.config.lr,
                )
                for i in members
            ]
            try:
                shared = solve_shift(
                    keys, torch.cat(values, -1), self.config.ridge, self.config.form
                )
            except NumericalError as error:
                names = ", ".join(self.modules[i].name for i in members)
                raise type(error)(f"turn {self.turns}, {names}: {error}") from error
            widths = [value.shape[-1] for value in values]
            for i, part in zip(members, _split(shared, widths), strict=True):
                shifts[i] = part.to(self.modules[i].weight.device)
        return [shifts[i] for i in range(len(self.modules))]

    def _apply(self, shifts: list[Shift]) -> None:
        rounding = self.config.rounding
        arguments: list[tuple[Tensor, Shift, int | None, Tensor | None]] = []
        for number, (item, shift) in enumerate(zip(self.modules, shifts, strict=False)):
            seed = None
            if rounding == "stochastic":
                # Every weight of every turn draws its own numbers.
                seed = (self.config.seed << 32) + self.turns * len(self.modules) + number
            remainder = self.remainders.get(item.name)
            try:
                check_shift(item.weight, shift, rounding, seed, remainder=remainder)
            except NumericalError as error:
                raise type(error)(f"turn {self.turns}, {item.name}: {error}") from error
            arguments.append((item.weight, shift, seed, remainder))
        # Only now, when no weight will be refused, is the first one written.
        for weight, shift, seed, remainder in arguments:
            apply_shift_(weight, shift, rounding, seed, remainder=remainder)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the model, its tokenizer and the editor's state to ``directory`` (safetensors and
        JSON, no pickle).

        ``AutoModelForCausalLM.from_pretrained(directory)`` opens the edited model;
        ``UltraEditor.load(directory)`` goes on editing it.
        """
        tensors = {f"remainder.{name}": tensor for name, tensor in self.remainders.items()}
        for (d_in, d_out), moments in self.moments.items():
            for name, tensor in moments.state_dict().items():
                tensors[f"moments.{d_in}x{d_out}.{name}"] = tensor
        state = {
            "method": "ultraedit",
            "config": self.config.to_dict(),
            # The size in force: other passes would round otherwise.
            "tokens_per_pass": self.runner.tokens_per_pass,
            "turns": self.turns,
            "edits": self.edits,
            "records": self.records,
        }
        checkpoints.save(Path(directory), self.model, self.tokenizer, self.modules, state, tensors)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: str | None = None,
        tokens_per_pass: int | None = None,
    ) -> UltraEditor:
        """Return an editor that goes on where ``save`` stopped.

        Raises ``FileNotFoundError`` for a directory that ``save`` did not write and ``ValueError``
        if its model and its state do not belong together.
        """
        path = Path(directory)
        state, tensors = checkpoints.load_state(path, "ultraedit")
        model, tokenizer = checkpoints.load_model(path, device=device)
        editor = cls(model, tokenizer, UltraEditConfig(**state["config"]))
        editor.runner.tokens_per_pass = tokens_per_pass or state["tokens_per_pass"]
        checkpoints.check_fingerprint(path, state, editor.modules)
        for (d_in, d_out), moments in editor.moments.items():
            prefix = f"moments.{d_in}x{d_out}."
            moments.load_state_dict(
                {
                    name.removeprefix(prefix): t
                    for name, t in tensors.items()
                    if name.startswith(prefix)
                }
            )
        for name, remainder in editor.remainders.items():
            remainder.copy_(tensors[f"remainder.{name}"])
        editor.turns, editor.edits, editor.records = (
            state["turns"],
            state["edits"],
            state["records"],
        )
        return editor


def _raise_if(strict: bool, turn: Turn) -> None:
    if strict and turn.rejected:
        raise EditRejectedError(str(turn.rejected[0]))


def loss_weights(rows: Sequence[int], micro_batch: int) -> tuple[Tensor, list[int]]:
    """Return what the published loss weights each answer token with, and its micro-batches.

    ``rows`` are the answer tokens of each edit. The loss is a mean over the answer tokens of a
    micro-batch of ``micro_batch`` edits, so a token's gradient is that of the sum divided by the
    micro-batch's tokens: ``[n, 1]`` float32. The micro-batches are given as their tokens.
    """
    groups = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    segments = [sum(group) for group in groups]
    each = 1.0 / torch.tensor(segments, dtype=torch.float32)
    return each.repeat_interleave(torch.tensor(segments)).unsqueeze(-1), segments


def weighted(grad: Tensor, weights: Tensor, device: torch.device) -> Tensor:
    """Return ``grad`` ``[n, d_out]`` times ``weights`` ``[n, 1]``, float32, on ``device``."""
    return grad.to(device, torch.float32) * weights.to(device)


def _split(shift: Shift, widths: list[int]) -> list[Shift]:
    """Cut a shift of several modules that share their keys along ``d_out``."""
    if len(widths) == 1:
        return [shift]
    if shift.matrix is not None:
        return [
            Shift("primal", shift.rank, matrix=part) for part in shift.matrix.split(widths, dim=-2)
        ]
    assert shift.left is not None
    return [
        Shift("dual", shift.rank, left=part, right=shift.right)
        for part in shift.left.split(widths, dim=-1)
    ]


def _layers_from(model: PreTrainedModel, modules: Sequence[EditModule]) -> int:
    """Return how many blocks lie at or behind the first edited module."""
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    numbers = [int(part) for item in modules for part in item.name.split(".") if part.isdecimal()]
    return layers - min(numbers) if numbers else layers
