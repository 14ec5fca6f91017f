"""UltraEdit as its authors run it (arXiv 2505.14679), written from the equations.

Padded micro-batches, full logits, weight gradients and a dense ``d_in x d_in`` solve: slow on
purpose, because it is what the fast editor is compared with. Where the released code does work that
does not change the result (it writes keys and gradients to files and reads them back, has the model
compute a second loss, and fills a key-value cache), that work is left out, which favours this
baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""Label of a position whose next token is not a target token."""

EPSILON = torch.finfo(torch.float32).eps
"""The eps of the normalizer; float32's whatever the arithmetic, so that dtypes stay comparable."""


@dataclass(frozen=True)
class TokenizedPair:
    """One sequence ``prompt ∥ target[:-1]`` and its next-token labels, ``[tokens]`` int64 each."""

    input_ids: Tensor
    labels: Tensor


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> TokenizedPair:
    """Tokenize a prompt with the tokenizer's defaults and ``" " + target`` without special tokens.

    Raises:
        ValueError: the prompt or the target has no tokens.
    """
    prompt_ids: list[int] = list(tokenizer(prompt)["input_ids"])
    target_ids: list[int] = list(tokenizer(" " + target, add_special_tokens=False)["input_ids"])
    if not prompt_ids or not target_ids:
        raise ValueError(
            f"prompt {prompt!r} has {len(prompt_ids)} tokens and target {target!r} has "
            f"{len(target_ids)}; both need at least one"
        )
    return TokenizedPair(
        input_ids=torch.tensor(prompt_ids + target_ids[:-1]),
        labels=torch.tensor([IGNORED_LABEL] * (len(prompt_ids) - 1) + target_ids),
    )


