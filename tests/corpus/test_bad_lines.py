"""Lines and records that are no rows are faults of their own row, whatever lies beside them; all others are read as without them."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding.corpus.columns import Columns
from embedding.corpus.faults import id_text, row_faults
from embedding.corpus.formats import delimited, jsonl, lines
from embedding.corpus.formats.names import Format
from embedding.corpus.reader import UnitRows, read_unit, settle_columns
from embedding.corpus.sources import list_sources
from embedding.errors import CorpusError
from tests.corpus.reading import put_source, read_corpus, table_bytes, whole

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.string()})
NO_OBJECT = "the line is not a JSON object"
NO_NUMBER = "column 'id' is not int64, its type at the beginning of the corpus"
NO_STRING = "column 'text' is not string, its type at the beginning of the corpus"


def read_file(folder: Path, name: str, data: bytes, columns: Columns) -> list[UnitRows]:
    """All units of ten rows."""
    return [rows for _, rows in read_corpus(put_source(str(folder), data, name).uri, columns, 10)]


@pytest.mark.parametrize(
    ("line", "reason", "number"),
    [
        (b'{"text": "b", "id": 7}{"text": "c"}', NO_OBJECT, None),
        (b'{"text": "b"', NO_OBJECT, None),
        (b'"text": "b", "id": 7}', NO_OBJECT, None),
        (b'{"text": "b", "id": 7}\0', NO_OBJECT, None),
        (b"null", NO_OBJECT, None),
        (b"[", NO_OBJECT, None),
        (b'{"id": 3}{"id":', NO_OBJECT, None),
        (b'{"text": "b", "id": 7, "other": nothing}', NO_OBJECT, None),
        (b'{"text": 5, "id": 7}', NO_STRING, "7"),
        (b'{"text": "b", "id": 7, "text": "c"}', NO_STRING, "7"),
        (b'{"text": "b", "id": "7"}', NO_NUMBER, None),
        (b'{"text": "b", "id": 7.5}', NO_NUMBER, None),
        (b'{"text": {}, "id": "7"}', NO_NUMBER, None),
        (b'{"text": "b\xff", "id": 7}', "text is not valid UTF-8", "7"),
        (b'{"id": 7}', "text is null", "7"),
    ],
)
def test_a_bad_line_is_a_row_with_a_reason(line: bytes, reason: str, number: str | None, tmp_path: Path) -> None:
    data = b'{"text": "a", "id": 1}\n\n' + line + b'\n{"text": "d", "id": 9}'
    columns = Columns("text", ("id",), None, Format.JSONL, SCHEMA)
    for name, stored in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data))):
        [read] = read_file(tmp_path, name, stored, columns)
        assert row_faults(read) == {1: reason}
        assert [read.text[0].as_py(), read.text[2].as_py()] == ["a", "d"]
        assert [id_text(read.copied["id"], row) for row in range(3)] == ["1", number, "9"]


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("a.csv", b"2,b,c", "the row has 3 values, but the header has 2"),
        ("a.csv", b"2", "the row has 1 value, but the header has 2"),
        ("a.csv", b'2,"b, ""and""\nmore",c', "the row has 3 values, but the header has 2"),
        ("a.csv", b'"2,b"', "the row has 1 value, but the header has 2"),
        ("a.tsv", b"2,b", "the row has 1 value, but the header has 2"),
        ("a.csv", b"2,b\xff", "text is not valid UTF-8"),
        ("a.csv", b"2\xff,b", "column 'id' is not valid UTF-8"),
        ("a.csv", b"2\xff,", "text is null"),
    ],
)
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_bad_record_is_a_row_with_a_reason(name: str, record: bytes, reason: str, ends: bytes, tmp_path: Path) -> None:
    delimiter = b"," if name == "a.csv" else b"\t"
    rows = [delimiter.join(values) for values in ((b"id", b"text"), (b"1", b'"a\nb"'))]
    data = ends.join([*rows, record, delimiter.join((b"9", b"d"))])
    columns = Columns("text", ("id",), None, Format(name.removeprefix("a.")))
    for stored_as, stored in ((name, data), (f"{name}.gz", gzip.compress(data))):
        [read] = read_file(tmp_path, stored_as, stored, columns)
        assert row_faults(read) == {1: reason}
        assert [read.text[0].as_py(), read.text[2].as_py()] == ["a\nb", "d"]
        assert [id_text(read.copied["id"], row) for row in range(3)] == ["1", "2" if "text is not" in reason else None, "9"]


@pytest.mark.parametrize("kind", [Format.JSONL, Format.CSV])
@pytest.mark.parametrize("block_bytes", [7, 100, 2**20])
def test_units_count_bad_rows_wherever_blocks_end(kind: Format, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block_bytes)
    bad = {3, 17, 18, 19, *range(30, 60)}
    if kind is Format.JSONL:
        rows = [f'{{"id": "{number}", "text": "t{number}"' + ("" if number in bad else "}") for number in range(70)]
    else:
        rows = ["id,text", *(f"{number},t{number}" + (",more" if number in bad else "") for number in range(70))]
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    columns = Columns("text", ("id",), None, kind, schema if kind is Format.JSONL else None)
    units = read_file(tmp_path, f"a.{kind}", "\n".join(rows).encode(), columns)
    assert [len(unit.text) for unit in units] == [10] * 7
    assert {10 * number + row for number, unit in enumerate(units) for row in row_faults(unit)} == bad
    for values, prefix in (([id_ for unit in units for id_ in unit.copied["id"].to_pylist()], ""), (texts_of(units), "t")):
        assert values == [None if number in bad else f"{prefix}{number}" for number in range(70)]


def texts_of(units: list[UnitRows]) -> list[str | None]:
    return [text for unit in units for text in unit.text.to_pylist()]


def test_a_bad_value_of_any_kept_column_rejects_its_row(tmp_path: Path) -> None:
    """Nothing is null that the line does not say is null, and what the line does say stays for the list of rejected rows."""
    rows: list[dict[str, Any]] = [
        {"id": number, "text": "a", "doc": {"n": 1, "tags": ["x"]}, "score": 0.5, "not kept": 1} for number in range(6)
    ]
    rows[1]["doc"] = {"n": "one", "tags": ["x"]}
    rows[2]["score"] = "high"
    rows[3]["doc"] = {"n": 1, "tags": "x"}
    rows[4] |= {"not kept": "x", "doc": None}
    source = put_source(str(tmp_path), "\n".join(map(json.dumps, rows)).encode(), "a.jsonl")
    kinds = {"id": pa.int64(), "doc": pa.struct({"n": pa.int64(), "tags": pa.list_(pa.string())}), "score": pa.float64()}
    columns = Columns("text", tuple(kinds), None, Format.JSONL, pa.schema({**kinds, "text": pa.string()}))
    read = read_unit(whole(source, 6), columns)
    no_doc = "column 'doc' is not struct<n: int64, tags: list<item: string>>, its type at the beginning of the corpus"
    assert row_faults(read) == {1: no_doc, 2: "column 'score' is not double, its type at the beginning of the corpus", 3: no_doc}
    good = [{key: row[key] for key in kinds} for row in rows]
    expected = [good[0], good[1] | {"doc": None}, good[2] | {"score": None}, good[3] | {"doc": None}, good[4], good[5]]
    assert read.copied.to_pylist() == expected


def test_a_bad_line_at_the_beginning_refuses_no_file(tmp_path: Path) -> None:
    data = b'{"text": "cut of\n7\n{"text": "a", "id": 1}\n\xff\n{"text": 7, "id": 2}\n{"text": "b", "id": 3}\n'
    put_source(str(tmp_path), data, "a.jsonl")
    columns = settle_columns(list_sources([str(tmp_path)]), Columns("text", ("id",), None, Format.JSONL), None)
    assert columns.schema == SCHEMA
    [read] = read_file(tmp_path, "a.jsonl", data, columns)
    assert row_faults(read) == {0: NO_OBJECT, 1: NO_OBJECT, 3: NO_OBJECT, 4: NO_STRING}
    [read] = read_file(tmp_path, "a.csv", b"id,text\n1\n2,b\n", replace(columns, format=Format.CSV, schema=None))
    assert row_faults(read) == {0: "the row has 1 value, but the header has 2"}


NEARLY = [{"id": 1, "doc": {"n": 1, "m": "x"}, "text": "a"}] * 9
OTHERS: list[tuple[list[dict[str, Any]], dict[str, pa.DataType]]] = [
    ([*NEARLY, {"id": "x", "text": "b"}], {"id": pa.int64()}),
    ([{"id": 2**70, "text": "b"}, *NEARLY], {"id": pa.int64()}),
    ([*NEARLY, {"id": 0.5, "text": "b"}], {"id": pa.float64()}),  # a type in common
    ([*NEARLY, {"id": [1], "text": "b"}, *NEARLY, {"id": "x"}], {"id": pa.int64()}),
    ([{"doc": "x", "text": "b"}, *NEARLY], {"doc": pa.struct({"n": pa.int64(), "m": pa.string()})}),
    ([*NEARLY, {"doc": {"n": "x", "m": "y"}, "text": "b"}], {"doc": pa.struct({"n": pa.int64(), "m": pa.string()})}),
    ([*NEARLY, {"doc": {"n": "x", "m": "y"}, "text": 5}], {"doc.n": pa.int64()}),
]


@pytest.mark.parametrize(("rows", "kinds"), OTHERS)
def test_a_few_values_of_another_type_decide_nothing(rows: list[dict[str, Any]], kinds: dict[str, pa.DataType], tmp_path: Path) -> None:
    source = put_source(str(tmp_path), "\n".join(map(json.dumps, rows)).encode(), "a.jsonl")
    asked = Columns("text", tuple(kinds), None, Format.JSONL)
    columns = settle_columns([source], asked, None)
    read = read_unit(whole(source, len(rows)), columns)
    assert {name: read.copied.schema.field(name).type for name in kinds} == kinds
    odd = {number for number, row in enumerate(rows) if row not in NEARLY}
    assert row_faults(read).keys() == (odd if pa.float64() not in kinds.values() else set())
    many = put_source(str(tmp_path), "\n".join(map(json.dumps, [*rows, *[rows[row] for row in odd] * 9])).encode(), "many.jsonl")
    if odd == row_faults(read).keys():
        with pytest.raises(CorpusError, match="has values of different types; give them one type, or leave it out of --keep-columns"):
            settle_columns([many], asked, None)


def test_kept_values_that_are_no_utf8_reject_their_row_in_every_format(tmp_path: Path) -> None:
    """Else the shard would hold what most readers of Parquet refuse to read, and a proof takes for damage."""
    words = pa.array([b"a", b"\xe9t\xe9", b"c", None], pa.binary()).view(pa.string())
    no_date_of_python = pa.array([10**8] * 4, pa.int32()).cast(pa.date32())
    far = pa.StructArray.from_arrays([words, no_date_of_python], ["word", "date"])
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4]), words)
    table = pa.table({"id": range(4), "text": ["a", "b", "c", "d"], "word": words, "deep": nested, "far": far})
    source = put_source(str(tmp_path), table_bytes(table), "a.parquet")
    for kept in (("word",), ("id", "deep"), ("id", "far"), ("word", "deep")):
        read = read_unit(whole(source, 4), Columns("text", kept))
        assert row_faults(read) == {1: f"column {kept[-1] if 'id' in kept else 'word'!r} is not valid UTF-8"}
    assert row_faults(read_unit(whole(source, 4), Columns("text", ("id",)))) == {}


VALUES = st.sampled_from(
    ["1", "1.5", '"x"', "null", "{}", '{"n": 2}', '{"n": "x"}', "[]", "[1]", "NaN", "1e999", '"\\ud800"', '"}\\n{"', "2", ""]
)
OBJECTS = st.dictionaries(st.sampled_from(["id", "text", "doc", "more"]), VALUES).map(
    lambda found: "{" + ", ".join(f'"{name}": {value}' for name, value in found.items()) + "}"
)
CUT = st.tuples(OBJECTS, st.integers(0, 20), st.sampled_from(["", "{", "}", '"', ",", "\\", "\0", "{}"])).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] :]
)


@settings(deadline=None)
@given(st.lists(OBJECTS | CUT, min_size=1, max_size=20))
def test_a_line_is_judged_as_if_it_were_alone(drawn: list[str]) -> None:
    schema = pa.schema({"id": pa.int64(), "text": pa.string(), "doc": pa.struct({"n": pa.int64()})})
    some = [line.encode() for line in drawn]
    read = jsonl._rows(some, schema)
    alone = [jsonl._rows([line], schema) for line in some]
    assert read.table.equals(pa.concat_tables([each.table for each in alone]))
    assert read.faults == {row: each.faults[0] for row, each in enumerate(alone) if each.faults}
    for row, line in enumerate(some):
        try:
            assert jsonl._parsed([line], schema).equals(alone[row].table)
            assert row not in read.faults
        except ValueError:
            assert row in read.faults


@settings(deadline=None)
@given(st.text('ab",\r\n \0', max_size=40))
def test_a_record_is_judged_as_the_parser_would(drawn: str) -> None:
    rows, _ = delimited._split(drawn.encode(), last=True, delimiter=b",")
    for row in rows:
        names = [str(number) for number in range(delimited._width(row, b","))]
        assert delimited._parsed([row], names, names, b",").num_rows == 1
        with pytest.raises(ValueError):  # noqa: PT011  (whatever Arrow says)
            delimited._parsed([row], [*names, "more"], names, b",")
    if rows:
        read = delimited._rows(rows, ["x", "y"], ["y"], b",")
        assert read.table.num_rows == len(rows)
        assert read.faults.keys() == {row for row, data in enumerate(rows) if delimited._width(data, b",") != 2}


@pytest.mark.parametrize("bad", [0, 1, 3, 500, 4096])
def test_finding_bad_rows_costs_few_calls(bad: int) -> None:
    wrong = set(random.Random(bad).sample(range(4096), bad))
    calls = 0

    def parse(rows: Any) -> None:
        nonlocal calls
        calls += 1
        if not wrong.isdisjoint(map(int, rows)):
            raise ValueError

    assert lines.bad_rows([str(row).encode() for row in range(4096)], parse) == sorted(wrong)
    assert calls <= min(1 + 32 * bad, 1 + 4096 * 8 / 7)
