"""The package's front: public names, and imports that do nothing before they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyeditfast


def test_every_public_name_resolves():
    assert set(pyeditfast._HOMES) == set(pyeditfast.__all__)
    for name in pyeditfast.__all__:
        assert getattr(pyeditfast, name).__name__ == name
    assert pyeditfast.__version__[0].isdigit()
    assert set(pyeditfast.__all__) <= set(dir(pyeditfast))
    with pytest.raises(AttributeError, match="no attribute 'UltraEdit'"):
        _ = pyeditfast.UltraEdit


def test_help_loads_neither_torch_nor_transformers():
    program = (
        "import sys, pyeditfast, pyeditfast.cli; "
        "print(sorted({'torch', 'transformers', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"


def test_dependencies_point_one_way():
    """CLI → editors → model → ops → backends: no module imports what stands above it."""
    from pathlib import Path

    root = Path(pyeditfast.__file__).parent
    above = {
        "reference": ("ops", "model", "editors", "cli", "demo", "data", "backends"),
        "ops": ("model", "editors", "cli", "demo", "data", "evaluation"),
        "model": ("editors", "cli", "demo", "data", "evaluation"),
        "data": ("ops", "model", "editors", "cli", "demo", "evaluation", "backends"),
        "editors": ("cli", "demo", "evaluation", "backends", "reference"),
    }
    offences = [
        f"{path.relative_to(root)} imports {name}"
        for layer, names in above.items()
        for path in (root / layer).rglob("*.py")
        for name in names
        if f"from pyeditfast.{name}" in path.read_text()
        or f"from pyeditfast import {name}" in path.read_text()
    ]
    assert offences == []
