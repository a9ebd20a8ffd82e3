"""A text made of several columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedding.corpus.columns import Columns, parse_template, text_of
from embedding.corpus.reader import read_layout, read_unit, text_faults
from embedding.errors import ConfigError, CorpusError
from tests.corpus.reading import put_source, read_corpus, table_bytes, whole

ROWS: list[dict[str, Any]] = [
    {"title": "One", "doc": {"body": "first"}, "year": 1},
    {"title": None, "doc": {"body": "second"}, "year": 2},
    {"title": "Three", "doc": {"body": None}, "year": 3},
    {"title": "Four", "doc": None, "year": 4},
    {"title": None, "doc": None, "year": 5},
    {"title": "", "doc": {"body": None}, "year": 6},
    {"title": "{Seven}", "doc": {"body": r"a\nb"}, "year": 7},
]


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (r"{title}\n\n{doc.body}", ["One\n\nfirst", "\n\nsecond", "Three\n\n", "Four\n\n", None, "\n\n", "{Seven}\n\na\\nb"]),
        ("{doc.body}", ["first", "second", None, None, None, None, r"a\nb"]),
        ("{title}{title}", ["OneOne", None, "ThreeThree", "FourFour", None, "", "{Seven}{Seven}"]),
        (r"{{{title}}}\t\\n", ["{One}\t\\n", None, "{Three}\t\\n", "{Four}\t\\n", None, "{}\t\\n", "{{Seven}}\t\\n"]),
    ],
)
def test_the_text_of_each_row(template: str, texts: list[str | None], tmp_path: Path) -> None:
    source = put_source(str(tmp_path), table_bytes(pa.Table.from_pylist(ROWS), row_group_size=2))
    columns = Columns("", ("year",), template)
    assert read_layout(source, columns).num_rows == len(ROWS)
    read = read_unit(whole(source, len(ROWS)), columns)
    assert read.text.to_pylist() == texts
    assert read.copied.to_pylist() == [{"year": row["year"]} for row in ROWS]
    assert text_faults(read.text) == {row: "text is null" for row, text in enumerate(texts) if text is None}
    for unit, part in read_corpus(str(tmp_path), columns, 3):  # the same in several units
        assert part.text.to_pylist() == texts[unit.first_row : unit.first_row + unit.num_rows]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_text_of_all_types_and_none(kind: pa.DataType) -> None:
    table = pa.table({"a": pa.chunked_array([["x"], [None]]).cast(kind), "b": pa.nulls(2)})
    assert text_of(table, Columns("", (), "{a}-{b}")).to_pylist() == ["x-", None]
    assert text_of(table.slice(0, 0), Columns("", (), "{a}-{b}")).to_pylist() == []


def test_text_that_is_no_utf8_is_a_fault_of_its_row() -> None:
    broken = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    text = text_of(pa.table({"a": broken, "b": ["x", "y"]}), Columns("", (), "{b} {a}"))
    assert text_faults(text) == {1: "text is not valid UTF-8"}


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{title", "is invalid: expected '}' before end of string; write {{ and }} for literal braces"),
        ("title}", "is invalid: Single '}' encountered in format string; write {{ and }}"),
        ("{}", "is invalid: {} names no column; write the name of a column"),
        ("{year:>4}", "is invalid: {year} has a format or conversion; write only {year}"),
        ("{title!r}", "is invalid: {title} has a format or conversion"),
        ("title {{title}}", "names no column, so all texts would be the same"),
    ],
)
def test_wrong_templates_are_refused(template: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_template(template)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{titel} {doc.body}", "'titel'; use only its columns in --text-template (did you mean 'title'?): title, doc, doc.body, year"),
        ("{title} {doc.boddy}", "has no column 'doc.boddy'; use only its columns in --text-template (did you mean 'doc.body'?)"),
        ("{title} {year}", "column 'year' is int64, not string; use only its string columns in --text-template: title, doc.body"),
    ],
)
def test_columns_that_are_not_there_or_no_text_are_told(template: str, sentence: str, tmp_path: Path) -> None:
    source = put_source(str(tmp_path), table_bytes(pa.Table.from_pylist(ROWS)))
    with pytest.raises(CorpusError, match=re.escape(sentence)):
        read_layout(source, Columns("", (), template))


@pytest.mark.parametrize(
    ("column", "end"), [("lang", "; 'lang' is a folder of the path, and data/ keeps those folders (Parquet output)"), ("la", "")]
)
def test_a_hive_folder_is_no_column(column: str, end: str, tmp_path: Path) -> None:
    source = put_source(f"{tmp_path}/lang=de/year=2025", table_bytes(pa.table({"text": ["a"]})))
    with pytest.raises(CorpusError) as refusal:
        read_layout(source, Columns("text", (column,)))
    assert str(refusal.value) == f"{source.uri} has no column {column!r}; use only its columns in --keep-columns: text{end}"
