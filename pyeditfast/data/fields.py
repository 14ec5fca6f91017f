"""Typed access to the fields of one raw record.

Every function raises `RecordError` with the field's name and no place; the loader puts the
file and the record's place in front.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping

from pyeditfast.errors import RecordError

JSON_TYPE_NAMES: dict[type, str] = {
    str: "text",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "list",
    dict: "object",
    type(None): "null",
}

_MOST_KEYS_SHOWN = 20


def _excerpts() -> reprlib.Repr:
    excerpts = reprlib.Repr()
    excerpts.maxlevel = 3
    excerpts.maxstring = 60
    excerpts.maxother = 60
    return excerpts


_EXCERPTS = _excerpts()


def describe(value: object) -> str:
    """Names a value's JSON type and shows the value, shortened."""
    name = JSON_TYPE_NAMES.get(type(value), type(value).__name__)
    return name if value is None else f"{name}: {_EXCERPTS.repr(value)}"


def key_list(keys: Iterable[object]) -> str:
    """Keys for an error's text, shortened."""
    names = [repr(str(key)) for key in keys]
    if len(names) > _MOST_KEYS_SHOWN:
        names[_MOST_KEYS_SHOWN:] = [f"and {len(names) - _MOST_KEYS_SHOWN} more"]
    return ", ".join(names) or "none"


def is_absent(value: object) -> bool:
    """Whether an optional field counts as left out: null, or the NaN that data frames export."""
    return value is None or (isinstance(value, float) and value != value)


def check_text(field: str, value: object) -> str:
    """Returns ``value`` if it is text that can be encoded."""
    if not isinstance(value, str):
        raise RecordError(f"field {field!r} must be text, got {describe(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # Readers turn bytes that are not UTF-8 into U+DC80..U+DCFF, so this catches both
            # those and lone surrogates written as escapes.
            code_point = ord(value[error.start])
            what = (
                f"byte 0x{code_point - 0xDC00:02x}, which is not UTF-8"
                if 0xDC80 <= code_point <= 0xDCFF
                else f"U+{code_point:04X}, half of a surrogate pair"
            )
            raise RecordError(
                f"field {field!r} holds {what}, at character {error.start}: {value!r:.80}"
            ) from None
    return value


def missing(field: str, record: Mapping[str, object], prefix: str = "") -> RecordError:
    """The error for a field that is not there, with the keys that are."""
    return RecordError(f"field '{prefix}{field}' is missing; the keys are {key_list(record)}")


def required_text(record: Mapping[str, object], *names: str, prefix: str = "") -> str:
    """The text under the first of ``names`` that is there and not null.

    Args:
        record: the raw record.
        names: the field's names in order of preference.
        prefix: path of a nested record, for the error.

    Raises:
        RecordError: none of the names is there, or the value is not text.
    """
    present = [name for name in names if name in record]
    if not present:
        raise missing("' or '".join(names), record, prefix)
    for name in present:
        if not is_absent(record[name]):
            return check_text(prefix + name, record[name])
    return check_text(prefix + present[0], record[present[0]])


def optional_text(record: Mapping[str, object], *names: str, prefix: str = "") -> str | None:
    """The text under the first of ``names`` that is there and not null, or None."""
    for name in names:
        value = record.get(name)
        if not is_absent(value):
            return check_text(prefix + name, value)
    return None


def first_text(field: str, value: object) -> str | None:
    """The first text in ``value``: text itself, or a list nested to any depth, read in order.

    Published ground truths are lists of aliases, nested one or two deep, sometimes empty.
    Returns None if there is none.
    """
    pending = [value]
    while pending:
        member = pending.pop()
        if isinstance(member, list):
            pending.extend(reversed(member))
        elif not is_absent(member):
            return check_text(field, member)
    return None


def optional_object(
    record: Mapping[str, object], name: str, prefix: str = ""
) -> Mapping[str, object]:
    """The nested record under ``name``; an empty one if it is not there."""
    value = record.get(name)
    if is_absent(value):
        return {}
    if not isinstance(value, Mapping):
        raise RecordError(f"field '{prefix}{name}' must be an object, got {describe(value)}")
    return value


def required_object(
    record: Mapping[str, object], name: str, prefix: str = ""
) -> Mapping[str, object]:
    """The nested record under ``name``.

    Raises:
        RecordError: it is not there or not an object.
    """
    if is_absent(record.get(name)):
        raise missing(name, record, prefix)
    return optional_object(record, name, prefix)


def object_list(field: str, value: object) -> Iterator[Mapping[str, object]]:
    """The objects of a list; nothing if it is null."""
    if is_absent(value):
        return
    if not isinstance(value, list):
        raise RecordError(f"field {field!r} must be a list of objects, got {describe(value)}")
    for position, member in enumerate(value):
        if not isinstance(member, Mapping):
            raise RecordError(
                f"field '{field}[{position}]' must be an object, got {describe(member)}"
            )
        yield member
