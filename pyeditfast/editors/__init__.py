"""The editors: UltraEdit and WISE, their settings and reports."""

from pyeditfast.editors.report import EditReport, Rejection
from pyeditfast.editors.ultraedit import UltraEditor
from pyeditfast.editors.ultraedit_config import UltraEditConfig
from pyeditfast.editors.wise import WiseEditor
from pyeditfast.editors.wise_config import WiseConfig

__all__ = [
    "EditReport",
    "Rejection",
    "UltraEditConfig",
    "UltraEditor",
    "WiseConfig",
    "WiseEditor",
]
