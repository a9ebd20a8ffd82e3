"""Which files a corpus consists of where they are not all Parquet."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedding.corpus.formats.names import Format, format_by_name, format_of
from embedding.corpus.sources import list_sources
from embedding.corpus.storage import open_storage
from embedding.errors import CorpusError


def listed(folder: Path, names: str, *inputs: str, asked: str = "auto") -> tuple[Format, list[str]]:
    storage = open_storage(str(folder))
    for name in names.split():
        storage.put(name, b"content")
    sources = list_sources([f"{folder}/{each}" for each in inputs or [""]], asked)
    return format_of((source.uri for source in sources), asked), [source.path for source in sources]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("s3://b/a.b/X.PARQUET", Format.PARQUET),
        ("a.pq", Format.PARQUET),
        ("parquet", None),
        ("a.parquet/part", None),
        ("a.parquet.gz", None),
        ("a.Feather", Format.ARROW),
        ("a.ndjson.zst", Format.JSONL),
        ("a.json", Format.JSONL),
        ("a.csv.BZ2", Format.CSV),
        ("a.tsv", Format.TSV),
        ("a.gz", None),
        ("gz", None),
        ("a.txt", None),
    ],
)
def test_the_format_that_a_name_tells(name: str, kind: Format | None) -> None:
    assert format_by_name(name) is kind


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        ("a.parquet b.arrow c/d.feather", "auto", (Format.PARQUET, ["a.parquet"])),
        ("a.parquet b.arrow c/d.feather", "arrow", (Format.ARROW, ["b.arrow", "c/d.feather"])),
        ("b.ARROW d.arrows README.md x dataset_info.json", "auto", (Format.ARROW, ["b.ARROW", "d.arrows"])),
        ("a.parquet config.json list.csv", "auto", (Format.PARQUET, ["a.parquet"])),
        ("a.json b.json.gz _c.json", "auto", (Format.JSONL, ["a.json", "b.json.gz"])),
        ("a.jsonl b.ndjson.bz2 c.json", "auto", (Format.JSONL, ["a.jsonl", "b.ndjson.bz2", "c.json"])),
        ("a.csv.zst b.CSV c.json", "auto", (Format.CSV, ["a.csv.zst", "b.CSV"])),
        ("a.csv b.tsv", "tsv", (Format.TSV, ["b.tsv"])),
    ],
)
def test_a_folder_of_several_formats(names: str, asked: str, expected: tuple[Format, list[str]], tmp_path: Path) -> None:
    assert listed(tmp_path, names, asked=asked) == expected


def test_named_files_are_taken_whatever_they_are_called(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.txt b.csv", "*") == (Format.CSV, ["a.txt", "b.csv"])
    assert listed(tmp_path, "", "a.txt") == (Format.PARQUET, ["a.txt"])
    assert listed(tmp_path, "", "a.txt", asked="jsonl") == (Format.JSONL, ["a.txt"])


def test_several_formats_are_refused_with_both_and_the_remedy(tmp_path: Path) -> None:
    files = r"CSV and JSON Lines files \(.*/b\.csv, .*/a\.jsonl\)"
    sentence = f"{files}, but a run reads one format; set --input-format to csv or jsonl, or select files"
    with pytest.raises(CorpusError, match=sentence):
        listed(tmp_path, "a.jsonl b.csv")
    (tmp_path / "sub").mkdir()
    with pytest.raises(CorpusError, match=r"--input .*/sub matches no CSV file \(\.csv\); check the path$"):
        listed(tmp_path, "sub/x.md", "sub", asked="csv")
    with pytest.raises(
        CorpusError, match=r"--input .*/other matches no Parquet file \(.*\); check the path, or set --input-format to csv$"
    ):
        listed(tmp_path, "sub/a.parquet other/b.csv", "sub", "other")
