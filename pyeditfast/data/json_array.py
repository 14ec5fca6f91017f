"""Reads a JSON array one element at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from pyeditfast.errors import RecordError

_CHUNK = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# What may be left of an escape or of a number's fraction or exponent.
_CUT_TOKEN = re.compile(r"\\?u?[0-9a-fA-F]{0,4}|\.|[eE][+-]?")
# The decoder reports a literal or escape that the window cuts at its start, at most this far
# from the window's end ("-Infinity" is the longest).
_LONGEST_TOKEN = 12


class _Window:
    """A moving window on the text: all of it that is not consumed yet, and the place in it."""

    def __init__(self, stream: TextIO, path: str) -> None:
        self.path = path
        self.stream = stream
        self.text = ""
        self.position = 0
        self.complete = 0
        self._lines_before = 0
        self._columns_before = 0
        self._next_read = _CHUNK
        self._decode = json.JSONDecoder().raw_decode

    def fill(self) -> bool:
        """Drops what is consumed and reads on; False at the end of the file."""
        chunk = self.stream.read(self._next_read)
        if not chunk:
            return False
        consumed = self.text[: self.position]
        self._lines_before, self._columns_before = self._place(consumed)
        self.text = self.text[self.position :] + chunk
        self.position = 0
        # A value larger than the window is decoded anew after every read: doubling keeps the
        # sum of those attempts proportional to its length.
        self._next_read = max(_CHUNK, len(self.text))
        return True

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.fill():
                return ""

    def value(self) -> object:
        """Decodes the value at the position and moves behind it."""
        while True:
            try:
                value, end = self._decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = self._could_be_cut(error)
                if cut and self.fill():
                    continue
                if cut and self._is_cut(error):
                    raise self.truncated() from None
                raise self.invalid(error.msg, error.pos) from None
            except RecursionError:
                raise self.invalid("nested too deeply", self.position) from None
            except ValueError as error:
                raise self.invalid(str(error), self.position) from None
            # A number at the window's end may go on in the next chunk: "1" in "1e+5".
            near_end = end >= len(self.text) - _LONGEST_TOKEN
            if near_end and isinstance(value, (int, float)) and self.fill():
                continue
            self.position = end
            return value

    def invalid(self, reason: str, position: int) -> RecordError:
        lines, columns = self._place(self.text[:position])
        return RecordError(
            f"{self.path}: line {lines + 1}, column {columns + 1}: not valid JSON: {reason} "
            f"(after {self.complete} complete records)"
        )

    def truncated(self) -> RecordError:
        return RecordError(
            f"{self.path}: the file ends before the JSON array does, "
            f"after {self.complete} complete records"
        )

    def _place(self, text: str) -> tuple[int, int]:
        """Line and column, counted from 0, of the end of ``text`` taken from the window's start."""
        lines = text.count("\n")
        if lines:
            return self._lines_before + lines, len(text) - text.rfind("\n") - 1
        return self._lines_before, self._columns_before + len(text)

    def _could_be_cut(self, error: json.JSONDecodeError) -> bool:
        return (
            error.msg.startswith("Unterminated string")
            or error.pos >= len(self.text) - _LONGEST_TOKEN
        )

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        if error.msg.startswith("Unterminated string"):
            return True
        rest = self.text[error.pos :].strip()
        return bool(_CUT_TOKEN.fullmatch(rest)) or any(
            literal.startswith(rest) for literal in _LITERALS
        )


def read_json_array(stream: TextIO, path: str) -> Iterator[object]:
    """Yields the elements of the JSON array in ``stream``, in order.

    Memory is proportional to the largest element, not to the array.

    Args:
        stream: text whose first character that is no white space is ``[``.
        path: the file's name, for errors.

    Raises:
        RecordError: the text is not valid JSON (with line, column and reason), ends too early
            (with the number of complete elements), or goes on after the array. The elements
            before the fault have been yielded by then.
    """
    window = _Window(stream, path)
    window.peek()
    window.position += 1
    next_character = window.peek()
    while next_character != "]":
        if not next_character:
            raise window.truncated()
        value = window.value()
        window.complete += 1
        yield value
        next_character = window.peek()
        if next_character == ",":
            window.position += 1
            next_character = window.peek()
            if next_character == "]":
                raise window.invalid("a comma before the closing ']'", window.position)
        elif next_character not in ("]", ""):
            raise window.invalid("expected ',' or ']' after a value", window.position)
    window.position += 1
    if window.peek():
        raise window.invalid("text after the array's closing ']'", window.position)
