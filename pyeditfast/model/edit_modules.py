"""The linear modules that are edited: found by name, checked, and seen as ``[d_out, d_in]``
matrices.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyeditfast.errors import UnknownModuleError, UnsupportedWeightError


@dataclass(frozen=True)
class EditModule:
    """A linear module of a model, by its dotted name."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """Return the weight as a view ``[d_out, d_in]`` that shares memory with the model's."""
        stored = self.module.weight.data
        assert isinstance(stored, Tensor)
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(d_in, d_out)``."""
        d_out, d_in = self.weight.shape
        return d_in, d_out


def find_edit_modules(model: nn.Module, names: Iterable[str]) -> list[EditModule]:
    """Return the modules called ``names``, in that order.

    Raises ``UnknownModuleError`` (with the nearest names) for a name that is not in the model,
    ``ValueError`` for no names or a repeated name, and ``UnsupportedWeightError`` for a module
    whose weight cannot be edited in place.
    """
    names = list(names)
    if not names:
        raise ValueError("edit_modules is empty; name at least one linear module")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"edit_modules names {', '.join(repeated)} more than once")
    known = dict(model.named_modules())
    return [EditModule(name, _checked(name, known)) for name in names]


def _checked(name: str, known: dict[str, nn.Module]) -> nn.Module:
    module = known.get(name)
    if module is None:
        linear = [key for key, value in known.items() if isinstance(value, nn.Linear | Conv1D)]
        # A suffix match first: the same block under another prefix is what is meant most often.
        ending = [key for key in linear if key.endswith(".".join(name.split(".")[-4:]))]
        nearest = (ending or difflib.get_close_matches(name, linear, n=3, cutoff=0.0))[:3]
        raise UnknownModuleError(
            f"the model has no module {name!r}; the nearest are {', '.join(nearest) or 'none'}"
        )
    if not isinstance(module, nn.Linear | Conv1D):
        raise UnsupportedWeightError(
            f"{name} is a {type(module).__name__}; an nn.Linear or a Conv1D is needed"
        )
    weight = module.weight
    # Quantization libraries also hide behind tensor subclasses that call themselves bfloat16.
    plain = type(weight.data) is Tensor
    if not plain or not weight.is_floating_point() or weight.element_size() == 1:
        kind = weight.dtype if plain else type(weight.data).__name__
        raise UnsupportedWeightError(
            f"{name} holds a {kind} weight ({type(module).__name__}); "
            "quantized weights cannot be edited in place: "
            "load the model in bfloat16, float16 or float32"
        )
    if weight.device.type == "meta":
        raise UnsupportedWeightError(
            f"{name} is offloaded; keep edited modules on a device (see device_map)"
        )
    return module
