"""Fast lifelong knowledge editing of causal language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeditfast.backends import Choice, backend, chosen_backends
    from pyeditfast.data import Edit, Probe, load_edits
    from pyeditfast.editors import (
        EditReport,
        Rejection,
        UltraEditConfig,
        UltraEditor,
        WiseConfig,
        WiseEditor,
    )
    from pyeditfast.evaluation import Scores, evaluate
    from pyeditfast.loading import load_model
    from pyeditfast.model.query_routing import Route

# Imported at first use: torch and transformers take seconds, and `pyeditfast --help` needs neither.
_HOMES = {
    "Choice": "backends",
    "Edit": "data",
    "EditReport": "editors",
    "Probe": "data",
    "Rejection": "editors",
    "Route": "model.query_routing",
    "Scores": "evaluation",
    "UltraEditConfig": "editors",
    "UltraEditor": "editors",
    "WiseConfig": "editors",
    "WiseEditor": "editors",
    "backend": "backends",
    "chosen_backends": "backends",
    "evaluate": "evaluation",
    "load_edits": "data",
    "load_model": "loading",
}

__all__ = [
    "Choice",
    "Edit",
    "EditReport",
    "Probe",
    "Rejection",
    "Route",
    "Scores",
    "UltraEditConfig",
    "UltraEditor",
    "WiseConfig",
    "WiseEditor",
    "backend",
    "chosen_backends",
    "evaluate",
    "load_edits",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pyeditfast")
        except PackageNotFoundError:
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'pyeditfast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pyeditfast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
