"""Which files a corpus consists of where they are not all Parquet."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedding.corpus.formats.names import Format, format_of
from embedding.corpus.sources import list_sources
from embedding.corpus.storage import open_storage


def listed(folder: Path, names: str, *inputs: str, asked: str = "auto") -> tuple[Format, list[str]]:
    storage = open_storage(str(folder))
    for name in names.split():
        storage.put(name, b"content")
    sources = list_sources([f"{folder}/{each}" for each in inputs or [""]], asked)
    return format_of((source.uri for source in sources), asked), [source.path for source in sources]


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        ("a.parquet b.arrow c/d.feather", "auto", (Format.PARQUET, ["a.parquet"])),
        ("a.parquet b.arrow c/d.feather", "arrow", (Format.ARROW, ["b.arrow", "c/d.feather"])),
        ("b.ARROW d.arrows README.md x", "auto", (Format.ARROW, ["b.ARROW", "d.arrows"])),
    ],
)
def test_a_folder_of_several_formats(names: str, asked: str, expected: tuple[Format, list[str]], tmp_path: Path) -> None:
    assert listed(tmp_path, names, asked=asked) == expected
