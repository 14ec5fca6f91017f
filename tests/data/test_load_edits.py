"""Containers, error policies and memory of the streaming reader."""

from __future__ import annotations

import builtins
import dataclasses
import gzip
import json
import logging
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyeditfast.data import Edit, Probe, load_edits
from pyeditfast.errors import RecordError

CONTAINERS = ("array", "lines", "parquet")
RECORDS = [{"prompt": f"p{i}", "target": f"t{i}", "subject": "é\u2028💡"} for i in range(3)]
EDITS = [Edit(f"p{i}", f"t{i}", "é\u2028💡") for i in range(3)]

probes = st.builds(Probe, st.text(), st.text())
optional = st.none() | st.text()
edits = st.builds(
    Edit,
    prompt=st.text(),
    target=st.text(),
    subject=optional,
    rephrase=optional,
    locality_prompt=optional,
    locality_target=optional,
    portability=st.lists(probes, max_size=3).map(tuple),
)


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(originals=st.lists(edits, min_size=1, max_size=4))
def test_round_trip_of_any_text(container, originals, write_at, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "edits"
    write_at(path, container, [dataclasses.asdict(edit) for edit in originals])
    assert list(load_edits(path, format="pyeditfast")) == originals
    assert list(load_edits(path)) == originals


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["edits", "edits.json", "edits.jsonl", "edits.parquet", "a.txt"])
def test_the_content_tells_the_container_whatever_the_name(container, name, write):
    assert list(load_edits(write(RECORDS, container, name))) == EDITS


