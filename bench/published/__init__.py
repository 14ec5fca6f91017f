"""The published UltraEdit procedure: the baseline of measurements and parity tests."""

from __future__ import annotations

from pyeditfast_published.evaluate import published_scores
from pyeditfast_published.ultraedit import PublishedUltraEdit, published_shift

__all__ = ["PublishedUltraEdit", "published_scores", "published_shift"]
