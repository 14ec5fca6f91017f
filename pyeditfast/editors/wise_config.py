"""Settings of WISE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyeditfast.editors.presets import wise_preset
from pyeditfast.ops import ACTIVATIONS, REDUCTIONS
from pyeditfast.ops.merge import MERGES

QUIRKS = ("none", "published")

SLOT = "{}"
"""Where a template takes the prompt."""


@dataclass(frozen=True)
class WiseConfig:
    """Settings of WISE, by default as published (arXiv 2405.14768).

    ``edit_module``: dotted name of the linear module that gets side memories; None takes that of
    the model's preset, or without one the down projection at the same relative depth as Llama's.
    An edit takes up to ``n_iter`` SGD steps of ``edit_lr``; each trains the same random
    ``mask_ratio`` of the elements and keeps them within ``norm_constraint`` of the main memory
    (None: no limit). ``act_margin``: (α, β, γ) of the margin loss. ``act_ratio``: part of the
    smallest gap of its edits that is a memory's threshold; with ``calibrate`` the threshold is set
    between the gaps of edit and locality prompts instead, at the end of every call of ``edit``.

    After ``save_freq`` edits the side memory is a shard and the next has a new mask; after
    ``merge_freq`` the shards are merged by ``merge_alg`` (see ``merge``), which keeps ``density``
    of each. ``retrieve`` keeps one memory a merge and routes to the largest gap (WISE-Retrieve);
    without it there is one (WISE-Merge). ``replay`` trains on past edits too, with ``retrieve`` and
    from the first merge on.

    ``activation``: that of the gaps, ``"model"`` for the model's own (see ``activation_gap``).
    ``reduction``: how a query's gap comes from those of its tokens. ``quirks="published"`` divides
    a sequence's loss by its target tokens plus one and counts pad tokens in the gaps while editing.
    ``templates``: contexts of the prompt, each with one ``{}``; None samples ten from the model.
    ``locality_prompts``: unrelated prompts for edits that bring none; None takes a pool of general
    ones. ``chat_template``: put prompts into the tokenizer's chat template. ``batch_size``: edits
    trained together. ``seed`` draws masks, templates and what merges keep at random. Raises
    ``ValueError`` for values out of range.
    """

    edit_module: str | None = None
    n_iter: int = 70
    edit_lr: float = 1.0
    mask_ratio: float = 0.2
    act_margin: tuple[float, float, float] = (5.0, 20.0, 10.0)
    act_ratio: float = 0.88
    norm_constraint: float | None = 1.0
    save_freq: int = 500
    merge_freq: int = 1000
    merge_alg: str = "ties"
    density: float = 0.53
    retrieve: bool = True
    replay: bool = False
    activation: str | None = "model"
    reduction: str = "auto"
    quirks: str = "none"
    seed: int = 0
    calibrate: bool = False
    templates: Sequence[str] | None = None
    locality_prompts: Sequence[str] | None = None
    chat_template: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.edit_module is not None and not (
            isinstance(self.edit_module, str) and self.edit_module
        ):
            raise ValueError(f"edit_module is {self.edit_module!r}; pass one name")
        for name in ("n_iter", "save_freq", "merge_freq", "batch_size"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number of 1 or more is needed")
        if self.merge_freq % self.save_freq:
            raise ValueError(
                f"merge_freq {self.merge_freq} is not a multiple of save_freq {self.save_freq}; "
                "a merge takes whole shards"
            )
        if self.save_freq % self.batch_size:
            raise ValueError(
                f"save_freq {self.save_freq} is not a multiple of batch_size {self.batch_size}; "
                "a shard takes whole batches"
            )
        for name in ("edit_lr", "act_ratio"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; a finite number above 0 is needed")
        for name in ("mask_ratio", "density"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value <= 1):
                raise ValueError(f"{name} is {value!r}; a number above 0 and up to 1 is needed")
        limit = self.norm_constraint
        if limit is not None and not (_is_number(limit) and limit > 0):
            raise ValueError(f"norm_constraint is {limit!r}; above 0 or None is needed")
        if not (_is_whole(self.seed) and 0 <= self.seed < 1 << 32):
            raise ValueError(f"seed is {self.seed!r}; a whole number, 0 to 2**32 - 1, is needed")
        for name in ("retrieve", "replay", "calibrate", "chat_template"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; True or False is needed")
        self._check_margins()
        self._check_names()
        self._check_texts()

    def _check_margins(self) -> None:
        margins = tuple(self.act_margin) if isinstance(self.act_margin, Sequence) else ()
        if len(margins) != 3 or not all(_is_number(m) and math.isfinite(m) for m in margins):
            raise ValueError(f"act_margin is {self.act_margin!r}; three finite numbers are needed")
        object.__setattr__(self, "act_margin", margins)

    def _check_names(self) -> None:
        for name, allowed in (
            ("merge_alg", MERGES),
            ("reduction", REDUCTIONS),
            ("quirks", QUIRKS),
            ("activation", ("model", *ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}")

    def _check_texts(self) -> None:
        for name in ("templates", "locality_prompts"):
            texts = getattr(self, name)
            if texts is None:
                continue
            if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"{name} is {texts!r}; pass a list of at least one text")
            object.__setattr__(self, name, tuple(texts))
        if any(not prompt.strip() for prompt in self.locality_prompts or ()):
            raise ValueError(f"locality_prompts is {self.locality_prompts!r}; one of them is empty")
        for template in self.templates or ():
            if template.count(SLOT) != 1:
                raise ValueError(f"template {template!r} does not hold {SLOT} exactly once")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> WiseConfig:
        """Return the published settings for a known model, with ``changes`` to any field.

        Names: gpt2-xl, gpt-j-6b, llama-2-7b, llama-3-8b, mistral-7b, qwen2.5-7b. Raises
        ``ValueError`` for another name and ``TypeError`` for a field that does not exist.
        """
        return dataclasses.replace(cls(**wise_preset(name)), **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        settings = dataclasses.asdict(self)
        for name in ("act_margin", "templates", "locality_prompts"):
            if settings[name] is not None:
                settings[name] = list(settings[name])
        return settings


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)
