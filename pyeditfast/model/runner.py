"""Forward passes over many sequences, packed where the model allows it and padded where not."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pyeditfast.errors import PassTooLargeError
from pyeditfast.model.memory import default_tokens_per_pass, is_out_of_memory
from pyeditfast.model.output_head import HeadPass, head_only_at, head_skipped, plain_head
from pyeditfast.model.packing import (
    PackedLayout,
    attention_configs,
    packed_attention_enabled,
    packing_refused,
)
from pyeditfast.model.passes import cut_passes
from pyeditfast.model.sequences import AnswerSequence
from pyeditfast.ops import linear_cross_entropy

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHECK_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest relative difference of packed and padded outputs: what rounding in the dtype explains.

A tenth of it is what a sequence's outputs may change when only its neighbour does: the arithmetic
is the same then, save for models that group tokens by expert.
"""


@dataclass(frozen=True)
class Batch:
    """The sequences of one pass as model inputs.

    ``answer_slots`` ``[n]`` index the answer positions among the flattened tokens of the pass,
    sequence by sequence; ``targets`` ``[n]`` are the tokens that should follow.
    """

    inputs: dict[str, Any]
    answer_slots: Tensor
    targets: Tensor


def packed_batch(sequences: Sequence[AnswerSequence]) -> Batch:
    """Concatenate sequences to one row ``[1, tokens]`` with positions."""
    layout = PackedLayout([len(sequence) for sequence in sequences])
    starts = torch.tensor([0, *layout.lengths]).cumsum(0)[:-1]
    tokens = torch.tensor([token for sequence in sequences for token in sequence.tokens])
    inputs = {
        "input_ids": tokens.unsqueeze(0),
        "position_ids": layout.positions().unsqueeze(0),
        "packed_layout": layout,
    }
    return Batch(inputs, *_answers(sequences, starts.tolist()))


def padded_batch(sequences: Sequence[AnswerSequence]) -> Batch:
    """Pad sequences on the right to ``[sequences, longest]`` with an attention mask."""
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence.tokens)
        mask[row, : len(sequence)] = 1
    starts = [row * longest for row in range(len(sequences))]
    return Batch({"input_ids": tokens, "attention_mask": mask}, *_answers(sequences, starts))


def seen_by_answers(batch: Batch) -> tuple[Batch, Tensor]:
    """Return ``batch``, packed or padded, as a packed one of the tokens that causal attention lets
    an answer position see, each at the position that it had; and their slots ``[n]`` among the
    flattened tokens of ``batch``.
    """
    ids = batch.inputs["input_ids"]
    slots = torch.arange(ids.numel(), device=ids.device)
    layout = batch.inputs.get("packed_layout")
    if layout is None:
        sequence, position = slots // ids.shape[1], slots % ids.shape[1]
        real = batch.inputs["attention_mask"].flatten().bool()
    else:
        ends = torch.tensor(layout.lengths, device=ids.device).cumsum(0)
        sequence = torch.bucketize(slots, ends, right=True)
        position = batch.inputs["position_ids"].flatten()
        real = torch.ones_like(slots, dtype=torch.bool)
    last = torch.full_like(slots, -1)
    last.scatter_reduce_(0, sequence[batch.answer_slots], batch.answer_slots, "amax")
    seen = (real & (slots <= last[sequence])).nonzero().squeeze(1)
    inputs = {
        "input_ids": ids.flatten()[seen].unsqueeze(0),
        "position_ids": position[seen].unsqueeze(0),
        "packed_layout": PackedLayout(
            sequence[seen].unique_consecutive(return_counts=True)[1].tolist()
        ),
    }
    return Batch(inputs, torch.searchsorted(seen, batch.answer_slots), batch.targets), seen