def pad_pairs(
    pairs: Sequence[TokenizedPair], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad sequences to the longest: input ids, attention mask, labels, ``[batch, tokens]``.

    Pads are token 0, as published; the attention mask hides them and their label is ignored.
    """

    def padded(rows: Sequence[Tensor], fill: int) -> Tensor:
        batch = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
        return batch.to(device)

    return (
        padded([pair.input_ids for pair in pairs], 0),
        padded([torch.ones_like(pair.input_ids) for pair in pairs], 0),
        padded([pair.labels for pair in pairs], IGNORED_LABEL),
    )


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on: that of the input embedding."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return next(embeddings.parameters()).device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and give every module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def only_trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Freeze every parameter but ``weights`` and restore all ``requires_grad`` flags afterwards.

    The weights' ``.grad`` is None before and after.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for weight in weights:
            weight.grad = None
        for parameter, required in flags:
            parameter.requires_grad_(required)


def published_shift(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    """Solve ``(KᵀK + ridge·I) Δ = KᵀV`` densely: ``[n, d_in], [n, d_out] -> Δ [d_in, d_out]``.

    The published route: an LU of a ``d_in x d_in`` matrix in the operands' dtype, at
    2/3·d_in³ + 2·d_in²·(n + d_out) + 2·n·d_in·d_out FLOPs, with three ``d_in x d_in`` matrices
    alive at its peak.
    """
    identity = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    system = torch.add(keys.mT @ keys, identity, alpha=ridge)
    return torch.linalg.solve(system, keys.mT @ values)


class PublishedMoments:
    """Lifelong mean and standard deviation of rows ``[rows, size]``, accumulated as published.

    For a micro-batch ``x`` of ``m`` rows, ``N`` rows in all and ``δ = mean(x) - mean``::

        mean += m·δ / N
        sum_of_squares += w·var_unbiased(x) + (N - m)·m·δ² / N
        std = sqrt(sum_of_squares / (N - 1 + eps))

    with ``w = m`` for ``variance="published"`` (which overstates the spread) and ``w = m - 1``, the
    exact pooled variance, for ``variance="unbiased"``. A micro-batch of one row has variance 0 in
    both; in the released code it turns the statistics into NaN.
    """

    def __init__(
        self, size: int, *, variance: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.variance = variance
        self.count = 0
        self.mean = torch.zeros(size, dtype=dtype, device=device)
        self.sum_of_squares = torch.zeros_like(self.mean)
        self.std = torch.zeros_like(self.mean)

    def update(self, rows: Tensor) -> None:
        """Take in one micro-batch of rows ``[rows, size]``."""
        added = rows.shape[0]
        total = self.count + added
        delta = rows.mean(0) - self.mean
        spread = rows.var(0) if added > 1 else torch.zeros_like(delta)
        weight = added if self.variance == "published" else added - 1
        self.mean += added * delta / total
        self.sum_of_squares += weight * spread + self.count * added * delta.square() / total
        self.std = (self.sum_of_squares / (total - 1 + EPSILON)).sqrt()
        self.count = total

    def normalize(self, rows: Tensor) -> Tensor:
        """Return ``(rows - mean) / (std + eps)``, ``[rows, size]``."""
        return (rows - self.mean) / (self.std + EPSILON)


class PublishedUltraEdit:
    """Edits a causal language model in place, turn by turn, by the published UltraEdit procedure.

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        edit_modules: dotted names of ``nn.Linear`` or ``Conv1D`` modules.
        lr: the factor of the values, ``v = -lr·‖k̂‖²·ĝ``.
        micro_batch: edits a forward pass; the loss is the mean over its answer tokens.
        ridge: ``λ`` of the solve.
        dtype: dtype of keys, output gradients, statistics, values and solve; float32 as published.
        variance: how a micro-batch enters the running variance, see :class:`PublishedMoments`.
        solve_dtype: when given, taken instead of ``dtype`` for all that follows the backward pass.
            ``torch.float64`` gives the procedure "computed in float64": keys and gradients come in
            the model's dtype, are widened, and nothing is rounded until the weight is updated.

    Raises:
        TypeError: a named module is no ``nn.Linear`` or ``Conv1D`` with a floating-point weight.
        ValueError: a module does not exist or is named twice, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edit_modules: Sequence[str],
        *,
        lr: float = 1e-6,
        micro_batch: int = 10,
        ridge: float = 1.0,
        dtype: torch.dtype = torch.float32,
        variance: Literal["published", "unbiased"] = "published",
        solve_dtype: torch.dtype | None = None,
    ) -> None:
        if not edit_modules or len(set(edit_modules)) != len(edit_modules):
            raise ValueError(f"edit_modules must name distinct modules, got {list(edit_modules)!r}")
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        if ridge <= 0:
            raise ValueError(f"ridge must be positive, got {ridge}")
        if variance not in ("published", "unbiased"):
            raise ValueError(f'variance must be "published" or "unbiased", got {variance!r}')
        self.model = model
        self.tokenizer = tokenizer
        self.modules = {name: _edited_module(model, name) for name in edit_modules}
        self.lr = lr
        self.micro_batch = micro_batch
        self.ridge = ridge
        self.dtype = dtype if solve_dtype is None else solve_dtype
        self.variance = variance
        self.device = self._weight(edit_modules[0]).device
        # By module shape: modules of equal shape share their statistics.
        self.moments: dict[tuple[int, int], PublishedMoments] = {}
        for name in edit_modules:
            d_in, d_out = self._shape(name)
            if (d_in, d_out) not in self.moments:
                self.moments[d_in, d_out] = PublishedMoments(
                    d_in + d_out, variance=variance, dtype=self.dtype, device=self.device
                )

    def edit(self, edits: Sequence[tuple[str, str]], turn_size: int = 100) -> int:
        """Edit all ``(prompt, target)`` pairs, ``turn_size`` a turn; return the number of turns.

        A last turn that is not full is edited too, as the fast editor does; the released data
        loader drops it.

        Raises:
            ValueError: ``turn_size`` is below 1.
        """
        if turn_size < 1:
            raise ValueError(f"turn_size must be at least 1, got {turn_size}")
        starts = range(0, len(edits), turn_size)
        for start in starts:
            self.edit_turn(edits[start : start + turn_size])
        return len(starts)

    def edit_turn(self, edits: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Edit the ``(prompt, target)`` pairs of one turn at once and return each module's shift.

        Returns:
            By module name, the shift in the solve's dtype and the weight's own layout:
            ``[d_out, d_in]`` for ``nn.Linear``, ``[d_in, d_out]`` for ``Conv1D``. The weight has
            taken it rounded to its own dtype.

        Raises:
            ValueError: there are no edits, or a prompt or target has no tokens.
        """
        if not edits:
            raise ValueError("a turn needs at least one edit, got 0")
        pairs = [tokenize_pair(self.tokenizer, prompt, target) for prompt, target in edits]
        # sorted keeps the order of equal lengths in reverse too: the turn is cut as published.
        pairs = sorted(pairs, key=lambda pair: len(pair.input_ids), reverse=True)
        keys: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        grads: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        weights = [self._weight(name) for name in self.modules]
        with evaluation_mode(self.model), only_trainable(self.model, weights):
            for start in range(0, len(pairs), self.micro_batch):
                rows = self._capture(pairs[start : start + self.micro_batch])
                for name, (key_rows, grad_rows) in rows.items():
                    self.moments[self._shape(name)].update(torch.cat((key_rows, grad_rows), -1))
                    keys[name].append(key_rows)
                    grads[name].append(grad_rows)
        with torch.no_grad():
            shifts = {
                name: self._shift(name, torch.cat(keys[name]), torch.cat(grads[name]))
                for name in self.modules
            }
            for name, shift in shifts.items():
                weight = self._weight(name)
                weight.add_(shift.to(device=weight.device, dtype=weight.dtype))
        return shifts

    def _capture(self, pairs: Sequence[TokenizedPair]) -> dict[str, tuple[Tensor, Tensor]]:
        """Run one micro-batch and return keys and output gradients at its answer positions."""
        input_ids, attention_mask, labels = pad_pairs(pairs, input_device(self.model))
        answers = (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1)
        keys: dict[str, Tensor] = {}
        grads: dict[str, Tensor] = {}

        def answer_rows(activations: Tensor) -> Tensor:
            # Some models flatten [batch, tokens] before their MLP, so the rows are found flat.
            rows = activations.detach().reshape(-1, activations.shape[-1])
            return rows[answers.to(rows.device)].to(device=self.device, dtype=self.dtype)

        def listen(name: str) -> Any:
            def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                def backward_hook(gradient: Tensor) -> None:
                    grads[name] = answer_rows(gradient)

                keys[name] = answer_rows(inputs[0])
                output.register_hook(backward_hook)

            return forward_hook

        handles = [
            module.register_forward_hook(listen(name)) for name, module in self.modules.items()
        ]
        try:
            with torch.enable_grad():
                logits = self.model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False
                ).logits.flatten(0, 1)
                labels = labels.flatten().to(logits.device)
                answers_there = answers.to(logits.device)
                nn.functional.cross_entropy(logits[answers_there], labels[answers_there]).backward()
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.modules if name not in grads]
        if unused:
            raise ValueError(f"the model's forward pass does not use the modules {unused!r}")
        return {name: (keys[name], grads[name]) for name in self.modules}

    def _shift(self, name: str, keys: Tensor, grads: Tensor) -> Tensor:
        """Shift of one module in its weight's layout, from a turn's keys and gradients."""
        d_in, d_out = self._shape(name)
        normalized = self.moments[d_in, d_out].normalize(torch.cat((keys, grads), -1))
        normalized_keys, normalized_grads = normalized.split([d_in, d_out], -1)
        values = -self.lr * normalized_keys.square().sum(-1, keepdim=True) * normalized_grads
        shift = published_shift(keys, values, self.ridge)
        return shift if isinstance(self.modules[name], Conv1D) else shift.T

    def _weight(self, name: str) -> nn.Parameter:
        weight = self.modules[name].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._weight(name).shape
        return (rows, columns) if isinstance(self.modules[name], Conv1D) else (columns, rows)


def _edited_module(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name!r}") from error
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise TypeError(
            f"module {name!r} must be nn.Linear or Conv1D with a floating-point weight, "
            f"got {type(module).__name__}"
        )
    return module
