"""Fast lifelong knowledge editing of causal language models."""

from importlib.metadata import PackageNotFoundError, version

from pyeditfast.backends import Choice, backend, chosen_backends
from pyeditfast.checkpoints import load_model
from pyeditfast.data import Edit, Probe, load_edits
from pyeditfast.editors import EditReport, Rejection, UltraEditConfig, UltraEditor
from pyeditfast.evaluation import Scores, evaluate

try:
    __version__ = version("pyeditfast")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "Choice",
    "Edit",
    "EditReport",
    "Probe",
    "Rejection",
    "Scores",
    "UltraEditConfig",
    "UltraEditor",
    "__version__",
    "backend",
    "chosen_backends",
    "evaluate",
    "load_edits",
    "load_model",
]
