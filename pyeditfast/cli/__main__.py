"""``python -m pyeditfast.cli``."""

from __future__ import annotations

from pyeditfast.cli import main

main()
