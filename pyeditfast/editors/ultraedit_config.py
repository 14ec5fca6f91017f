"""Settings of UltraEdit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyeditfast.editors.presets import preset_modules
from pyeditfast.ops.apply_shift import ROUNDINGS
from pyeditfast.ops.running_moments import VARIANCES
from pyeditfast.ops.solve_shift import FORMS


@dataclass(frozen=True)
class UltraEditConfig:
    """Settings of UltraEdit, by default as published (arXiv 2505.14679).

    ``edit_modules``: dotted names of the linear modules to edit; None takes those of the model's
    preset, or without one the two down projections before the last block. ``lr``: scale of the
    values. ``turn_size``: edits solved together. ``micro_batch``: edits whose answer tokens share
    one mean in the loss. ``ridge``: λ. ``variance``: ``"unbiased"`` or ``"published"`` (see
    ``RunningMoments``). ``form``: how the shift is solved (see ``solve_shift``). ``rounding``: how
    it is added to 16-bit weights (see ``apply_shift_``); ``seed`` drives the stochastic one.
    ``tokens_per_pass``: None chooses by free memory. Raises ``ValueError`` for values out of range.
    """

    edit_modules: Sequence[str] | None = None
    lr: float = 1e-6
    turn_size: int = 100
    micro_batch: int = 10
    ridge: float = 1.0
    variance: str = "unbiased"
    form: str = "auto"
    rounding: str = "nearest"
    tokens_per_pass: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.edit_modules, str):
            raise ValueError(
                f"edit_modules is the string {self.edit_modules!r}; pass a list of names"
            )
        if self.edit_modules is not None:
            object.__setattr__(self, "edit_modules", tuple(self.edit_modules))
        for name in ("lr", "ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; a finite number above 0 is needed")
        for name in ("turn_size", "micro_batch", "tokens_per_pass"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number of 1 or more is needed")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; 0 to 2**32 - 1 is needed")
        for name, allowed in (("variance", VARIANCES), ("form", FORMS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UltraEditConfig:
        """Return the settings for a known model, with ``changes`` to any field.

        Names: gpt2-xl, gpt-j-6b, llama-2-7b, llama-3-8b, mistral-7b, qwen2.5-7b, phi-4,
        gemma-3-27b. Raises ``ValueError`` for another name and ``TypeError`` for a field that does
        not exist.
        """
        return dataclasses.replace(cls(edit_modules=preset_modules(name)), **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        settings = dataclasses.asdict(self)
        if self.edit_modules is not None:
            settings["edit_modules"] = list(self.edit_modules)
        return settings