def _answers(sequences: Sequence[AnswerSequence], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    slots = [
        torch.arange(start + sequence.first_answer, start + len(sequence))
        for sequence, start in zip(sequences, starts, strict=True)
    ]
    targets = [token for sequence in sequences for token in sequence.targets]
    return torch.cat(slots), torch.tensor(targets)


@dataclass
class ModelRunner:
    """Runs a causal language model on passes of sequences.

    ``packing``: None decides by the model (and checks it once, packed against padded), True
    insists, False pads. ``tokens_per_pass``: None fits half of the free memory; halved whenever a
    pass runs out of memory. ``graph_layers``: blocks whose activations a backward pass will keep,
    for that estimate.
    """

    model: PreTrainedModel
    packing: bool | None = None
    tokens_per_pass: int | None = None
    graph_layers: int = 0
    packing_reason: str = field(default="not decided yet", init=False)
    read_at_answers_alone: dict[nn.Module, bool] = field(default_factory=dict, init=False)
    """What ``SuffixReplay`` found out about parts of the model."""
    _logits_of_head: bool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.tokens_per_pass is not None and self.tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass is {self.tokens_per_pass}; 1 or more is needed")

    @property
    def device(self) -> torch.device:
        """Return the device of the input embedding, where token ids go."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        weight = next(embedding.parameters())
        return self.model.device if weight.device.type == "meta" else weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Return every device that holds parameters."""
        found = {parameter.device for parameter in self.model.parameters()}
        return sorted((device for device in found if device.type != "meta"), key=str) or [
            self.device
        ]

    def run_in_passes(
        self,
        sequences: Sequence[AnswerSequence],
        run: Callable[[list[AnswerSequence]], Result],
    ) -> list[tuple[list[AnswerSequence], Result]]:
        """Call ``run`` on passes of ``sequences`` (longest first) and return each pass with its
        result.

        A pass that runs out of memory is cut in two and tried again, and later passes stay that
        small. Raises ``PassTooLargeError`` where a single sequence does not fit.
        """
        if not sequences:
            return []
        if self.tokens_per_pass is None:
            self.tokens_per_pass = default_tokens_per_pass(
                self.model, self.devices, self.graph_layers
            )
        allowed = self.tokens_per_pass
        waiting = cut_passes(sequences, allowed)[::-1]
        results = []
        while waiting:
            current = waiting.pop()
            try:
                results.append((current, run(current)))
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error).splitlines()[0]
            # Outside the except block: the traceback no longer holds the tensors of the failed
            # pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tokens = sum(len(sequence) for sequence in current)
            if len(current) == 1:
                # One long sequence says nothing about the passes of the others.
                self.tokens_per_pass = allowed
                raise PassTooLargeError(
                    f"one sequence of {tokens} tokens does not fit in memory: {failure}",
                    current[0].index,
                )
            self.tokens_per_pass = max(1, min(tokens, self.tokens_per_pass) // 2)
            logger.warning(
                "out of memory on a pass of %d tokens; now %d", tokens, self.tokens_per_pass
            )
            remaining = current + [sequence for later in waiting[::-1] for sequence in later]
            smaller = cut_passes(remaining, self.tokens_per_pass)
            if len(smaller[0]) == len(current):
                half = (len(current) + 1) // 2
                smaller[:1] = [current[:half], current[half:]]
            waiting = smaller[::-1]
        return results

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return the logits at the answer positions, ``[n, vocabulary]``; the head runs nowhere
        else.
        """
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.inputs.items()
        }
        with head_only_at(self.model, batch.answer_slots), self._attention(batch):
            logits = self.model(**inputs, use_cache=False, return_dict=True).logits
        return logits.reshape(-1, logits.shape[-1])

    def answer_losses(self, batch: Batch) -> Tensor:
        """Return the cross-entropy at the answer positions, ``[n]``, float32 or wider.

        Where the model's logits are what its head gives, head and loss are one op. Gradients do not
        reach the head.
        """
        head = plain_head(self.model)
        if head is not None and self._logits_of_head:
            with head_skipped(head):
                return _losses(head, self.answer_logits(batch), batch.targets)
        with HeadPass.watched(head) as seen:
            logits = self.answer_logits(batch)
        self._logits_of_head = seen.gave(logits)
        if head is not None and self._logits_of_head:
            # Not from the logits: the same losses, bit for bit, as in later passes.
            return _losses(head, seen.hidden, batch.targets)
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(exact, batch.targets.to(exact.device), reduction="none")

    @functools.cached_property
    def _attention_configs(self) -> list[Any]:
        # A walk over all modules: too long for every step of a side memory.
        return attention_configs(self.model)

    def _attention(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        if "packed_layout" in batch.inputs:
            return packed_attention_enabled(self._attention_configs)
        return contextlib.nullcontext()

    def batch(self, sequences: Sequence[AnswerSequence]) -> Batch:
        """Return the sequences of one pass as model inputs, packed if the model allows it."""
        if self.packs(max(len(sequence) for sequence in sequences)):
            return packed_batch(sequences)
        return padded_batch(sequences)

    def packs(self, longest: int) -> bool:
        """Say whether sequences of up to ``longest`` tokens are packed in one row."""
        return self._may_pack() and not self._window_shorter_than(longest)

    def _window_shorter_than(self, longest: int) -> bool:
        config = self.model.config.get_text_config()
        # 0 and None both mean that there is no such limit.
        windows = (
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
        )
        return any(window and window < longest for window in windows)

    def _may_pack(self) -> bool:
        if self.packing is None:
            reason = packing_refused(self.model) or self._packing_differs()
            self.packing = reason is None
            self.packing_reason = reason or "packed and padded hidden states agree"
            logger.info(
                "packed forward: %s (%s)", "yes" if self.packing else "no", self.packing_reason
            )
        return self.packing

    def _packing_differs(self) -> str | None:
        """Return how packing changes the outputs on three probes, None if it does not.

        Two things must hold: packed equals padded, up to the rounding of the dtype, and a
        sequence's outputs do not depend on its neighbours. The second catches what hides below that
        rounding.
        """
        longest = 7
        while self._window_shorter_than(longest):
            longest -= 1
        lengths = (longest, (longest + 1) // 2, 1)
        try:
            with torch.no_grad():
                padded = self.answer_logits(padded_batch(self._probes(lengths, 0))).double()
                packed = self.answer_logits(packed_batch(self._probes(lengths, 0))).double()
                other = self.answer_logits(packed_batch(self._probes(lengths, 1))).double()
        except Exception as refusal:
            if is_out_of_memory(refusal):
                raise
            return str(refusal)
        difference = float((packed - padded).norm() / padded.norm())
        behind = slice(longest, None)
        leak = float((packed[behind] - other[behind]).norm() / packed[behind].norm())
        # Written so that a NaN counts as a difference.
        tolerance = CHECK_TOLERANCE.get(self.model.dtype, 0.0)
        if not difference <= tolerance:
            return f"packed and padded outputs differ by {difference:.1e}"
        if not leak <= tolerance / 10:
            return f"a sequence changes the outputs of the next by {leak:.1e}"
        return None

    def _probes(self, lengths: Sequence[int], first: int) -> list[AnswerSequence]:
        """Return sequences of ``lengths``; ``first`` varies the tokens of the first one alone."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        probes = []
        for index, length in enumerate(lengths):
            start = 7919 * (index + 1) + (31 * first if index == 0 else 0)
            tokens = tuple((start + 104729 * place) % vocabulary for place in range(length))
            probes.append(AnswerSequence(index, tokens, tokens))
        return probes


def _losses(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return what a head's output on ``hidden`` ``[..., n, d]`` costs, ``[n]``."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    bias = None if head.bias is None else head.bias.detach()
    return linear_cross_entropy(rows, head.weight.detach(), targets.to(rows.device), bias)
