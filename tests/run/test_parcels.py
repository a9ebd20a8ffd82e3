"""Which units travel together, and that they come out of it as they went in."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.sources import Source
from embedding.run.exchange import ReadUnit, decode_read, decode_units, encode_read, encode_units, one_row, rows_in
from embedding.run.parcels import parcels_of


def units_of(*rows: int, size: int = 1) -> list[Unit]:
    return [make_unit(Source(f"file:///in/{number}.parquet", f"{number}.parquet", size, "1"), 0, of, "f") for number, of in enumerate(rows)]


@given(st.lists(st.integers(1, 100), max_size=300), st.integers(1, 4))
def test_every_unit_travels_once_in_order_and_no_parcel_is_larger_than_a_unit_may_be(rows: list[int], workers: int) -> None:
    units = units_of(*rows)
    parcels = parcels_of(units, rows=100, workers=workers)
    assert [unit for parcel in parcels for unit in parcel] == units
    assert all(0 < sum(unit.num_rows for unit in parcel) <= 100 for parcel in parcels)
    assert len(parcels) >= min(len(units), 32 * workers)  # so that all workers are busy to the end


@pytest.mark.parametrize(
    ("units", "workers", "sizes"),
    [
        (31, 1, [1] * 31),
        (63, 1, [1] * 63),
        (64, 1, [2] * 32),
        (64, 2, [1] * 64),
        (64 * 32 + 1, 1, [64] * 32 + [1]),
        (5000, 1, [64] * 78 + [8]),
    ],
)
def test_few_units_travel_alone_and_never_very_many_together(units: int, workers: int, sizes: list[int]) -> None:
    assert [len(parcel) for parcel in parcels_of(units_of(*[1] * units), rows=1000, workers=workers)] == sizes


@pytest.mark.parametrize(("size", "together"), [(2**17, 64), (2**20, 8), (2**22 + 1, 1), (2**30, 1)])
def test_units_of_large_files_travel_alone_however_few_their_rows_are(size: int, together: int) -> None:
    parcels = parcels_of(units_of(*[1] * 64 * 32, size=size), rows=1000, workers=1)
    assert {len(parcel) for parcel in parcels} == {together}


def test_what_was_read_of_a_parcel_comes_out_as_it_went_in() -> None:
    units = units_of(3, 4, 5, 6)
    buffers = [pa.py_buffer(b"three"), None, pa.py_buffer(b""), pa.py_buffer(b"s" * 1000)]
    read = [ReadUnit(unit, buffer, None if buffer else "not read", 1.5, 0.25) for unit, buffer in zip(units, buffers, strict=True)]
    assert decode_units(pa.Table.from_pylist([encode_units(units)])) == units
    assert [*decode_read(encode_read(read))] == read
    assert [*decode_read(encode_read(read[1:2]))] == read[1:2]


def test_the_rows_of_a_unit_that_travels_alone_are_not_copied() -> None:
    buffer = pa.py_buffer(b"r" * 1000)
    [read] = decode_read(encode_read([ReadUnit(units_of(3)[0], buffer, None, 0.0, 0.0)]))
    assert read.rows is not None
    assert read.rows.address == buffer.address


def test_a_table_in_one_row_is_the_same_table() -> None:
    table = pa.table({"name": ["one", "two", None], "number": [1, 2, 3]})
    for part in (table, table.slice(1, 1), pa.concat_tables([table, table.slice(2)])):
        assert one_row(part).num_rows == 1
        assert rows_in(one_row(part)).equals(part)
