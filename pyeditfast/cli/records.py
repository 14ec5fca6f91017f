"""The edit file of a command."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyeditfast.data import Edit, load_edits
from pyeditfast.errors import RecordError


@dataclass(frozen=True)
class Records:
    """The first ``limit`` records of the file ``path``; with ``skip`` bad ones are passed over."""

    path: Path
    format: str
    limit: int | None
    skip: bool

    def read(self) -> Iterator[Edit]:
        """Return the edits as a stream; each record that is passed over is told."""

        def tell(error: RecordError) -> None:
            print(f"skipped: {error}", file=sys.stderr)

        stream = load_edits(
            self.path,
            self.format,
            on_error="skip" if self.skip else "raise",
            report=tell if self.skip else None,
        )
        return itertools.islice(stream, self.limit)

    def read_silently(self) -> Iterator[Edit]:
        """Return the edits as a stream, without a word on records that cannot be read."""
        stream = load_edits(self.path, self.format, on_error="skip", report=lambda error: None)
        return itertools.islice(stream, self.limit)

    def count(self) -> int:
        """Read the records once, so that a bad one shows before the first edit and not hours
        later, and return their number.
        """
        stream = (
            self.read_silently()
            if self.skip
            else itertools.islice(load_edits(self.path, self.format), self.limit)
        )
        total = sum(1 for _ in stream)
        if total == 0:
            raise ValueError(f"{self.path} holds no usable record")
        print(f"{total} records in {self.path}")
        return total
