"""One unit's shard against its source: bytes, footer, columns, rows and numbers, read again and trusted in nothing.

Nothing here asks the ledger or the manifest, and of the code that makes shards only what reads sources and builds the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedding.corpus.chunks import Chunks
from embedding.corpus.compare import first_difference
from embedding.corpus.faults import id_text, row_faults
from embedding.corpus.findings import CheckedUnit, Finding, Kind, Rules, Sample
from embedding.corpus.numbers import is_packed, lengths, loaded
from embedding.corpus.output import rejected_name
from embedding.corpus.plan import Unit
from embedding.corpus.reader import UnitRows, read_unit
from embedding.corpus.shard import EMBEDDING, identified, shard_table, take_rows
from embedding.corpus.shards.form import ReadShard, ShardForm
from embedding.corpus.storage import Storage
from embedding.errors import SourceChangedError, SourceError, first_line

_NORM_TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "int8": 1e-4}
"""Vectors are normalized in float32, whatever the encoder's precision: their length is 1 up to a few 1e-7. float16 keeps 11 bits. What
int8 leaves open is not part of it.
"""
_CHUNKS_OF_A_TEXT = 4
"""At most so many chunks of a sampled text are embedded again."""
_NOT_A_SHARD = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)
"""What libraries and JSON raise about bytes that are not what they should be."""


class _WrongError(Exception):
    """The first proof that the unit's shard is bad: one is enough."""

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def check_unit(unit: Unit, rules: Rules, storage: Storage, wanted: Sequence[int] = ()) -> CheckedUnit:
    """Read the unit's shard and source, and say the first thing that is wrong, or what is there.

    `wanted`: rows of the unit, counted from its first, whose text and vector are handed back unless they were rejected.

    Raises:
        StorageError, ConfigError: a store does not answer; nothing is proved either way.
    """
    try:
        rows = read_unit(unit, rules.columns)
    except SourceChangedError as error:
        return CheckedUnit(unit.id, Finding(Kind.SOURCE_CHANGED, unit.source.uri, str(error)))
    except SourceError as error:
        return CheckedUnit(unit.id, Finding(Kind.UNREADABLE_SOURCE, unit.source.uri, str(error)))
    try:
        return _check(unit, rules, rows, storage, wanted)
    except _WrongError as wrong:
        return CheckedUnit(unit.id, Finding(wrong.kind, unit.shard, str(wrong)))


def _check(unit: Unit, rules: Rules, rows: UnitRows, storage: Storage, wanted: Sequence[int]) -> CheckedUnit:
    data = storage.read(unit.shard)
    if data is None:
        raise _WrongError(Kind.MISSING_SHARD, "it was listed, but has since disappeared")
    read = _read_shard(data, rules.form)
    shard, footer = read.table, read.facts
    _check_footer(unit, rules, footer)
    record = footer["record"]
    rejected = _rejected_rows(unit, rules, rows, storage, listed=bool(record["rejected"]))
    good = np.delete(np.arange(unit.num_rows), rejected)
    chunks = _chunks(shard) if rules.long_text == "chunk" else None
    found_R = np.arange(shard.num_rows) if chunks is None else chunks.texts()
    found = int(found_R[-1]) + 1 if len(found_R) else 0
    if (found, record["rejected"]) != (len(good), len(rejected)):
        said = f"its footer counts {record['rejected']} rejected rows, and {len(rejected)} are listed"
        raise _WrongError(Kind.WRONG_ROW_COUNT, f"it has {found} rows for {unit.num_rows} rows of the source; {said}")
    good = good[found_R]
    expected = take_rows(identified(unit, rows.copied, has_id=rules.has_id), good)
    expected = expected if chunks is None else chunks.behind(expected)
    vectors = _check_columns(shard, expected, rules)
    tokens = {name: shard.column(name) for name in _token_columns(rules)}
    _check_rows(shard, expected, rules, 1 if rules.has_id else 2)
    texts = _Texts(rows.text, good, chunks)
    if chunks is not None and (fault := chunks.fault(texts.whole)):
        raise _WrongError(Kind.WRONG_CHUNKS, fault)
    for name, values_RW in vectors.items():
        _check_numbers(name, values_RW, texts, rules)
    _check_counts(record, tokens, 0 if chunks is None else shard.num_rows)
    if _same_versions(footer, read.writer, rules) and _rebuilt(expected, vectors, tokens, footer, rules) != data:
        raise _WrongError(Kind.WRONG_BYTES, "its rows and footer are right, but its statistics or layout are not")
    return CheckedUnit(
        unit.id,
        bytes=len(data),
        rows=found,
        rejected=len(rejected),
        tokens=record["tokens"],
        truncated=record["truncated"],
        chunks=0 if chunks is None else shard.num_rows,
        versions=str(footer["provenance"]["versions"]),
        samples=tuple(_samples(texts, list(vectors.values()), wanted)),
    )


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the rows of a shard were made from."""

    of_unit: pa.LargeStringArray
    unit_rows: NDArray[np.int64]
    """The row of the unit for each row of the shard, ascending."""
    chunks: Chunks | None

    def whole(self, row: int) -> str:
        """The source's text for a row of the shard."""
        return str(self.of_unit[int(self.unit_rows[row])].as_py())

    def __getitem__(self, row: int) -> str:
        text = self.whole(row)
        return text if self.chunks is None else text[self.chunks.starts_S[row] : self.chunks.ends_S[row]]


