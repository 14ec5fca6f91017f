"""WISE as its authors run it (arXiv 2405.14768), written from the equations.

Every step is a padded forward pass through the whole model with full logits, a weight gradient by
autograd, an int64 mask, an optimizer and a separate clamp; the spare copies of the weight are kept,
and the loss goes to the host after every step: slow on purpose, because it is what the fast editor
is compared with. Where the released code does work that does not change the result (it prints the
parts of the loss, has the model compute a second loss, and fills a key-value cache), that work is
left out, which favours this baseline. Replay and batches of edits are not here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from pyeditfast_published.edit_batch import EditBatch, edit_batch
from pyeditfast_published.ties_merge import published_ties
from pyeditfast_published.ultraedit import (
    IGNORED_LABEL,
    _edited_module,
    evaluation_mode,
    input_device,
    only_trainable,
)
from pyeditfast_published.wise_layer import NO_GAP, PublishedWiseLayer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = np.ndarray | Tensor

WEIGHT_DECAY = 1e-5
STOP_DIFFERENCE = 1e-4
STOP_LOSS = 0.02


class PublishedWise:
    """Edits a causal language model one fact at a time by the published WISE procedure.

    The module called ``edit_module`` is replaced by a :class:`PublishedWiseLayer` until
    :meth:`remove` puts it back; no other weight of the model changes.

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        edit_module: dotted name of an ``nn.Linear`` or ``Conv1D`` module.
        templates: contexts of the prompt, each with a ``{}``; the target follows the whole of it.
        n_iter: most steps an edit takes.
        edit_lr: learning rate of the SGD, whose weight decay is 1e-5.
        mask_ratio: share of the elements whose gradient a shard's steps use.
        act_margin: ``(α, β, γ)`` of the margin loss.
        act_ratio: a memory's threshold is its smallest in-scope gap times this.
        norm_constraint: how far an element may move from the main weight; None for no bound.
        save_freq: edits of a shard.
        merge_freq: edits of a merge, a multiple of ``save_freq``.
        merge_alg: ``"ties"``, the only one here.
        density: share of the elements that TIES keeps.
        retrieve: keep one memory a merge and choose between them; else one memory for all, in
            which the first merge's shards weigh ``1/S``, those of a later one ``0.4/S`` each
            against 0.6 of what was there.
        activation: activation of the gap, a name of Transformers', ``"gelu_tanh"``, ``"model"`` for
            the model's own, or None for none.
        quirks: ``"published"`` divides a sequence's target loss by its target tokens plus one,
            counts pads in the gaps, and lets left pads shift the positions (which only absolute
            position embeddings feel); ``"none"`` does none of that. What the released code computes
            for a locality prompt longer than every edit sequence (it takes prompt tokens for
            targets) and for an ``nn.Linear`` with a bias (its side output lacks it) is not here.
        mask: taken instead of drawing, ``[d_out, d_in]`` booleans whatever the weight's layout, or
            a function that returns them for the number of a shard.
        seed: of ``numpy``'s generator, when masks are drawn.

    Raises:
        TypeError: the module is no ``nn.Linear`` or ``Conv1D`` with a floating-point weight.
        ValueError: the module does not exist, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edit_module: str,
        *,
        templates: Sequence[str] = ("{}",),
        n_iter: int = 70,
        edit_lr: float = 1.0,
        mask_ratio: float = 0.2,
        act_margin: tuple[float, float, float] = (5.0, 20.0, 10.0),
        act_ratio: float = 0.88,
        norm_constraint: float | None = 1.0,
        save_freq: int = 500,
        merge_freq: int = 1000,
        merge_alg: str = "ties",
        density: float = 0.53,
        retrieve: bool = True,
        activation: str | None = "model",
        quirks: Literal["published", "none"] = "published",
        mask: Mask | Callable[[int], Mask] | None = None,
        seed: int = 0,
    ) -> None:
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(f"every template needs a '{{}}', got {list(templates)!r}")
        if n_iter < 1 or save_freq < 1 or merge_freq < 1 or merge_freq % save_freq:
            raise ValueError(
                f"n_iter and save_freq must be at least 1 and merge_freq a multiple of save_freq, "
                f"got n_iter {n_iter}, save_freq {save_freq}, merge_freq {merge_freq}"
            )
        if not 0 <= mask_ratio <= 1 or not 0 < density <= 1:
            raise ValueError(
                f"mask_ratio and density must be shares, got {mask_ratio} and {density}"
            )
        if merge_alg != "ties":
            raise ValueError(f'merge_alg must be "ties", got {merge_alg!r}')
        if quirks not in ("published", "none"):
            raise ValueError(f'quirks must be "published" or "none", got {quirks!r}')
        module = _edited_module(model, edit_module)
        assert isinstance(module, (nn.Linear, Conv1D))
        self.model = model
        self.tokenizer = tokenizer
        self.edit_module = edit_module
        self.templates = tuple(templates)
        self.n_iter = n_iter
        self.edit_lr = edit_lr
        self.mask_ratio = mask_ratio
        self.act_margin = act_margin
        self.norm_constraint = norm_constraint
        self.save_freq = save_freq
        self.merge_freq = merge_freq
        self.density = density
        self.quirks = quirks
        self.mask = mask
        self.generator = np.random.RandomState(seed)
        self.edits = 0
        self.losses: list[float] = []
        """The losses of the last edit's steps."""
        self.recorded_gaps: list[float] = []
        """The mean in-scope gap of every edit at its last forward pass."""
        self.weight_mask: Tensor | None = None
        self.layer = PublishedWiseLayer(
            module, _activation(model, activation), act_ratio=act_ratio, retrieve=retrieve
        )
        # The released editor keeps a copy of its own beside the layer's.
        self.spare_layer = copy.deepcopy(module)
        _replace_module(model, edit_module, self.layer)

    @property
    def side_weight(self) -> nn.Parameter:
        """Return the side weight that edits go to, in the layout of the module's own weight."""
        return self.layer.side_weight

    @property
    def memories(self) -> list[Tensor]:
        """Return the shards and merged memories, oldest first (``retrieve=True``)."""
        return self.layer.memories

    @property
    def threshold(self) -> float:
        """Return the threshold of the current side weight."""
        return self.layer.smallest_gap * self.layer.act_ratio

    @property
    def memory_thresholds(self) -> list[float]:
        """Return the threshold of each of ``memories``."""
        return [gap * self.layer.act_ratio for gap in self.layer.memory_gaps]

    @property
    def merged_weight(self) -> Tensor:
        """Return the one merged memory, which is the main weight before the first merge
        (``retrieve=False``).
        """
        return self.layer.layer.weight

    def remove(self) -> None:
        """Put the original module with its original weight back into the model."""
        self.layer.layer.weight = self.layer.main_weight
        _replace_module(self.model, self.edit_module, self.layer.layer)

    def edit(self, prompt: str, target: str, locality_prompt: str) -> int:
        """Edit one fact, then keep and merge shards where they are due; return the steps taken.

        Raises:
            ValueError: a prompt or the target has no tokens, or the locality prompt is the prompt.
        """
        batch = edit_batch(
            self.tokenizer,
            self.templates,
            prompt,
            target,
            locality_prompt,
            input_device(self.model),
        )
        if self.edits % self.save_freq == 0:
            self.weight_mask = self._new_mask()
        with (
            evaluation_mode(self.model),
            only_trainable(self.model, [self.side_weight]),
            _editing(self.layer),
            torch.enable_grad(),
        ):
            steps = self._fit(batch)
        self.edits += 1
        if self.edits % self.save_freq == 0:
            self._keep_shard()
        if self.edits % self.merge_freq == 0:
            self._merge()
        return steps

    def _fit(self, batch: EditBatch) -> int:
        optimizer = torch.optim.SGD([self.side_weight], lr=self.edit_lr, weight_decay=WEIGHT_DECAY)
        self.losses = []
        for step in range(self.n_iter):
            loss, in_gaps = self._loss(batch)
            stop = _stalled(self.losses)
            if stop or step == self.n_iter - 1:
                self._record(in_gaps)
            if stop:
                return step
            optimizer.zero_grad()
            loss.backward()
            gradient = self.side_weight.grad
            assert gradient is not None and self.weight_mask is not None
            masked = gradient.reshape(-1) * self.weight_mask
            self.side_weight.grad = masked.view_as(gradient).to(gradient.dtype)
            optimizer.step()
            self.losses.append(loss.item())
            self._clamp()
        return self.n_iter

    def _loss(self, batch: EditBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of one forward pass, 0-d, and the in-scope gaps, ``[templates]``."""
        positions = {}
        if self.quirks == "none" and _takes_positions(self.model):
            counted = batch.attention_mask.cumsum(-1) - 1
            positions["position_ids"] = counted.clamp(min=0)
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **positions,
        ).logits
        scores = logits[:-1, :-1].contiguous()
        labels = batch.labels[:-1, 1:].to(scores.device).contiguous()
        token_losses = nn.functional.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(labels.shape)
        divisor = batch.targets + (1 if self.quirks == "published" else 0)
        target_loss = (token_losses.sum(1) / divisor).mean()
        gaps = self._row_gaps(batch)
        margin = _margin_loss(gaps[:-1], gaps[-1:], self.act_margin)
        return target_loss + margin.to(target_loss.device), gaps[:-1]

    def _row_gaps(self, batch: EditBatch) -> Tensor:
        """Return the gap of every row, ``[rows]``: the mean over its tokens, however many."""
        assert self.layer.original_output is not None and self.layer.side_output is not None
        gaps = self.layer.token_gaps(self.layer.original_output, self.layer.side_output)
        gaps = gaps.view(batch.input_ids.shape)
        if self.quirks == "published":
            return gaps.mean(-1)
        counted = batch.attention_mask.to(gaps.device)
        return gaps.masked_fill(counted == 0, 0.0).sum(-1) / counted.sum(-1)

    def _record(self, in_gaps: Tensor) -> None:
        gap = in_gaps.mean().item()
        self.recorded_gaps.append(gap)
        self.layer.smallest_gap = min(self.layer.smallest_gap, gap)

    def _clamp(self) -> None:
        if self.norm_constraint is None:
            return
        with torch.no_grad():
            side, main = self.side_weight, self.layer.main_weight
            side.copy_(
                torch.clamp(side, min=main - self.norm_constraint, max=main + self.norm_constraint)
            )

    def _new_mask(self) -> Tensor:
        """Return the mask of the next shard, ``[d_out · d_in]`` int64 in the weight's own order."""
        weight = self.side_weight
        shape = weight.shape
        if self.mask is None:
            odds = [self.mask_ratio, 1 - self.mask_ratio]
            drawn = self.generator.choice([1, 0], size=weight.numel(), p=odds)
            return torch.from_numpy(drawn).to(weight.device)
        shard = self.edits // self.save_freq
        given = torch.as_tensor(self.mask(shard) if callable(self.mask) else self.mask)
        stored = given.T if isinstance(self.layer.layer, Conv1D) else given
        if stored.shape != shape or stored.dtype != torch.bool:
            raise ValueError(
                f"the mask must be boolean and [d_out, d_in] of a weight {tuple(shape)}, got "
                f"{given.dtype} {tuple(given.shape)}"
            )
        return stored.reshape(-1).to(device=weight.device, dtype=torch.int64)

    def _new_side(self) -> None:
        main = self.layer.main_weight.detach()
        self.layer.side_weight = nn.Parameter(main.clone(), requires_grad=False)

    def _keep_shard(self) -> None:
        self.layer.memories.append(self.side_weight.detach())
        self._new_side()
        if self.layer.retrieve:
            self.layer.memory_gaps.append(self.layer.smallest_gap)
            self.layer.smallest_gap = NO_GAP

    def _merge(self) -> None:
        layer = self.layer
        main = layer.main_weight.detach()
        count = self.merge_freq // self.save_freq
        shards, layer.memories = layer.memories[-count:], layer.memories[:-count]
        if layer.retrieve:
            layer.memories.append(published_ties(main, shards, self.density))
            layer.memory_gaps[-count:] = [min(layer.memory_gaps[-count:])]
            return
        weights = [1.0 / count] * count
        if not main.equal(self.merged_weight):
            shards, weights = [*shards, self.merged_weight.detach()], [0.4 / count] * count + [0.6]
        merged = published_ties(main, shards, self.density, weights)
        layer.layer.weight = nn.Parameter(merged, requires_grad=False)


def _stalled(losses: Sequence[float]) -> bool:
    """Say whether the last two losses differ by 1e-4 at most and the last is 0.02 at most."""
    return (
        len(losses) > 1
        and abs(losses[-1] - losses[-2]) <= STOP_DIFFERENCE
        and losses[-1] <= STOP_LOSS
    )


def _margin_loss(in_gaps: Tensor, out_gap: Tensor, margins: tuple[float, float, float]) -> Tensor:
    alpha, beta, gamma = margins
    terms = (out_gap - in_gaps + gamma, out_gap - alpha, beta - in_gaps)
    apart, near, far = (_mean_of_positive(term) for term in terms)
    return apart + near + far


def _mean_of_positive(terms: Tensor) -> Tensor:
    positive = terms[terms > 0]
    return positive.mean() if positive.numel() else terms.new_zeros(())


def _activation(model: nn.Module, name: str | None) -> Callable[[Tensor], Tensor]:
    if name is None:
        return lambda x: x
    if name == "model":
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        known = ("hidden_act", "activation_function", "hidden_activation")
        name = next((getattr(config, key) for key in known if hasattr(config, key)), name)
    name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
    if name not in ACT2FN:
        raise ValueError(f"no activation is called {name!r}; known are {sorted(ACT2FN)}")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def _editing(layer: PublishedWiseLayer) -> Iterator[None]:
    layer.editing = True
    try:
        yield
    finally:
        layer.editing = False
        layer.original_output = layer.side_output = None
