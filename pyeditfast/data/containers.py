"""Tells what a file of records is by its content, and opens it."""

from __future__ import annotations

import enum
import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TextIO, cast

from pyeditfast.errors import RecordError

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLOCK = 1 << 16
GZIP_FAULTS = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading damaged or cut gzip raises."""


class Container(enum.Enum):
    """How records are laid one after the other in a file."""

    JSON_ARRAY = "JSON array"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip, by its first two bytes."""
    with path.open("rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading; gzip is unpacked on the way."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")


def open_text(stream: IO[bytes]) -> TextIO:
    """Bytes as UTF-8 text, a byte order mark dropped, bytes that are not UTF-8 kept as surrogates.

    Keeping them lets the reader go on to the record they are in and name its field.
    """
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def check_file(path: Path) -> None:
    """Raises what is wrong with a path before anything is read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, or something that cannot be read twice (a pipe).
    """
    path.stat()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the path of one file of records")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; save it to a file first")


def detect_container(path: Path) -> Container:
    """Tells the container from the file's first bytes; the name does not matter.

    Raises:
        RecordError: the file is empty, damaged gzip, or none of the known containers.
        ValueError: a Parquet file inside gzip, which cannot be streamed.
    """
    try:
        start = _first_bytes(path)
    except GZIP_FAULTS as error:
        raise RecordError(f"{path}: damaged gzip: {error}") from error
    if start.startswith(_PARQUET_MAGIC):
        if is_gzip(path):
            raise ValueError(
                f"{path} is a Parquet file inside gzip, which cannot be streamed; unpack it first"
            )
        return Container.PARQUET
    if start.startswith(b"["):
        return Container.JSON_ARRAY
    if start.startswith(b"{"):
        return Container.JSON_LINES
    if not start:
        raise RecordError(f"{path}: the file is empty")
    hint = "; it looks like UTF-16: convert it to UTF-8" if start.startswith(_UTF16_MARKS) else ""
    raise RecordError(
        f"{path}: neither a JSON array (starts with '['), nor JSON lines (starts with '{{'), "
        f"nor Parquet (starts with 'PAR1'): it starts with {start[:24]!r}{hint}"
    )


def _first_bytes(path: Path) -> bytes:
    """The first bytes that are no white space and no byte order mark; none if there are none."""
    with open_bytes(path) as stream:
        head = stream.read(_BLOCK).removeprefix(_BYTE_ORDER_MARK)
        while head:
            if start := head.lstrip():
                return start
            head = stream.read(_BLOCK)
    return b""