@pytest.mark.parametrize("container", ["array", "lines"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r\n\t", b"\n" * 200_000])
def test_gzip_byte_order_mark_and_leading_space(container, packed, start, write, write_text):
    content = write(RECORDS, container).read_bytes()
    assert list(load_edits(write_text(start + content, packed))) == EDITS


def test_json_lines_with_blank_lines_carriage_returns_and_no_last_newline(write_text):
    lines = [json.dumps(record).encode() for record in RECORDS]
    path = write_text(b"\n  \n" + lines[0] + b"\r\n\r\n" + lines[1] + b"\n\t\n" + lines[2])
    assert list(load_edits(path)) == EDITS


def test_a_string_path_and_an_empty_array(write_text):
    assert list(load_edits(str(write_text(" [ \n] ")))) == []


def test_records_are_read_as_the_iterator_advances(write_text):
    stream = load_edits(write_text('[{"prompt": "p", "target": "t"}, oops'))
    assert next(stream) == Edit("p", "t")
    with pytest.raises(RecordError, match="after 1 complete records"):
        next(stream)


class TestArgumentsAreCheckedAtTheCall:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_edits(tmp_path / "none.json")

    def test_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"is a folder; pass the path of one file") as caught:
            load_edits(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_a_device(self):
        with pytest.raises(ValueError, match=r"^/dev/null is not a regular file"):
            load_edits("/dev/null")

    def test_an_unknown_format(self, write):
        with pytest.raises(ValueError, match=r"'auto', 'pyeditfast', 'zsre'.*got 'zsrre'"):
            load_edits(write(RECORDS), format="zsrre")

    def test_an_unknown_policy(self, write):
        with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
            load_edits(write(RECORDS), on_error="ignore")

    def test_a_report_that_cannot_be_called(self, write):
        with pytest.raises(TypeError, match="report must be callable or None, got list"):
            load_edits(write(RECORDS), on_error="skip", report=[])

    @pytest.mark.parametrize("content", [b"", b" \n\t", b"\xef\xbb\xbf", b"\n" * 200_000])
    @pytest.mark.parametrize("packed", [False, True])
    def test_an_empty_file(self, content, packed, write_text):
        with pytest.raises(RecordError, match=r"edits\.data: the file is empty$"):
            load_edits(write_text(content, packed))

    @pytest.mark.parametrize("content", [b"version https://git-lfs", b"<html>", b'"text"', b"PK\3"])
    def test_something_else(self, content, write_text):
        with pytest.raises(RecordError, match="neither a JSON array") as caught:
            load_edits(write_text(content))
        assert f"it starts with {content!r}" in str(caught.value)
        assert "UTF-16" not in str(caught.value)

    def test_utf16_is_named(self, write_text):
        with pytest.raises(RecordError, match="looks like UTF-16: convert it to UTF-8"):
            load_edits(write_text(json.dumps(RECORDS).encode("utf-16")))

    def test_parquet_inside_gzip(self, write, write_text):
        content = write(RECORDS, "parquet").read_bytes()
        with pytest.raises(ValueError, match="Parquet file inside gzip, which cannot be streamed"):
            load_edits(write_text(content, packed=True))

    def test_parquet_without_pyarrow(self, write, monkeypatch):
        path = write(RECORDS, "parquet")
        original = builtins.__import__

        def without_pyarrow(name, *arguments, **keywords):
            if name.split(".")[0] == "pyarrow":
                raise ImportError("no module named pyarrow")
            return original(name, *arguments, **keywords)

        monkeypatch.setattr(builtins, "__import__", without_pyarrow)
        with pytest.raises(ImportError, match=r"pip install pyeditfast\[data\]"):
            load_edits(path)


def errors_and_edits(path, **arguments):
    """What "skip" passes over (as text) and what it yields."""
    errors = []
    kept = list(load_edits(path, on_error="skip", report=errors.append, **arguments))
    assert all(isinstance(error, RecordError) for error in errors)
    return [str(error) for error in errors], kept


class TestBadRecords:
    def test_a_line_that_is_not_json(self, write_text):
        path = write_text(
            '{"prompt": "a", "target": "b"}\n\n{"prompt": "c" "target": "d"}\n'
            '{"prompt": "e", "target": "f"}\n'
        )
        text = f"{path}: line 3 (index 1): column 16: not valid JSON: Expecting ',' delimiter"
        stream = load_edits(path)
        assert next(stream) == Edit("a", "b")
        with pytest.raises(RecordError) as caught:
            next(stream)
        assert str(caught.value) == text
        assert errors_and_edits(path) == ([text], [Edit("a", "b"), Edit("e", "f")])

    def test_an_object_over_several_lines_gets_a_hint(self, write_text):
        path = write_text('{\n "prompt": "a",\n "target": "b"\n}\n')
        with pytest.raises(RecordError, match="one whole record a line; a JSON array starts with"):
            list(load_edits(path))

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            ('"text"', "text: 'text'"),
            ("7", "number: 7"),
            ("true", "boolean: True"),
            ("null", "null"),
            ("[1]", "list: [1]"),
        ],
    )
    def test_a_record_that_is_no_object(self, value, shown, write_text):
        good = '{"prompt": "a", "target": "b"}'
        array = write_text(f"[{good}, {value}, {good}]")
        expected = f"index 1: a record must be a JSON object, got {shown}"
        assert errors_and_edits(array) == ([f"{array}: {expected}"], [Edit("a", "b")] * 2)
        with pytest.raises(RecordError) as caught:
            list(load_edits(array))
        assert str(caught.value) == f"{array}: {expected}"
        lines = write_text(f"{good}\n{value}\n{good}\n")
        expected = expected.replace("index 1", "line 2 (index 1)")
        assert errors_and_edits(lines) == ([f"{lines}: {expected}"], [Edit("a", "b")] * 2)

    def test_a_first_record_that_is_no_object_leaves_the_layout_open(self, write_text):
        path = write_text('[null, {"prompt": "a", "ans": "b"}]')
        errors, kept = errors_and_edits(path)
        assert kept == [Edit("a", "b")]
        assert errors == [f"{path}: index 0: a record must be a JSON object, got null"]

    @pytest.mark.parametrize("container", ["array", "lines"])
    def test_a_wrong_type_and_a_missing_field(self, container, write):
        bad = [{"prompt": ["x" * 500], "target": "t"}, {"prompt": "p", "goal": 1}]
        path = write([RECORDS[0], *bad, RECORDS[1]], container)
        errors, kept = errors_and_edits(path)
        assert kept == EDITS[:2]
        places = ["index 1", "index 2"]
        if container == "lines":
            places = ["line 2 (index 1)", "line 3 (index 2)"]
        start = f"{path}: {places[0]}: field 'prompt' must be text, got list: ['xxx"
        assert errors[0].startswith(start)
        assert len(errors[0]) < len(start) + 80
        assert errors[1] == (
            f"{path}: {places[1]}: field 'target' is missing; the keys are 'prompt', 'goal'"
        )

    def test_a_null_in_a_parquet_column(self, write):
        path = write([RECORDS[0], {"prompt": "p", "target": None}, RECORDS[1]], "parquet")
        text = f"{path}: index 1: field 'target' must be text, got null"
        assert errors_and_edits(path) == ([text], EDITS[:2])
        with pytest.raises(RecordError) as caught:
            list(load_edits(path))
        assert str(caught.value) == text

    def test_a_parquet_file_without_a_required_column_is_never_skipped(self, write):
        path = write([{"prompt": "p", "note": 1}], "parquet")
        with pytest.raises(RecordError) as caught:
            errors_and_edits(path, format="zsre")
        assert str(caught.value) == f"{path}: field 'src' is missing; the keys are 'prompt', 'note'"

    @pytest.mark.parametrize("separator", [",", "\n"])
    def test_bytes_that_are_not_utf8(self, separator, write_text):
        good = b'{"prompt": "a", "target": "b"}'
        records = [good, b'{"prompt": "caf\xe9", "target": "b"}', good]
        joined = separator.encode().join(records)
        path = write_text(b"[" + joined + b"]" if separator == "," else joined)
        errors, kept = errors_and_edits(path)
        assert kept == [Edit("a", "b")] * 2
        place = "index 1" if separator == "," else "line 2 (index 1)"
        assert errors == [
            f"{path}: {place}: field 'prompt' holds byte 0xe9, which is not UTF-8, "
            r"at character 3: 'caf\udce9'"
        ]
        assert errors[0].encode()

    def test_half_a_surrogate_pair(self, write_text):
        path = write_text('{"prompt": "a\\ud83d", "target": "b"}\n')
        with pytest.raises(RecordError, match=r"'prompt' holds U\+D83D, half of a surrogate pair"):
            list(load_edits(path))

    def test_a_syntax_error_inside_an_array_is_never_skipped(self, write_text):
        path = write_text('[{"prompt": "a", "target": "b"},\n {"prompt": }]')
        with pytest.raises(RecordError) as caught:
            errors_and_edits(path)
        assert str(caught.value) == (
            f"{path}: line 2, column 13: not valid JSON: Expecting value (after 1 complete records)"
        )

    def test_a_cut_array_is_never_skipped(self, write):
        path = write(RECORDS)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(RecordError) as caught:
            errors_and_edits(path)
        assert str(caught.value) == (
            f"{path}: the file ends before the JSON array does, after 2 complete records"
        )

    @pytest.mark.parametrize("container", ["array", "lines"])
    def test_cut_gzip_is_never_skipped(self, container, write):
        path = write([{"prompt": os.urandom(50).hex(), "target": "t"}] * 20_000, container)
        path.write_bytes(gzip.compress(path.read_bytes())[:-3000])
        count = 0
        with pytest.raises(RecordError) as caught:
            for _ in load_edits(path, on_error="skip"):
                count += 1
        assert count > 0
        assert f"{path}: damaged gzip after {count} complete records" in str(caught.value)

    def test_gzip_with_a_wrong_checksum_is_never_skipped(self, write):
        path = write(RECORDS)
        packed = bytearray(gzip.compress(path.read_bytes()))
        packed[-8] ^= 1
        path.write_bytes(packed)
        with pytest.raises(RecordError, match=r"damaged gzip.*CRC check failed"):
            list(load_edits(path, on_error="skip"))

    def test_gzip_damaged_at_the_start(self, write_text):
        path = write_text(b"\x1f\x8b\x08\x00 not gzip at all")
        with pytest.raises(RecordError, match=r"edits\.data: damaged gzip"):
            load_edits(path)

    def test_damaged_parquet(self, write):
        path = write(RECORDS * 1000, "parquet")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(RecordError, match="cannot be read as Parquet after 0 complete records"):
            list(load_edits(path))

    @staticmethod
    def overwrite_column(path, row_group, column):
        """Overwrites a column's pages, headers included, in one row group."""
        parquet = pytest.importorskip("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            chunk = file.metadata.row_group(row_group).column(column)
        content = bytearray(path.read_bytes())
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        path.write_bytes(content)

    def test_a_damaged_parquet_page_is_never_skipped(self, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "edits"
        table = arrow.Table.from_pylist([{"prompt": f"p{i}", "target": "t"} for i in range(2048)])
        parquet.write_table(table, path, row_group_size=1024)
        self.overwrite_column(path, row_group=1, column=0)
        count = 0
        with pytest.raises(RecordError) as caught:
            for _ in load_edits(path, on_error="skip"):
                count += 1
        assert count == 1024
        start = f"{path}: cannot be read as Parquet after 1024 complete records: "
        assert str(caught.value).startswith(start)

    def test_parquet_columns_that_are_not_needed_are_not_read(self, write):
        path = write([{**record, "note": "unread"} for record in RECORDS], "parquet")
        self.overwrite_column(path, row_group=0, column=3)
        assert list(load_edits(path)) == EDITS

    def test_without_report_what_is_skipped_is_logged(self, write, caplog):
        path = write([RECORDS[0], {"prompt": "p"}])
        with caplog.at_level(logging.WARNING, logger="pyeditfast"):
            assert list(load_edits(path, on_error="skip")) == EDITS[:1]
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"passed over a record: {path}: index 1: field 'target'")

    def test_an_error_of_the_report_is_not_swallowed(self, write):
        def stop(error):
            raise EOFError("from the report")

        with pytest.raises(EOFError, match="from the report"):
            list(load_edits(write([RECORDS[0], {}]), on_error="skip", report=stop))


class TestMemory:
    """100,000 records of about 300 bytes: a reader that keeps them would hold over 60 MB."""

    COUNT = 100_000
    LIMIT = 3 * 2**20

    @staticmethod
    def record(number):
        question = f"Question {number}: " + "where was it made, " * 5
        return {
            "prompt": question,
            "rephrase_prompt": question.upper(),
            "ans": f"answer {number}",
            "loc": "an unrelated question",
            "loc_ans": "x",
        }

    def consume(self, path, on_edit=lambda: None):
        tracemalloc.start()
        try:
            for count, edit in enumerate(load_edits(path), start=1):
                last = edit.target
                if count % 1000 == 0:
                    on_edit()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == self.COUNT
        assert last == f"answer {count - 1}"
        return peak

    @pytest.mark.parametrize("container", ["array", "lines"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_json_is_streamed(self, container, packed, tmp_path):
        path = tmp_path / "edits"
        separator = ",\n" if container == "array" else "\n"
        with gzip.open(path, "wt", compresslevel=1) if packed else path.open("w") as file:
            file.write("[" if container == "array" else "")
            for number in range(self.COUNT):
                file.write((separator if number else "") + json.dumps(self.record(number)))
            file.write("]" if container == "array" else "")
        assert packed or path.stat().st_size > 5 * self.LIMIT
        assert self.consume(path) < self.LIMIT

    def test_parquet_of_one_row_group_is_streamed(self, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "edits"
        rows = [self.record(number) for number in range(self.COUNT)]
        table = arrow.Table.from_pylist(rows)
        unread = arrow.array(["unread" * 20] * self.COUNT)
        parquet.write_table(
            table.append_column("note", unread), path, row_group_size=self.COUNT, compression="none"
        )
        del rows, table, unread
        before = arrow.total_allocated_bytes()
        held = []
        peak = self.consume(path, lambda: held.append(arrow.total_allocated_bytes() - before))
        assert path.stat().st_size > 5 * self.LIMIT
        assert peak < self.LIMIT
        # A writer's dictionaries and pages are 1 MiB each by default: one of both for each of
        # the five columns that are read.
        assert max(held) < 5 * 2 * 2**20
