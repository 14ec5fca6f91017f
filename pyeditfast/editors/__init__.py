"""The editors."""

from pyeditfast.editors.report import EditReport, Rejection
from pyeditfast.editors.ultraedit import UltraEditor
from pyeditfast.editors.ultraedit_config import UltraEditConfig

__all__ = ["EditReport", "Rejection", "UltraEditConfig", "UltraEditor"]
