"""Units cover every row once, keep small row groups whole, and have ids and names that say exactly what they stand for."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.corpus.plan import SourceLayout, Unit, cut_rows, make_unit, plan_units, shard_stem, stem_of
from embedding.corpus.sources import Source, list_sources
from embedding.corpus.storage import open_storage
from tests.support.corpora import parquet, plain

SOURCE = Source(path="a.parquet", uri="file:///in/a.parquet", size=7, version="v1")
GROUPS = st.lists(st.integers(0, 40), max_size=30)
CLIMBING = ["..", ".", "a=..", "a=../..", "a=%2e%2e", "x=\\..\\..", "", "~", "a=/etc", "_=.."]
HOSTILE_FILES = [
    "with space.parquet",
    "100%25 %2F.parquet",
    "日本語.parquet",
    "naïve-é.parquet",
    "quote'\"s.parquet",
    "star*[a-z]?{b}.parquet",
    "new\nline.parquet",
    "-rf.parquet",
    "double--dash.snappy.parquet",
    "#fragment?query=1.parquet",
    "x=1.parquet",
    "plus+and&.parquet",
    "l" * 200 + ".parquet",
]
HOSTILE_FOLDERS = ["with space", "lang=日本語", "city=São Paulo", "q=a*b[c]?", "p=100%25", "t=10:30+02", "deep/er/folder", "l" * 200]


@pytest.mark.parametrize(
    ("row_groups", "ranges"),
    [
        ([3, 2, 4], [(0, 5), (5, 4)]),
        ([], []),
        ([0, 0], []),
        ([5], [(0, 5)]),
        ([6], [(0, 3), (3, 3)]),
        ([16], [(0, 4), (4, 4), (8, 4), (12, 4)]),
        ([17], [(0, 4), (4, 4), (8, 4), (12, 5)]),
        ([2, 11, 2], [(0, 2), (2, 3), (5, 4), (9, 4), (13, 2)]),
        ([0, 3, 0, 2, 0, 1], [(0, 5), (5, 1)]),
        ([1, 1, 1, 1, 1, 1], [(0, 5), (5, 1)]),
    ],
)
def test_cut_rows_of_five(row_groups: list[int], ranges: list[tuple[int, int]]) -> None:
    assert list(cut_rows(row_groups, 5)) == ranges


@given(GROUPS, st.integers(1, 25))
def test_ranges_cover_every_row_once_and_keep_small_groups_whole(row_groups: list[int], unit_rows: int) -> None:
    ranges = list(cut_rows(row_groups, unit_rows))
    assert [row for first, rows in ranges for row in range(first, first + rows)] == list(range(sum(row_groups)))
    assert all(0 < rows <= unit_rows for _, rows in ranges)
    cuts = {first for first, _ in ranges}
    for start, stop in pairwise([0, *accumulate(row_groups)]):
        if stop - start <= unit_rows:
            assert not cuts & set(range(start + 1, stop))


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_a_large_group_is_cut_into_even_ranges(rows: int, unit_rows: int) -> None:
    lengths = [length for _, length in cut_rows([rows], unit_rows)]
    assert len(lengths) == -(-rows // unit_rows)
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(GROUPS, max_size=5), st.integers(1, 25), st.integers(1, 500))
def test_limit_rows_takes_the_first_rows_of_the_corpus(files: Sequence[list[int]], unit_rows: int, limit: int) -> None:
    layouts = [SourceLayout(replace(SOURCE, uri=f"file:///in/{number}"), tuple(groups)) for number, groups in enumerate(files)]
    everything = [row for unit in plan_units(layouts, unit_rows=unit_rows, fingerprint="f") for row in rows_of(unit)]
    limited = list(plan_units(layouts, unit_rows=unit_rows, fingerprint="f", limit_rows=limit))
    assert [row for unit in limited for row in rows_of(unit)] == everything[:limit]
    assert all(unit.num_rows for unit in limited)


def test_a_higher_limit_keeps_all_units_but_the_last() -> None:
    layouts = [SourceLayout(SOURCE, (4, 4, 4))]
    six, nine = (list(plan_units(layouts, unit_rows=4, fingerprint="f", limit_rows=limit)) for limit in (6, 9))
    assert [(unit.first_row, unit.num_rows) for unit in six] == [(0, 4), (4, 2)]
    assert six[:1] == nine[:1]
    assert six[1].id not in {unit.id for unit in nine}


IDENTITIES = st.tuples(
    st.tuples(st.text(max_size=3), st.integers(0, 3), st.text(max_size=3)), st.integers(0, 3), st.integers(0, 3), st.text(max_size=3)
)


@given(IDENTITIES, IDENTITIES, st.tuples(st.text(max_size=3), st.text(max_size=3)))
def test_an_id_says_source_version_range_and_fingerprint_and_nothing_else(
    one: tuple[tuple[str, int, str], int, int, str], other: tuple[tuple[str, int, str], int, int, str], paths: tuple[str, str]
) -> None:
    first, second = (
        make_unit(Source(path, *source), row, rows, fingerprint)
        for path, (source, row, rows, fingerprint) in zip(paths, (one, other), strict=True)
    )
    assert (first.id == second.id) == (one == other)


@pytest.mark.parametrize(
    "changed",
    [
        make_unit(replace(SOURCE, uri="file:///in/b.parquet"), 0, 5, "f"),
        make_unit(replace(SOURCE, size=8), 0, 5, "f"),
        make_unit(replace(SOURCE, version="v2"), 0, 5, "f"),
        make_unit(SOURCE, 1, 5, "f"),
        make_unit(SOURCE, 0, 6, "f"),
        make_unit(SOURCE, 0, 5, "g"),
    ],
)
def test_every_part_of_the_identity_changes_the_id(changed: Unit) -> None:
    assert changed.id != make_unit(SOURCE, 0, 5, "f").id
    assert make_unit(replace(SOURCE, path="elsewhere/a.parquet"), 0, 5, "f").id == make_unit(SOURCE, 0, 5, "f").id


@pytest.mark.parametrize(
    ("path", "uri", "stem"),
    [
        ("a.parquet", "s3://b/in/a.parquet", "a"),
        ("x/y/a.parquet", "s3://b/in/x/y/a.parquet", "x-y-a"),
        ("date=2025-01-01/a.parquet", "s3://b/in/date=2025-01-01/a.parquet", "date=2025-01-01/a"),
        ("x/date=1/y/lang=de/a.pq", "s3://b/x/date=1/y/lang=de/a.pq", "date=1/lang=de/x-y-a"),
        ("a.parquet", "s3://b/in/date=1/a.parquet", "date=1/a"),  # the input is one partition's folder
        ("_year=2025/a.parquet", "s3://b/_year=2025/a.parquet", "_year=2025/a"),
        ("part.snappy.PARQUET", "s3://b/part.snappy.PARQUET", "part.snappy"),
        ("v1.2/000000_0", "s3://b/v1.2/000000_0", "v1.2-000000_0"),
        ("x=1.parquet", "s3://b/x=1.parquet", "x=1"),
        ("k=München/a.parquet", "s3://b/k=München/a.parquet", "k=München/a"),
        ("k=a*b/a.parquet", "s3://b/k=a*b/a.parquet", "k=a%2Ab/a"),
        ("__a.parquet", "s3://b/__a.parquet", "a"),
        ("日本.parquet", "s3://b/日本.parquet", "source"),
        ("../../etc/passwd", "s3://b/../../etc/passwd", "-..-etc-passwd"),
        ("y" * 300 + ".parquet", "s3://b/" + "y" * 300 + ".parquet", "y" * 120),
    ],
)
def test_names_of_shards(path: str, uri: str, stem: str) -> None:
    assert shard_stem(Source(path, uri, 1, "v")) == stem


RECORDS = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    ["..", ".", "_", "a=..", "..=a", "key=", "=value", "k=/"]
)


@given(st.lists(RECORDS, min_size=1, max_size=4), st.integers(0, 10**9))
def test_any_name_stays_inside_data(segments: list[str], first_row: int) -> None:
    path = "/".join(segments)
    shard = PurePosixPath(make_unit(Source(path, f"file:///in/{path}", 1, "v"), first_row, 1, "f").shard)
    assert shard.parts[0] == "data"
    assert not {"..", "."} & set(str(shard).split("/"))
    assert not shard.name.startswith(("_", "."))
    assert not set("*?[]\n\\") & set(str(shard))
    assert shard.suffix == ".parquet"


@given(st.sets(st.integers(0, 10**10 - 1), max_size=20))
def test_sorting_names_restores_row_order(first_rows: set[int]) -> None:
    names = [make_unit(SOURCE, first, 1, "f").shard for first in sorted(first_rows)]
    assert names == sorted(names)


def test_every_store_holds_hostile_names(storage_root: str) -> None:
    folders = ["", *(f"{folder}/" for folder in HOSTILE_FOLDERS)]
    names = [*HOSTILE_FILES, *(f"{folder}a.parquet" for folder in folders)]
    data = plain(rows=1, files=1).files["part-0.parquet"]
    corpus = open_storage(f"{storage_root}/in")
    for name in names:
        corpus.put(name, data)
    sources = list_sources([f"{storage_root}/in"])
    assert sorted(source.path for source in sources) == sorted(names)

    shards = {make_unit(source, 0, 1, "f").shard: source.path.encode() for source in sources}
    assert len(shards) == len(names)
    output = open_storage(f"{storage_root}/out", temporary_folder="_control/tmp")
    for shard, content in shards.items():
        output.put(shard, content)
    assert list(output.list("data")) == sorted(shards)
    assert {shard: output.read(shard) for shard in shards} == shards
    assert all(output.exists(shard) for shard in shards)
    output.delete(list(shards))
    assert output.list("data") == {}


def test_partition_values_read_back_as_the_source_says_them(tmp_path: Path) -> None:
    values = ["plain", "München", "日本語", "a*b?[c]", "São Paulo", "#1", "10:30+02", "100%25"]
    sources = [Source(f"k={value}/a.parquet", f"s3://b/k={value}/a.parquet", 1, "v") for value in values]
    storage = open_storage(str(tmp_path))
    for source in sources:
        storage.put(make_unit(source, 0, 1, "f").shard, parquet(pa.table({"x": [1]})))
    table = ds.dataset(tmp_path / "data", partitioning=ds.partitioning(pa.schema({"k": pa.string()}), flavor="hive")).to_table()
    assert set(table["k"].to_pylist()) == {unquote(value) for value in values}


def rows_of(unit: Unit) -> list[tuple[str, int]]:
    return [(unit.source.uri, row) for row in range(unit.first_row, unit.first_row + unit.num_rows)]


@pytest.mark.parametrize("path", ["a.parquet", "b/c-0000000001-0123456789abcdef.parquet", "k=v/x-y.pq", "-/-.parquet"])
def test_a_shard_tells_the_stem_of_its_source(path: str) -> None:
    source = Source(path=path, uri=f"s3://b/{path}", size=1, version="v")
    assert stem_of(make_unit(source, 10**11, 5, "f").shard) == shard_stem(source)


@given(st.lists(st.sampled_from(CLIMBING), min_size=1, max_size=6))
def test_no_source_path_leads_out_of_the_folder_of_shards(parts: list[str]) -> None:
    path = "/".join([*parts, "f.parquet"])
    shard = make_unit(Source(path=path, uri=f"s3://b/{path}", size=1, version="v"), 0, 5, "f").shard
    assert ".." not in shard.split("/")
    assert posixpath.normpath(shard) == shard
    assert shard.startswith("data/")
