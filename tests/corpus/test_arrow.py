"""Arrow files and streams, of every type and by the libraries that people write them with."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Literal

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from embedding.corpus.columns import Columns
from embedding.corpus.formats.names import Format
from embedding.corpus.plan import make_unit, plan_units
from embedding.corpus.reader import read_layout, read_unit, text_faults
from embedding.corpus.sources import list_sources
from embedding.errors import CorpusError, SourceError
from tests.corpus.reading import every_type, put_source, read_corpus

TEXT = Columns("text", format=Format.ARROW)


def ipc(table: pa.Table, *, stream: bool = False, rows: int = 3, codec: Literal["zstd", "lz4"] | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=codec, unify_dictionaries=not stream)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_copied_columns_keep_their_types(stream: bool, codec: Literal["zstd", "lz4"] | None, tmp_path: Path) -> None:
    table = every_type()
    source = put_source(str(tmp_path), ipc(table, stream=stream, codec=codec), "a.arrow")
    columns = Columns("text", tuple(table.column_names), format=Format.ARROW)
    layout = read_layout(source, columns)
    assert (layout.row_groups, layout.marks) == ((3, 1), ((0, 0),) if stream else ((0, 0), (3, 1)))
    for first, rows in ((0, 4), (1, 2), (3, 1)):
        read = read_unit(make_unit(source, first, rows, "f", layout.mark_before(first)), columns)
        assert read.text.to_pylist() == ["a", "b", "c", "d"][first : first + rows]
        assert read.copied.schema.types == table.schema.types
        assert read.copied.to_pylist() == table.slice(first, rows).to_pylist()


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_on_every_store(stream: bool, storage_root: str) -> None:
    texts = [f"no {number}" for number in range(50)]
    put_source(storage_root, ipc(pa.table({"id": range(50), "doc": [{"text": text} for text in texts]}), stream=stream, rows=7), "a.arrow")
    read = [part for _, part in read_corpus(storage_root, Columns("doc.text", ("id",), format=Format.ARROW), 10)]
    assert [text for part in read for text in part.text.to_pylist()] == texts
    assert [number for part in read for number in part.copied["id"].to_pylist()] == list(range(50))


def test_the_files_of_other_libraries(tmp_path: Path) -> None:
    data = {"id": [1, 2, 3], "text": ["a", None, "c"]}
    pl.DataFrame(data).write_ipc(tmp_path / "a.arrow")
    pl.DataFrame(data).write_ipc_stream(tmp_path / "b.arrows")
    pl.DataFrame(data).cast({"text": pl.Categorical}).write_ipc(tmp_path / "c.ipc", compression="zstd")
    pd.DataFrame(data).to_feather(tmp_path / "d.feather")
    columns = Columns("text", ("id",), format=Format.ARROW)
    units = [
        unit
        for source in list_sources([str(tmp_path)])
        for unit in plan_units([read_layout(source, columns)], unit_rows=9, fingerprint="f")
    ]
    assert [read_unit(unit, columns).text.to_pylist() for unit in units] == [["a", None, "c"]] * 4
    assert [read_unit(unit, columns).copied["id"].to_pylist() for unit in units] == [[1, 2, 3]] * 4


def test_files_without_rows(tmp_path: Path) -> None:
    empty = pa.schema({"text": pa.string()}).empty_table()
    for stream in (False, True):
        assert read_layout(put_source(str(tmp_path), ipc(empty, stream=stream), "a.arrow"), TEXT).num_rows == 0


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(data: bytes, columns: Columns, sentence: str, kind: type[Exception] = CorpusError) -> None:
        source = put_source(str(tmp_path), data, "a.arrow")
        with pytest.raises(kind, match=re.escape(sentence)):
            read_layout(source, columns)

    span = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    table = pa.table({"text": ["a"], "span": span})
    refused(
        ipc(table), Columns("text", ("span",), format=Format.ARROW), "column 'span' is month_day_nano_interval, which Parquet shards cannot"
    )
    refused(
        ipc(table),
        Columns("txt", format=Format.ARROW),
        "has no column 'txt'; set --text-column to one of its columns (did you mean 'text'?)",
    )
    refused(
        ipc(pa.table({"text": pa.nulls(2**28)}), rows=2**28),
        TEXT,
        "a.arrow is not a readable Arrow file: it claims to have 268435456 rows in",
        SourceError,
    )
    refused(b"FEA1 of old", TEXT, "a.arrow is not a readable Arrow file: ", SourceError)
    refused(b"", TEXT, "a.arrow is not a readable Arrow file: ", SourceError)


def test_text_that_is_no_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string()):
        text = pa.array([b"a", b"\xff", b"c"], pa.binary() if kind == pa.string() else pa.large_binary()).view(kind)
        source = put_source(str(tmp_path), ipc(pa.table({"text": text})), "a.arrow")
        assert text_faults(read_unit(make_unit(source, 0, 3, "f"), TEXT).text) == {1: "text is not valid UTF-8"}
