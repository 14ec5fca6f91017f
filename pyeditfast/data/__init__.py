"""Edit records and the readers that stream them from files."""

from __future__ import annotations

from pyeditfast.data.edit import Edit, Probe
from pyeditfast.data.formats import FORMATS
from pyeditfast.data.load_edits import load_edits

__all__ = ["FORMATS", "Edit", "Probe", "load_edits"]
