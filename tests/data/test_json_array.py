"""The incremental JSON array reader against the whole-text parser."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeditfast.data import json_array
from pyeditfast.data.json_array import read_json_array
from pyeditfast.errors import RecordError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.text(alphabet='\\"[]{},: \nu'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Trickle(io.StringIO):
    """Text that comes a few characters a read, whatever is asked for."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text, newline="")
        self.step = step

    def read(self, size: int | None = -1) -> str:
        return super().read(self.step)


@given(
    st.lists(values, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_any_array_in_pieces_of_any_size(records, step, indent, escape):
    text = " \n" + json.dumps(records, indent=indent, ensure_ascii=escape) + "\r\n "
    assert list(read_json_array(Trickle(text, step), "file")) == records


objects = st.dictionaries(st.text(), values, max_size=3)


@given(st.lists(objects, min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_a_cut_array_yields_its_complete_records_and_counts_them(records, step, data):
    pieces = [json.dumps(record) for record in records]
    text = "[" + ",".join(pieces) + "]"
    cut = data.draw(st.integers(1, len(text) - 1))
    seen = []
    with pytest.raises(RecordError) as caught:
        for value in read_json_array(Trickle(text[:cut], step), "file"):
            seen.append(value)
    ends = [1 + len(",".join(pieces[: count + 1])) for count in range(len(pieces))]
    complete = sum(end <= cut for end in ends)
    assert seen == records[:complete]
    assert str(caught.value) == (
        f"file: the file ends before the JSON array does, after {complete} complete records"
    )


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"a": 1},\n {"b" 2}]', "line 2, column 7", "Expecting ':' delimiter"),
        ('[{"a": 1}, oops]', "line 1, column 12", "Expecting value"),
        ('[{"a": 1}\n{"b": 2}]', "line 2, column 1", "expected ',' or ']' after a value"),
        ('[{"a": 1}, ]', "line 1, column 12", "a comma before the closing ']'"),
        ('[{"a": 1}]\n\n x', "line 3, column 2", "text after the array's closing ']'"),
        ('[{"a": 1}, {"b": "x\ny"}]', "line 1, column 20", "Invalid control character at"),
        ('[{"a": 1}, {"b": "\\q"}]', "line 1, column 19", "Invalid \\escape"),
        ('[{"a": 1}, {"b": "\\uZZ"}]', "line 1, column 20", "Invalid \\uXXXX escape"),
        ("[1, [" + "7" * 5000 + "]]", "line 1, column 5", "Exceeds the limit"),
        ("[1, " + "[" * 200_000, "line 1, column 5", "nested too deeply"),
    ],
)
def test_a_syntax_error_has_line_column_and_reason(text, place, reason, step):
    if len(text) > 1000 and step == 1:
        step = 1000
    seen = []
    with pytest.raises(RecordError) as caught:
        for value in read_json_array(Trickle(text, step), "file"):
            seen.append(value)
    assert len(seen) == 1
    assert str(caught.value).startswith(f"file: {place}: not valid JSON: {reason}")
    assert str(caught.value).endswith("(after 1 complete records)")


def test_an_error_far_behind_the_window_s_start_has_the_right_place(monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 16)
    text = "[\n" + '  {"key": "value"},\n' * 50 + '  {"key": value}\n]'
    with pytest.raises(RecordError, match="line 52, column 11: not valid JSON: Expecting value"):
        list(read_json_array(io.StringIO(text), "file"))


def test_a_record_larger_than_many_windows(monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 16)
    record = {"text": "x" * 100_000, "more": list(range(1000))}
    assert list(read_json_array(io.StringIO(json.dumps([record, record])), "file")) == [record] * 2


def test_an_error_does_not_make_the_reader_take_the_rest_of_the_file():
    text = '[{"a": oops}, ' + '{"a": 1}, ' * 100_000
    stream = io.StringIO(text)
    with pytest.raises(RecordError, match="column 8"):
        list(read_json_array(stream, "file"))
    assert stream.tell() <= 1 << 17


def test_nan_and_infinity_are_read():
    (value,) = read_json_array(io.StringIO('[{"a": NaN, "b": -Infinity}]'), "file")
    assert value["a"] != value["a"]
    assert value["b"] == float("-inf")
