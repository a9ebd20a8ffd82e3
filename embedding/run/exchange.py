"""What travels between the stages: a unit as JSON, its rows as one Arrow buffer that is read in place."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from embedding.corpus.findings import CheckedUnit, Finding, Kind, Sample
from embedding.corpus.plan import Unit
from embedding.corpus.reader import UnitRows
from embedding.corpus.sources import Source

READ_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("rows", pa.large_binary()),
        ("error", pa.string()),
        ("read_started", pa.float64()),
        ("read_seconds", pa.float64()),
    ]
)
"""One row a unit: `rows` is an Arrow stream, null where reading failed with `error`."""

_FAULTS = b"faults"


def encode_unit(unit: Unit) -> str:
    """The unit as JSON."""
    return json.dumps(asdict(unit))


def decode_unit(text: str) -> Unit:
    """The inverse of `encode_unit`."""
    fields = json.loads(text)
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


def read_result(unit: str, rows: pa.Buffer | None, error: str | None, started: float) -> pa.Table:
    """The read stage's row for one unit, begun at the Unix time `started`; the buffer is taken over, not copied."""
    length = 0 if rows is None else rows.size
    validity = None if rows is not None else pa.py_buffer(b"\x00")
    offsets = pa.py_buffer(np.array([0, length], np.int64))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [validity, offsets, rows if rows is not None else pa.py_buffer(b"")])
    facts = [pa.array([error], pa.string()), pa.array([started]), pa.array([time.time() - started])]
    return pa.Table.from_arrays([pa.array([unit], pa.string()), column, *facts], schema=READ_SCHEMA)
