"""Units hold exactly the rows that other readers find, with exactly their types, whatever wrote the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedding.corpus.formats import parquet
from embedding.corpus.plan import make_unit
from embedding.corpus.reader import Columns, read_layout, read_layouts, read_unit, text_faults
from embedding.corpus.sources import list_sources
from embedding.errors import CorpusError
from tests.corpus.reading import every_type, put_source, read_corpus, table_bytes, units_of, whole
from tests.support.corpora import KINDS, Row, huge_row_group, libraries, nested, plain, string_kinds
from tests.support.faulty_proxy import FaultyProxy
from tests.support.s3_server import S3Server

TEXT = Columns("text")
COUNTING_POOL = pa.proxy_memory_pool(pa.default_memory_pool())
"""Knows the peak of what is allocated while it is set; must outlive all that it allocated."""


@pytest.mark.parametrize("unit_rows", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_units_of_any_size(kind: str, unit_rows: int, tmp_path: Path) -> None:
    corpus = KINDS[kind]()
    columns = Columns(corpus.text_column, ("id",))
    units = units_of(corpus.write(tmp_path), columns, unit_rows)
    assert sum(unit.num_rows for unit in units) == len(corpus.rows)
    found: list[Row] = []
    for unit in units[:100]:  # so many small ones say it all
        read = read_unit(unit, columns)
        assert len(read.text) == read.copied.num_rows == unit.num_rows <= unit_rows
        assert read.text.type == pa.large_string()
        found += [{"id": key, "text": text} for key, text in zip(read.copied["id"].to_pylist(), read.text.to_pylist(), strict=True)]
    assert found == corpus.rows[: sum(unit.num_rows for unit in units[:100])]


def test_the_same_rows_come_from_every_store(storage_root: str) -> None:
    corpus = libraries()
    found = [text for _, read in read_corpus(corpus.write(storage_root), TEXT, 5) for text in read.text.to_pylist()]
    assert found == [row["text"] for row in corpus.rows]


def test_a_footer_on_a_store_costs_one_request_if_it_is_small(s3: S3Server, proxy: FaultyProxy) -> None:
    folder = s3.folder()
    plain(rows=40, files=4).write(folder)
    many_groups = table_bytes(pa.table({"id": range(2000), "text": ["a"] * 2000}), row_group_size=1)
    assert int.from_bytes(many_groups[-8:-4], "little") > 2**16
    put_source(folder, many_groups, "part-9.parquet")
    sources = list_sources([folder])
    proxy.requests.clear()
    layouts = list(read_layouts(sources, Columns("text", ("id",))))
    assert [layout.num_rows for layout in layouts] == [10, 10, 10, 10, 2000]
    asked = Counter(request.rpartition("/")[2] for request in proxy.requests)
    assert [asked[f"part-{number}.parquet"] for number in range(4)] == [1, 1, 1, 1]
    assert asked["part-9.parquet"] > 1


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 3000), (1499, 2), (2999, 1), (1000, 1234)])
def test_a_range_inside_a_huge_row_group(first: int, rows: int, tmp_path: Path) -> None:
    corpus = huge_row_group()
    source = put_source(str(tmp_path), corpus.files["huge.parquet"])
    read = read_unit(make_unit(source, first, rows, "f"), Columns("text", ("id",)))
    assert read.copied["id"].to_pylist() == list(range(first, first + rows))
    assert read.text.to_pylist() == [row["text"] for row in corpus.rows[first : first + rows]]


def test_a_unit_of_a_huge_row_group_costs_memory_for_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_PREFETCH_BYTES", 2**20)  # larger files are streamed; 64 MB stand for the real 256 and more
    text = pa.array([f"{number:08d}" * 2000 for number in range(4000)])
    source = put_source(str(tmp_path), table_bytes(pa.table({"text": text}), compression="none", use_dictionary=False))
    assert source.size > 64_000_000
    usual = pa.default_memory_pool()
    pa.set_memory_pool(COUNTING_POOL)
    try:
        read = read_unit(make_unit(source, 2000, 40, "f"), TEXT)
    finally:
        pa.set_memory_pool(usual)
    assert read.text.to_pylist() == text[2000:2040].to_pylist()
    assert 640_000 < COUNTING_POOL.max_memory() < 32_000_000


def test_copied_columns_keep_their_types(tmp_path: Path) -> None:
    table = every_type()
    source = put_source(str(tmp_path), table_bytes(table, row_group_size=2))
    for first, rows in ((0, 4), (1, 2), (3, 1)):
        copied = read_unit(make_unit(source, first, rows, "f"), Columns("text", tuple(table.column_names))).copied
        assert {field.name: field.type for field in copied.schema} == {field.name: field.type for field in table.schema}
        assert copied.to_pylist() == table.slice(first, rows).to_pylist()


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ("a.b", ["own", "name"]),  # a column with that name comes before the field b of the column a
        ("a.c", ["in", None]),
        ("a.d.e", ["deep", None]),
        ("x.y.z", ["dots", "only"]),
        ("nothing", [None, None]),
    ],
)
def test_dotted_columns(column: str, texts: list[str | None], tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": [{"b": "field", "c": "in", "d": {"e": "deep"}}, None],
            "a.b": ["own", "name"],
            "x.y.z": ["dots", "only"],
            "nothing": pa.nulls(2),
        }
    )
    source = put_source(str(tmp_path), table_bytes(table))
    assert read_layout(source, Columns(column)).row_groups == (2,)
    read = read_unit(whole(source, 2), Columns(column, (column, "a")))
    assert read.text.to_pylist() == texts
    assert read.copied.column_names == [column, "a"]
    assert read.copied.column(0).to_pylist() == texts
    assert read.copied.column(1).to_pylist() == table["a"].to_pylist()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            Columns("txet"),
            "has no column 'txet'; set --text-column to one of its columns (did you mean 'text'?): "
            "text, number, raw, doc, doc.body, doc.body.text",
        ),
        (Columns("text", ("txet",), id="txet"), "has no column 'txet'; set --id-column to one of its columns (did you mean 'text'?): "),
        (Columns("", (), "{txet}"), "has no column 'txet'; use only its columns in --text-template (did you mean 'text'?): "),
        (
            Columns("doc.boddy.text"),
            "has no column 'doc.boddy.text'; set --text-column to one of its columns (did you mean 'doc.body.text'?): ",
        ),
        (Columns("doc.text"), "has no column 'doc.text'; "),
        (
            Columns("text", ("number,raw",)),
            "has no column 'number,raw'; use only its columns in --keep-columns, separated by spaces, not commas: text, number, raw, ",
        ),
        (Columns("text.body"), "has no column 'text.body'; set --text-column to one of its columns (did you mean 'text'?): "),
        (Columns("text", ("identity",)), "has no column 'identity'; use only its columns in --keep-columns: text, number, raw, "),
        (Columns("number"), ": column 'number' is int64, not string; set --text-column to one of its string columns: text, doc.body.text"),
        (Columns("raw"), ": column 'raw' is binary, not string; set --text-column to one of its string columns: text, doc.body.text"),
        (
            Columns("doc"),
            ": column 'doc' is struct<body: struct<text: string>>, not string; set --text-column to one of its string columns: ",
        ),
    ],
)
def test_wrong_columns_are_told_in_one_sentence(columns: Columns, sentence: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "number": [1], "raw": [b"a"], "doc": [{"body": {"text": "a"}}]})
    source = put_source(str(tmp_path), table_bytes(table))
    with pytest.raises(CorpusError) as refused:
        read_layout(source, columns)
    assert str(refused.value).startswith(f"{source.uri}{'' if sentence.startswith(':') else ' '}{sentence}")
    assert "\n" not in str(refused.value)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "id"])
    source = put_source(str(tmp_path), table_bytes(twice))
    with pytest.raises(CorpusError, match=r"has several columns named 'text'; rename all but one of them$"):
        read_layout(source, TEXT)


def test_a_file_without_any_text_says_so(tmp_path: Path) -> None:
    source = put_source(str(tmp_path), table_bytes(pa.table({"text": [1]})))
    with pytest.raises(CorpusError, match=r"not string; the file has no string column for --text-column$"):
        read_layout(source, TEXT)


def test_one_bad_file_among_many_is_named(tmp_path: Path) -> None:
    url = plain(rows=40, files=40).write(tmp_path)
    bad = put_source(url, table_bytes(pa.table({"words": ["a"]})), "part-17.parquet")
    with pytest.raises(CorpusError, match=f"^{bad.uri} has no column 'text'"):
        units_of(url, TEXT, 10)


def test_nulls_and_what_is_no_utf8_are_found(tmp_path: Path) -> None:
    good, bad = [b"plain", b"", "ü".encode()], [b"\xff", b"\xc3", b"\xed\xa0\x80", b"a\x80b"]
    raw = pa.array([*good, None, *bad, b"end"], pa.binary())
    for kind in (pa.string(), pa.large_string()):
        text = raw.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()).view(kind)
        source = put_source(str(tmp_path), table_bytes(pa.table({"text": text}), use_dictionary=False))
        faults = text_faults(read_unit(whole(source, 9), TEXT).text)
        assert faults == {3: "text is null", **dict.fromkeys((4, 5, 6, 7), "text is not valid UTF-8")}


@pytest.mark.parametrize("corpus", [string_kinds(), nested()], ids=["string_kinds", "nested"])
def test_text_without_faults_but_null(corpus: Any, tmp_path: Path) -> None:
    for _, read in read_corpus(corpus.write(tmp_path), Columns(corpus.text_column), 100):
        assert text_faults(read.text) == {row: "text is null" for row, text in enumerate(read.text.to_pylist()) if text is None}


def test_faults_of_a_slice_count_from_its_start() -> None:
    text = pa.array([None, "a", None], pa.large_string()).slice(1)
    assert text_faults(text) == {1: "text is null"}
