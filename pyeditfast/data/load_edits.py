"""Streams edit records from a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pyeditfast.data.containers import (
    GZIP_FAULTS,
    Container,
    check_file,
    detect_container,
    open_bytes,
    open_text,
)
from pyeditfast.data.edit import Edit
from pyeditfast.data.fields import describe, key_list
from pyeditfast.data.formats import FORMATS, LAYOUTS, Layout, detect_layout
from pyeditfast.data.json_array import read_json_array
from pyeditfast.data.json_lines import read_json_lines
from pyeditfast.data.parquet import ParquetRows, check_pyarrow
from pyeditfast.errors import RecordError

_logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


class _Raw(NamedTuple):
    """One record as read: its value, or the error in its place."""

    position: int
    line: int | None
    value: object


def load_edits(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    on_error: OnError = "raise",
    report: Callable[[RecordError], None] | None = None,
) -> Iterator[Edit]:
    """Streams the edits of a file, in its order, in constant memory.

    The file is a JSON array, JSON lines or Parquet, told by its content; the first two may be
    gzip-compressed and may start with a byte order mark. Memory is that of one record (for
    Parquet a batch of 512 rows and a page of each column), whatever the file's length.

    Args:
        path: one file. A pipe cannot be read: the file is opened more than once.
        format: the layout of a record, one of `FORMATS`; see `pyeditfast.data.formats` for
            the fields of each. "auto" takes it from the first record's keys, and keeps it.
        on_error: "raise" stops at the first bad record. "skip" passes over it; what cannot be
            passed over (a syntax error inside a JSON array, a cut file, damaged gzip or
            Parquet, a first record of no known layout) is raised all the same.
        report: with "skip", called with the error of each record passed over. Without it each
            is logged as a warning.

    Returns:
        An iterator of `Edit`. The arguments and the file's first bytes are checked at the
        call; records are read as the iterator advances.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown ``format`` or ``on_error``, a folder, a pipe, gzipped Parquet.
        TypeError: ``report`` cannot be called.
        ImportError: a Parquet file and no pyarrow.
        RecordError: a bad record. The text names the file, the record's index (from 0), the
            line for JSON lines, the field, and what is wrong with it.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {key_list(FORMATS)}, got {format!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if report is not None and not callable(report):
        raise TypeError(f"report must be callable or None, got {describe(report)}")
    file = Path(path)
    check_file(file)
    container = detect_container(file)
    layout = None if format == "auto" else LAYOUTS[format]
    handle = _log if report is None else report
    if on_error == "raise":
        handle = _raise
    if container is Container.PARQUET:
        check_pyarrow(file)
        return _edits_of_parquet(file, layout, handle)
    return _edits_of_json(file, container, layout, handle)


def _raise(error: RecordError) -> None:
    raise error


def _log(error: RecordError) -> None:
    _logger.warning("passed over a record: %s", error)


def _edits_of_json(
    path: Path,
    container: Container,
    layout: Layout | None,
    handle: Callable[[RecordError], None],
) -> Iterator[Edit]:
    raws = _array_records(path) if container is Container.JSON_ARRAY else _line_records(path)
    for raw in raws:
        if layout is None and isinstance(raw.value, Mapping):
            try:
                layout = detect_layout(raw.value)
            except RecordError as error:
                raise _located(path, raw, error) from None
        try:
            edit = _convert(layout, raw.value)
        except RecordError as error:
            handle(_located(path, raw, error))
            continue
        yield edit


def _edits_of_parquet(
    path: Path,
    layout: Layout | None,
    handle: Callable[[RecordError], None],
) -> Iterator[Edit]:
    with ParquetRows(path) as rows:
        # The columns are those of every record, so what is wrong with them is never skipped.
        try:
            if layout is None:
                layout = detect_layout(rows.columns)
            layout.check(rows.columns)
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from None
        needed = [name for name in rows.columns if name in layout.fields]
        for index, row in enumerate(rows.read(needed)):
            try:
                edit = layout.convert(row)
            except RecordError as error:
                handle(_located(path, _Raw(index, None, row), error))
                continue
            yield edit


def _array_records(path: Path) -> Iterator[_Raw]:
    index = 0
    with open_text(open_bytes(path)) as stream:
        try:
            for value in read_json_array(stream, str(path)):
                yield _Raw(index, None, value)
                index += 1
        except GZIP_FAULTS as error:
            raise _damaged(path, index, error) from error


def _line_records(path: Path) -> Iterator[_Raw]:
    index = 0
    with open_bytes(path) as stream:
        try:
            for line, value in read_json_lines(stream):
                yield _Raw(index, line, value)
                index += 1
        except GZIP_FAULTS as error:
            raise _damaged(path, index, error) from error


def _damaged(path: Path, complete: int, error: BaseException) -> RecordError:
    return RecordError(f"{path}: damaged gzip after {complete} complete records: {error}")


def _convert(layout: Layout | None, value: object) -> Edit:
    if isinstance(value, RecordError):
        raise value
    if layout is None or not isinstance(value, Mapping):
        raise RecordError(f"a record must be a JSON object, got {describe(value)}")
    return layout.convert(value)


def _located(path: Path, raw: _Raw, error: RecordError) -> RecordError:
    place = (
        f"index {raw.position}" if raw.line is None else f"line {raw.line} (index {raw.position})"
    )
    return RecordError(f"{path}: {place}: {error}")
