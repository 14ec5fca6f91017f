"""The published UltraEdit and WISE procedures: the baseline of measurements and parity tests."""

from __future__ import annotations

from pyeditfast_published.evaluate import published_scores
from pyeditfast_published.ties_merge import published_ties
from pyeditfast_published.ultraedit import PublishedUltraEdit, published_shift
from pyeditfast_published.wise import PublishedWise

__all__ = [
    "PublishedUltraEdit",
    "PublishedWise",
    "published_scores",
    "published_shift",
    "published_ties",
]
