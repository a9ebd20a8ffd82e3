"""What travels between the stages, a parcel of units at a time: a unit as JSON, its rows as one Arrow buffer that is read in place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from embedding.corpus.findings import CheckedUnit, Finding, Kind, Sample
from embedding.corpus.plan import Unit
from embedding.corpus.reader import UnitRows
from embedding.corpus.sources import Source

_READ_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("rows", pa.large_binary()),
        ("error", pa.string()),
        ("started", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
"""One row a unit: `rows` is an Arrow stream, null where reading failed with `error`."""

_FAULTS = b"faults"


@dataclass(frozen=True)
class ReadUnit:
    """A unit as it was read."""

    unit: Unit
    rows: pa.Buffer | None
    """What `encode_rows` made of them; None where reading failed."""
    error: str | None
    started: float
    """Unix time."""
    seconds: float


def encode_units(units: Sequence[Unit]) -> dict[str, str]:
    """The dataset's row for a parcel: its units as JSON."""
    return {"units": json.dumps([asdict(unit) for unit in units])}


def decode_units(batch: pa.Table) -> list[Unit]:
    """The inverse of `encode_units`, of a table with that one row."""
    return [_unit(fields) for fields in json.loads(batch.column("units")[0].as_py())]


def _unit(fields: dict[str, Any]) -> Unit:
    return Unit(**{**fields, "source": Source(**fields["source"]), "near": tuple(fields["near"])})


def encode_checked(checked: CheckedUnit) -> str:
    """What was found about a unit as JSON."""
    return json.dumps(asdict(checked))


def decode_checked(text: str) -> CheckedUnit:
    """The inverse of `encode_checked`."""
    fields = json.loads(text)
    finding = fields["finding"] and Finding(Kind(fields["finding"].pop("kind")), **fields["finding"])
    samples = tuple(Sample(**{**row, "vectors": tuple(map(tuple, row["vectors"]))}) for row in fields["samples"])
    return CheckedUnit(**{**fields, "finding": finding, "samples": samples})


def encode_rows(rows: UnitRows) -> pa.Buffer:
    """The rows as an Arrow stream; the text is the last column, since a copied column may have its name, and faults are metadata."""
    table = rows.copied.append_column("text", rows.text) if rows.copied.num_columns else pa.table({"text": rows.text})
    if rows.faults:
        table = table.replace_schema_metadata({_FAULTS: json.dumps(list(rows.faults.items()))})
    counted = pa.MockOutputStream()  # counts only: a stream that grows as it is written takes up to three times its size
    _write(table, counted)
    buffer = pa.allocate_buffer(counted.size())
    _write(table, pa.FixedSizeBufferWriter(buffer))
    return buffer


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def decode_rows(buffer: pa.Buffer) -> UnitRows:
    """The inverse of `encode_rows`, without copying the buffer."""
    table = pa.ipc.open_stream(buffer).read_all()
    faults = json.loads((table.schema.metadata or {}).get(_FAULTS, b"[]"))
    text = table.column(table.num_columns - 1)
    copied = table.select(range(table.num_columns - 1)).replace_schema_metadata(None)
    return UnitRows(text.combine_chunks() if text.num_chunks != 1 else text.chunk(0), copied, dict(faults))


def encode_read(units: Sequence[ReadUnit]) -> pa.Table:
    """What the read stage hands on of a parcel; the buffer of a unit that travels alone is taken over, not copied."""
    return one_row(pa.concat_tables(map(_read_row, units)))


def _read_row(read: ReadUnit) -> pa.Table:
    length = 0 if read.rows is None else read.rows.size
    validity = None if read.rows is not None else pa.py_buffer(b"\x00")
    offsets = pa.py_buffer(np.array([0, length], np.int64))
    rows = pa.Array.from_buffers(pa.large_binary(), 1, [validity, offsets, read.rows if read.rows is not None else pa.py_buffer(b"")])
    unit = pa.array([json.dumps(asdict(read.unit))], pa.string())
    facts = [pa.array([read.error], pa.string()), pa.array([read.started]), pa.array([read.seconds])]
    return pa.Table.from_arrays([unit, rows, *facts], schema=_READ_SCHEMA)


def decode_read(batch: pa.Table) -> Iterator[ReadUnit]:
    """The inverse of `encode_read`, without copying the buffers, which Arrow's scalars would."""
    texts, rows, *facts = (column.chunk(0) for column in rows_in(batch).columns)
    offsets = np.frombuffer(rows.buffers()[1], np.int64)[rows.offset : rows.offset + len(rows) + 1].tolist()
    known = zip(texts.to_pylist(), rows.is_valid().to_pylist(), pairwise(offsets), *(fact.to_pylist() for fact in facts), strict=True)
    for text, is_read, (start, end), *others in known:
        yield ReadUnit(_unit(json.loads(text)), rows.buffers()[2][start:end] if is_read else None, *others)


def one_row(table: pa.Table) -> pa.Table:
    """All rows of a table as one: Ray's driver takes what a process gives back row by row, each up to a tenth of a second later."""
    rows = table.to_struct_array()
    together = rows.chunk(0) if rows.num_chunks == 1 else rows.combine_chunks()
    return pa.table({"rows": pa.ListArray.from_arrays([0, len(together)], together)})


def rows_in(row: pa.Table) -> pa.Table:
    """The inverse of `one_row`."""
    return pa.Table.from_struct_array(row.column("rows")[0].values)