def _chunks(shard: pa.Table) -> Chunks:
    try:
        return Chunks.read(shard)
    except ValueError as error:
        raise _WrongError(Kind.WRONG_CHUNKS, str(error)) from error


def _read_shard(data: bytes, form: ShardForm) -> ReadShard:
    try:
        return form.read(data)
    except _NOT_A_SHARD as error:
        raise _WrongError(Kind.UNREADABLE_SHARD, f"it is damaged: {first_line(error)}") from error


def _check_footer(unit: Unit, rules: Rules, footer: Mapping[str, Any]) -> None:
    try:
        if (found := footer["unit"]) != unit.identity():
            name = found["shard"] if isinstance(found, dict) else found
            raise _WrongError(Kind.WRONG_UNIT, f"its footer says that it is the shard {name}, or has another source or row range")
        provenance = footer["provenance"]
        differing = {key for key, value in rules.settings.items() if provenance["settings"].get(key) != value}
        differing |= provenance["settings"].keys() - rules.settings.keys()
        if differing or provenance["fingerprint"] != rules.fingerprint:
            said = ", ".join(sorted(differing)) or "the fingerprint"
            raise _WrongError(Kind.WRONG_PROVENANCE, f"its footer and the output's settings differ in {said}")
        if footer.get("calibration", {}) != rules.vectors.calibration:
            raise _WrongError(Kind.WRONG_PROVENANCE, "its footer and the output's settings differ in the int8 ranges")
        if not all(isinstance(footer["record"][key], int) for key in ("rejected", "tokens", "truncated", "duplicates")):
            raise _WrongError(Kind.WRONG_RECORD, "the counts in its footer are not whole numbers")
        _ = provenance["versions"]["pyarrow"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _WrongError(Kind.WRONG_PROVENANCE, f"its footer does not say where it comes from ({error!r})") from error


def _rejected_rows(unit: Unit, rules: Rules, rows: UnitRows, storage: Storage, *, listed: bool) -> list[int]:
    """The rows of the unit without a vector, counted from its first: those whose text cannot be used, and those the model failed on."""
    faults = row_faults(rows)
    found = _read_rejected(unit, storage) if listed else []
    numbers = [row["row_index"] - unit.first_row for row in found]
    ids = rows.copied.column(0) if rules.has_id else None
    for number, row in zip(numbers, found, strict=True):
        where = 0 <= number < unit.num_rows and row["source"] == unit.source.uri
        if not where or str(row["id"]) != str(id_text(ids, number)):  # earlier lists have None as a word
            raise _WrongError(
                Kind.WRONG_REJECTED_ROWS, f"{rejected_name(unit.id)} lists row {row['row_index']}, which is not a row of the unit"
            )
        if row["reason"] not in ([faults[number]] if number in faults else rules.reasons):
            raise _WrongError(Kind.WRONG_REJECTED_ROWS, f"{rejected_name(unit.id)} gives the wrong reason for row {row['row_index']}")
    if numbers != sorted(set(numbers)) or not faults.keys() <= set(numbers):
        raise _WrongError(
            Kind.WRONG_REJECTED_ROWS,
            f"{rejected_name(unit.id)} does not list each of the {len(faults)} rows that cannot be embedded exactly once",
        )
    return numbers


def _read_rejected(unit: Unit, storage: Storage) -> list[dict[str, Any]]:
    data = storage.read(rejected_name(unit.id))
    if data is None:
        raise _WrongError(Kind.WRONG_REJECTED_ROWS, f"rows were rejected, but there is no {rejected_name(unit.id)}")
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        return list(table.select(["source", "row_index", "id", "reason"]).to_pylist())
    except _NOT_A_SHARD as error:
        raise _WrongError(Kind.WRONG_REJECTED_ROWS, f"{rejected_name(unit.id)} is damaged: {first_line(error)}") from error


def _token_columns(rules: Rules) -> dict[str, str]:
    """Names and types."""
    return {"num_tokens": "int32", "truncated": "bool"} if rules.token_columns else {}


def _check_columns(shard: pa.Table, expected: pa.Table, rules: Rules) -> dict[str, NDArray[Any]]:
    """The vectors as they are stored, (rows, width) by column, after the columns' names and types are found right."""
    tokens = _token_columns(rules)
    names = [*expected.column_names, *rules.vectors.names, *tokens]
    if shard.column_names != names:
        raise _WrongError(Kind.WRONG_COLUMNS, f"its columns are {', '.join(shard.column_names)}, not {', '.join(names)}")
    for name, type_name in tokens.items():
        if str(shard.column(name).type) != type_name or shard.column(name).null_count:
            raise _WrongError(Kind.WRONG_COLUMNS, f"its column {name} is not {type_name} without nulls")
    return {name: _values(name, shard.column(name), kind) for name, kind in rules.vectors.types.items()}


def _values(name: str, vectors: pa.ChunkedArray, kind: pa.DataType) -> NDArray[Any]:
    """The numbers of a vector column, (rows, width), after it is found to be of that kind."""
    if not (
        pa.types.is_fixed_size_list(vectors.type) and (vectors.type.value_type, vectors.type.list_size) == (kind.value_type, kind.list_size)
    ):
        raise _WrongError(Kind.WRONG_COLUMNS, f"its column {name} is {vectors.type}, not {kind}")
    chunks = [chunk.flatten() for chunk in vectors.chunks]
    if vectors.null_count or any(chunk.null_count for chunk in chunks):
        raise _WrongError(Kind.WRONG_COLUMNS, f"its column {name} has nulls")
    arrays = [chunk.to_numpy(zero_copy_only=True) for chunk in chunks] or [np.empty(0, kind.value_type.to_pandas_dtype())]
    return (np.concatenate(arrays) if len(arrays) > 1 else arrays[0]).reshape(-1, kind.list_size)


def _check_rows(shard: pa.Table, expected: pa.Table, rules: Rules, identity_columns: int) -> None:
    for number, name in enumerate(expected.column_names):
        is_identity = number < identity_columns
        found, source = shard.column(name), expected.column(name)
        if found.type != source.type:
            source = rules.form.returned(source)
        if found.type != source.type:
            raise _WrongError(Kind.WRONG_COLUMNS, f"its column {name!r} is {found.type}, but the source's is {source.type}")
        row = first_difference(found, source)
        if row is not None:
            kind = Kind.WRONG_IDS if is_identity else Kind.WRONG_KEPT_COLUMN
            raise _WrongError(kind, f"column {name!r} differs from the source's, starting at row {row} of the shard")


def _check_numbers(name: str, values_RW: NDArray[Any], texts: _Texts, rules: Rules) -> None:
    ranges_2D = rules.vectors.ranges.get(name)
    finite_R = np.isfinite(loaded(values_RW, ranges_2D)).all(axis=1)
    if not finite_R.all():
        raise _WrongError(Kind.NOT_FINITE, f"the vector of row {np.argmin(finite_R)} of the shard holds NaN or infinity")
    if not rules.normalized or is_packed(rules.vectors.dtype):
        return
    tolerance, (least_R, greatest_R) = _NORM_TOLERANCE[rules.vectors.dtype], lengths(values_RW, ranges_2D)
    for row in np.flatnonzero((greatest_R < 1 - tolerance) | (least_R > 1 + tolerance)).tolist():
        if least_R[row] or _has_something_visible(texts[row]):
            length = least_R[row] if least_R[row] > 1 else greatest_R[row]
            raise _WrongError(Kind.WRONG_NORM, f"the vector of row {row} of the shard has length {length:.6g} instead of 1")


def _has_something_visible(text: str) -> bool:
    """A text without any may have no tokens, if the tokenizer adds none of its own, and then its vector is all zeros."""
    return any(char.isprintable() and not char.isspace() for char in text)


def _check_counts(record: Mapping[str, int], tokens: Mapping[str, pa.ChunkedArray], chunks: int) -> None:
    if record.get("chunks", 0) != chunks:
        raise _WrongError(Kind.WRONG_RECORD, f"its footer says {record.get('chunks', 0)} chunks, but it has {chunks}")
    for name, key in (("num_tokens", "tokens"), ("truncated", "truncated")):
        if tokens and (total := int(tokens[name].to_numpy().sum())) != record[key]:
            raise _WrongError(Kind.WRONG_RECORD, f"its footer says {record[key]} {key}, but its column {name} adds up to {total}")


def _same_versions(footer: Mapping[str, Any], writer: str, rules: Rules) -> bool:
    """Whether the same libraries wrote the shard."""
    said = footer["provenance"]["versions"]
    return rules.form.is_of_library(said, writer) and said.get("embed-corpus") == rules.package_version


def _rebuilt(
    expected: pa.Table, vectors: Mapping[str, NDArray[Any]], tokens: Mapping[str, pa.ChunkedArray], footer: Mapping[str, Any], rules: Rules
) -> bytes:
    """The shard as the worker made it, but with the vectors and token counts that the shard says."""
    more = {**vectors, **{name: _one(column) for name, column in tokens.items()}}
    table = shard_table(expected, more.pop(EMBEDDING), more)
    return rules.form.encode(table, footer)


def _samples(texts: _Texts, vectors: Sequence[NDArray[Any]], wanted: Sequence[int]) -> Iterator[Sample]:
    """What the wanted rows of the unit gave; of a text of many chunks a few, which depend on all that is wanted."""
    rng = np.random.default_rng(list(wanted))
    for unit_row in wanted:
        start, end = np.searchsorted(texts.unit_rows, [unit_row, unit_row + 1]).tolist()
        for row in start + np.sort(rng.choice(end - start, min(_CHUNKS_OF_A_TEXT, end - start), replace=False)):
            stored = tuple(tuple(values_RW[row].tolist()) for values_RW in vectors)
            yield Sample(unit_row, texts[row], stored, None if texts.chunks is None else int(row - start))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
