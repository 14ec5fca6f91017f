"""Reads JSON lines: one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from pyeditfast.errors import RecordError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FIRST_LINE_HINT = (
    " (a file that starts with '{' must hold one whole record a line; a JSON array starts with '[')"
)


def read_json_lines(stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Yields ``(line, value)`` for every line that is not blank; lines count from 1.

    A line that is not valid JSON yields a `RecordError` in place of its value, so that the
    caller decides whether to go on.

    Args:
        stream: UTF-8 text as bytes. Bytes that are not UTF-8 become lone surrogates, which
            `fields.check_text` reports with the field they are in.
    """
    decode = json.JSONDecoder().decode
    first = True
    for line, raw in enumerate(stream, start=1):
        if line == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if not raw.strip():
            continue
        value: object
        try:
            value = decode(raw.decode("utf-8", "surrogateescape"))
        except json.JSONDecodeError as error:
            hint = _FIRST_LINE_HINT if first else ""
            value = RecordError(f"column {error.pos + 1}: not valid JSON: {error.msg}{hint}")
        except RecursionError:
            value = RecordError("not valid JSON: nested too deeply")
        except ValueError as error:
            value = RecordError(f"not valid JSON: {error}")
        first = False
        yield line, value
