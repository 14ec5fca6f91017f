"""Reads rows of a Parquet file a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyeditfast.errors import RecordError

_ROWS_PER_BATCH = 512
_READ_BUFFER_BYTES = 1 << 16


def check_pyarrow(path: Path) -> None:
    """Raises ImportError, naming what to install, if pyarrow is not there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{path} is Parquet, which needs pyarrow: pip install pyeditfast[data]"
        ) from error


class ParquetRows:
    """The rows of a Parquet file as dictionaries.

    Args:
        path: the file's path.

    Raises:
        RecordError: the file is not readable as Parquet.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        self._faults = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        # With a read buffer and no read-ahead a column is streamed page by page; otherwise a row
        # group's columns are read whole, and a file may be one row group.
        self._file: Any = None
        try:
            self._file = pyarrow.parquet.ParquetFile(
                path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False
            )
        except FileNotFoundError:
            raise
        except self._faults as error:
            raise self._unreadable(error, 0) from error

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def columns(self) -> list[str]:
        """Names of the top-level columns, in the file's order."""
        return list(self._file.schema_arrow.names)

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, object]]:
        """Yields the rows in order, with only ``columns`` read from the file.

        Raises:
            RecordError: a damaged page; the rows of the batches before it have been yielded.
        """
        index = 0
        batches = self._file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            except self._faults as error:
                raise self._unreadable(error, index) from error
            if rows is None:
                return
            yield from rows
            index += len(rows)

    def _unreadable(self, error: BaseException, index: int) -> RecordError:
        return RecordError(
            f"{self._path}: cannot be read as Parquet after {index} complete records: {error}"
        )
