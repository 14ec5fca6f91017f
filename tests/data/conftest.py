"""Writers of small record files for the tests of the readers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def write_records(path: Path, container: str, records: Sequence[object]) -> Path:
    """Writes records to ``path`` as a JSON array, JSON lines or Parquet."""
    if container == "array":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif container == "lines":
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_bytes("".join(lines).encode())
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(list(records)), path)
    return path


@pytest.fixture(scope="session")
def write_at() -> Callable[[Path, str, Sequence[object]], Path]:
    """`write_records`, for tests that choose the path themselves."""
    return write_records


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(records, container="array", name="edits.data")`` writes a file, returns its path."""

    def write_to_folder(
        records: Sequence[object], container: str = "array", name: str = "edits.data"
    ) -> Path:
        return write_records(tmp_path / name, container, records)

    return write_to_folder


@pytest.fixture
def write_text(tmp_path: Path) -> Callable[..., Path]:
    """``write_text(text, packed=False)`` writes text or bytes as they are, or gzipped."""

    def write_to_folder(text: str | bytes, packed: bool = False) -> Path:
        raw = text.encode() if isinstance(text, str) else text
        path = tmp_path / "edits.data"
        path.write_bytes(gzip.compress(raw) if packed else raw)
        return path

    return write_to_folder
