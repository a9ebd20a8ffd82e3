"""JSON Lines, CSV and TSV: rows are those that Python's parsers find, wherever a unit begins; what is odd is a row, a fault or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.corpus.columns import Columns
from embedding.corpus.formats import lines
from embedding.corpus.formats.delimited import _split
from embedding.corpus.formats.names import Format
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import UnitRows, read_layout, read_unit, settle_columns, text_faults
from embedding.corpus.sources import list_sources
from embedding.errors import CorpusError, SourceChangedError, SourceError
from tests.corpus.reading import put_source
from tests.support.corpora import sentences

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
    ".bz2": bz2.compress,
}
TEXTS = [
    *sentences(60, seed=21),
    "",
    'a "quote"',
    "comma, tab\t",
    "two\nlines",
    "two\r\nlines",
    "é 名 🎉",
    " padded ",
    '"',
    '""',
    ",",
    "\n",
]
TYPED = Columns("text", ("id",), None, Format.JSONL)


def read_all(source_url: str, columns: Columns, unit_rows: int) -> tuple[list[Unit], list[UnitRows]]:
    sources = list_sources([source_url], columns.format)
    if columns.format is Format.JSONL:
        columns = settle_columns(sources, columns, columns.schema)
    units = list(plan_units((read_layout(source, columns) for source in sources), unit_rows=unit_rows, fingerprint="f"))
    return units, [read_unit(unit, columns) for unit in units]


def texts(read: list[UnitRows]) -> list[str | None]:
    return [text for part in read for text in part.text.to_pylist()]


def as_jsonl(ends: str) -> bytes:
    return "".join(json.dumps({"text": text, "id": number, "more": [text]}) + ends for number, text in enumerate(TEXTS)).encode()


def as_csv(delimiter: str, ends: str) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=ends)
    writer.writerow(["id", "more", "text"])
    writer.writerows((number, "x", text) for number, text in enumerate(TEXTS))
    return sink.getvalue().replace(f"x{delimiter}{ends}", f'x{delimiter}""{ends}').encode()


@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("block_bytes", [7, 64, 300])
@pytest.mark.parametrize("kind", [Format.JSONL, Format.CSV, Format.TSV])
def test_rows_are_found_wherever_blocks_end(
    kind: Format, block_bytes: int, ends: str, compressed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block_bytes)
    data = as_jsonl(ends) if kind is Format.JSONL else as_csv("," if kind is Format.CSV else "\t", ends)
    put_source(str(tmp_path), COMPRESS[compressed](data), f"a.{kind}{compressed}")
    units, read = read_all(str(tmp_path), Columns("text", ("id",), None, kind), 10)
    assert texts(read) == TEXTS
    assert [str(number) for part in read for number in part.copied["id"].to_pylist()] == list(map(str, range(len(TEXTS))))
    assert [unit.num_rows for unit in units] == [8, 9, 9, 9, 9, 9, 9, 9]
    assert (len({unit.near for unit in units}) > 4) == (not compressed)  # units of plain files begin near their rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz"])
def test_on_every_store(name: str, storage_root: str) -> None:
    data = as_jsonl("\n") if "json" in name else gzip.compress(as_csv(",", "\n"))
    put_source(storage_root, data, name)
    kind = Format.JSONL if "json" in name else Format.CSV
    assert texts(read_all(storage_root, Columns("text", ("id",), None, kind), 30)[1]) == TEXTS


@given(
    st.lists(st.lists(st.text('ab",\r\n', max_size=6), min_size=2, max_size=2), max_size=8),
    st.integers(1, 9),
    st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL)]),
)
def test_rows_of_csv_are_those_that_were_written(rows: list[list[str]], block_bytes: int, written: tuple[str, Literal[0, 1]]) -> None:
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator=written[0], quoting=written[1]).writerows(rows)
    data, expected = sink.getvalue().encode(), [",".join(row) for row in rows]
    found: list[bytes] = []
    rest = b""
    for start in range(0, len(data) + block_bytes, block_bytes):
        rest += data[start : start + block_bytes]
        some, used = _split(rest, last=start >= len(data), delimiter=b",")
        found, rest = found + some, rest[used:]
    assert not rest
    assert b"".join(found) == data
    assert [",".join(next(csv.reader(io.StringIO(row.decode(), newline="")))) for row in found] == expected


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b'{"text": "a", "id": 1}', ["a"]),
        (b'\xef\xbb\xbf{"text": "a", "id": 1}\n\n   \n{"id": 2, "text": "b"}\n', ["a", "b"]),
        (b'{"text": "a", "id": 1}\n{"id": 2}\n{"text": null}\n{"other": {"deep": [1, {}]}, "text": "d"}\n', ["a", None, None, "d"]),
        (b'{"text": "\\u00e9 \\ud83c\\udf89 \\u0000", "id": 1}', ["é 🎉 \0"]),
        (b' \t{"text": "2024-01-01T00:00:00", "id": 1} \r\n', ["2024-01-01T00:00:00"]),
    ],
)
def test_odd_json_lines(data: bytes, found: list[str | None], tmp_path: Path) -> None:
    put_source(str(tmp_path), data, "a.jsonl")
    assert texts(read_all(str(tmp_path), TYPED, 10)[1]) == found


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"id,text\n", []),
        (b"id,text", []),
        (b"\xef\xbb\xbftext,id\r\na,1\r\n\r\n\r\nb,2", ["a", "b"]),
        (b'"id","text"\r1,"a\rb"\r2,c\r', ["a\rb", "c"]),
        (b'id,text\n1,\n2,""\n3,NA\n4,null\n5, \n', [None, "", "NA", "null", " "]),
        (b'id,text\n1,5" pipe\n2,"a"b"c\n', ['5" pipe', 'ab"c']),
        (b"id,te,text\n1,,2024-01-01\n2,,007\n", ["2024-01-01", "007"]),
        (b"id,\n", CorpusError),
    ],
)
def test_odd_csv(data: bytes, found: list[str | None] | type[Exception], tmp_path: Path) -> None:
    put_source(str(tmp_path), data, "a.csv")
    columns = Columns("text", ("id",), None, Format.CSV)
    if isinstance(found, list):
        assert texts(read_all(str(tmp_path), columns, 10)[1]) == found
    else:
        with pytest.raises(found, match="has no column 'text'"):
            read_all(str(tmp_path), columns, 10)


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b'{"id": 1, "text": "a\xff"}\n{"id": 2, "text": "b"}'), ("a.csv", b"id,text\n1,a\xff\n2,b\n")]
)
def test_text_that_is_no_utf8_is_a_fault_of_its_row(name: str, data: bytes, tmp_path: Path) -> None:
    put_source(str(tmp_path), data + b"\n" + (data if name == "a.csv" else b""), name)
    kind = Format(name.removeprefix("a."))
    # JSON's first rows are looked at as text, so that there must be one that is
    (read,) = read_all(str(tmp_path), Columns("text", (), None, kind), 10)[1]
    assert text_faults(read.text)[0] == "text is not valid UTF-8"


DAMAGED: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'[\n  {"text": "a"},\n  {"text": "b"}\n]', "FILE is not a readable JSON Lines file: it is a single JSON array; write one"),
    ("a.jsonl", b'[{"text": "a"}]\n', "FILE is not a readable JSON Lines file: none of its first lines is a JSON object (the first"),
    ("a.jsonl", b'{\n "text": "a"\n}\n', "FILE is not a readable JSON Lines file: none of its first lines is a JSON object (Expecting"),
    ("a.jsonl", b"\xff\xfe{\0}\0", "FILE is not a readable JSON Lines file: it is UTF-16; convert it to UTF-8"),
    ("a.jsonl", b'{"text": "a", "id": 1}\0\n', "FILE is not a readable JSON Lines file: none of its first lines is a JSON object"),
    ("a.jsonl.gz", b"", "FILE is not a readable JSON Lines file: it is empty, but every gzip file has at least a header"),
    ("a.jsonl.gz", gzip.compress(as_jsonl("\n"))[:-9], "FILE is not a readable JSON Lines file: Truncated compressed stream"),
    ("a.jsonl.zst", as_jsonl("\n"), "FILE is not a readable JSON Lines file: ZSTD decompress failed"),
    ("a.csv", b"\xff\xfei\0d\0", "FILE is not a readable CSV file: it is UTF-16"),
    ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', "FILE: row 1 opens a quote that is never closed"),
    ("a.csv", b"id,t\xffxt\n1,a\n", "FILE is not a readable CSV file: 'utf-8' codec can't decode"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "sentence"), DAMAGED)
def test_damage_is_told_with_the_file_and_the_row(name: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    put_source(str(tmp_path), data, name)
    kind = Format(name.split(".")[1])
    columns = Columns("text", ("id",), None, kind, pa.schema({"id": pa.int64(), "text": pa.string()}) if kind is Format.JSONL else None)
    with pytest.raises(SourceError) as caught:
        read_all(str(tmp_path), columns, 10)
    assert str(caught.value).replace(f"file://{tmp_path}/{name}", "FILE").startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    kind = Format(name.removeprefix("a."))
    columns = replace(TYPED, format=kind)
    empty = put_source(str(tmp_path), b"", name)
    assert read_layout(empty, columns).num_rows == 0
    header = {"a.csv": b"id,text\n", "a.tsv": b"id\ttext", "a.jsonl": b"\n"}[name]
    assert read_layout(put_source(str(tmp_path), header, name), columns).num_rows == 0
    if kind is not Format.JSONL:  # a header without rows still has to have the columns
        with pytest.raises(CorpusError, match="has no column 'text'"):
            read_layout(put_source(str(tmp_path), b"id\n", name), columns)


def test_rows_longer_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(lines, "_ROW_BYTES", 2**20)
    long = json.dumps({"id": 1, "text": "x" * 10_000}).encode()
    put_source(str(tmp_path), long + b"\n" + long, "long.jsonl")
    assert texts(read_all(f"{tmp_path}/long.jsonl", TYPED, 10)[1]) == ["x" * 10_000] * 2
    put_source(str(tmp_path), b'{"id": 1, "text": "a"}\n' + b" " * 2**21, "longer.jsonl")
    with pytest.raises(SourceError, match="row 1 is longer than 1 MiB; check for a missing line end or an unclosed quote"):
        read_all(f"{tmp_path}/longer.jsonl", TYPED, 10)


def test_json_types_are_those_of_the_first_rows_and_kept(tmp_path: Path) -> None:
    first: list[dict[str, Any]] = [
        {
            "text": "a",
            "id": 1,
            "score": 1,
            "tags": [],
            "doc": {"body": "x", "n": None},
            "when": "2024-01-01",
            "none": None,
            "odd": {"a": 1},
        },
        {"text": "b", "id": 2, "score": 0.5, "tags": ["t"], "doc": None, "yes": True, "odd": {"a": "x"}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, first)))
    (tmp_path / "b.jsonl").write_text('{"text": "c", "id": 3, "doc": {"body": "y", "n": "now a string", "new": 1}}\n')
    copied = ("id", "score", "tags", "doc", "when", "yes", "none")
    sources = list_sources([str(tmp_path)])
    columns = settle_columns(sources, Columns("doc.body", copied, None, Format.JSONL), None)
    assert columns.schema == pa.schema(
        {
            "id": pa.int64(),
            "score": pa.float64(),
            "tags": pa.list_(pa.string()),
            "doc": pa.struct({"body": pa.string(), "n": pa.string(), "new": pa.int64()}),
            "when": pa.string(),
            "yes": pa.bool_(),
            "none": pa.string(),
        }
    )
    reads = [
        read_unit(unit, columns) for source in sources for unit in plan_units([read_layout(source, columns)], unit_rows=9, fingerprint="f")
    ]
    assert texts(reads) == ["x", None, "y"]
    assert [read.copied.schema for read in reads] == [columns.schema, columns.schema]
    assert reads[1].copied["doc"].to_pylist() == [{"body": "y", "n": "now a string", "new": 1}]
    assert settle_columns(sources[1:], columns, columns.schema) == columns  # the output's types, whatever the corpus begins with now


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (("txt",), "'txt'; set --text-column to one of its columns (did you mean 'text'?): text, id, odd, empty, doc, doc.body"),
        (("text", ("uid",)), "has no column 'uid'; use only its columns in --keep-columns (did you mean 'id'?)"),
        (("id",), "column 'id' is int64, not string; set --text-column to one of its string columns: text, odd, doc.body"),
        (("doc.boddy",), "has no column 'doc.boddy'; set --text-column to one of its columns (did you mean 'doc.body'?)"),
        (("text", ("odd",)), "column 'odd' has values of different types; give them one type, or leave it out of --keep-columns"),
        (("text", ("empty",)), "column 'empty' is struct<>, which Parquet shards cannot hold; leave it out"),
    ],
)
def test_columns_that_json_lines_do_not_have(columns: tuple[Any, ...], sentence: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1, "odd": 1, "empty": {}, "doc": {"body": "x"}}, {"text": "b", "id": 2, "odd": "x"}]
    put_source(str(tmp_path), "\n".join(map(json.dumps, rows)).encode(), "a.jsonl")
    with pytest.raises(CorpusError, match=re.escape(sentence)):
        read_all(str(tmp_path), replace(Columns(*columns), format=Format.JSONL), 10)


def test_a_later_file_may_lack_columns_but_not_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "a", "text": "b", "id": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n')
    assert texts(read_all(str(tmp_path), Columns("", ("id",), "{title} {text}", Format.JSONL), 10)[1]) == ["a b", " c"]
    for number in range(8):  # more than are asked for types
        (tmp_path / f"a{number}.jsonl").write_text('{"text": "c", "id": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"txt": "c", "id": 1}\n')
    with pytest.raises(CorpusError, match=r"c\.jsonl has no column 'text'; set --text-column to one of its columns \(did you mean 'txt'"):
        read_all(str(tmp_path), TYPED, 10)


def test_types_are_those_of_the_first_files_that_have_rows(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_text("\n" * number)
    (tmp_path / "9.jsonl").write_text("no JSON\n")
    (tmp_path / "a.jsonl").write_text('{"text": "c", "id": 1}\n')
    columns = settle_columns(list_sources([str(tmp_path)]), TYPED, None)
    assert columns.schema == pa.schema({"id": pa.int64(), "text": pa.string()})


def test_a_file_that_was_replaced_is_told(tmp_path: Path) -> None:
    source = put_source(str(tmp_path), as_csv(",", "\n"), "a.csv")
    columns = Columns("text", ("id",), None, Format.CSV)
    (unit,) = plan_units([read_layout(source, columns)], unit_rows=100, fingerprint="f")
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,x\n")
    with pytest.raises(SourceChangedError, match="was replaced after it was listed"):
        read_unit(unit, columns)
