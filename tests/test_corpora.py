"""The test corpora hold what they say, as pyarrow reads them."""

from __future__ import annotations

import io

import fsspec
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.corpora import CODECS, KINDS, Row, codecs, huge_row_group, plain, sentences, string_kinds, tiny_row_groups


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_files(kind: str) -> None:
    corpus = KINDS[kind]()
    found: list[Row] = []
    for path in sorted(corpus.files):
        table = pq.read_table(io.BytesIO(corpus.files[path]))
        column, *fields = corpus.text_column.split(".")
        texts = table[column]
        for name in fields:
            texts = pc.struct_field(texts, name)
        found += [{"id": key, "text": text} for key, text in zip(table["id"].to_pylist(), texts.to_pylist(), strict=True)]
    assert found == corpus.rows


def test_files_are_as_odd_as_they_say() -> None:
    groups = {
        name: pq.ParquetFile(io.BytesIO(data)).num_row_groups for name, data in (tiny_row_groups().files | huge_row_group().files).items()
    }
    assert groups == {"tiny.parquet": 3000, "huge.parquet": 1}
    types = {name: str(pq.read_schema(io.BytesIO(data)).field("text").type) for name, data in string_kinds().files.items()}
    assert types["string_view.parquet"] == "string_view"
    assert types["dictionary.parquet"].startswith("dictionary<values=string")
    used = {pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).compression for data in codecs().files.values()}
    assert len(used) == len(CODECS)


def test_write_on_every_store(storage_root: str) -> None:
    corpus = plain()
    files = fsspec.url_to_fs(corpus.write(f"{storage_root}/in"))[0]
    assert {path.rsplit("/", 1)[-1]: files.cat_file(path) for path in files.find(f"{storage_root}/in")} == corpus.files


def test_sentences_repeat() -> None:
    assert sentences(20, seed=3) == sentences(20, seed=3) != sentences(20, seed=4)
