"""Arrow's types in Lance files: which there are, and how a table is laid out so that the same rows are the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory

import pyarrow as pa

from embedding.corpus.columns import field_at, has_column
from embedding.corpus.shard import EMBEDDING
from embedding.corpus.shards.library import VERSION, call, library
from embedding.errors import CorpusError

_COMPRESSED = {"lance-encoding:compression": "zstd"}
"""Of strings and bytes. Lance's choice is FSST, whose symbols are learnt from a random sample: other bytes each time."""


class LanceFits:
    """Checks the columns of one source file after another. See `embedding.corpus.reader.Fits`; several threads may ask."""

    def __init__(self, columns: Sequence[str], returned: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> None:
        self._columns = columns
        self._returned = returned
        self._first: dict[str, tuple[pa.DataType, str]] = {}
        """By column, the first type that was seen, and in which file."""

    def __call__(self, schema: pa.Schema, uri: str) -> None:
        """Check one.

        Raises:
            CorpusError: a Lance dataset cannot have this column; the sentence says which and why.
        """
        for column in self._columns:
            if not has_column(schema, column):
                continue  # JSON Lines lack what is null
            kind = field_at(schema, column).type
            if column not in self._first:
                self._require(column, kind, uri)
            first, elsewhere = self._first.setdefault(column, (kind, uri))
            if _stored_type(first) != _stored_type(kind):
                rule = f"in {elsewhere} it is {first}, and a column of a Lance dataset has one type"
                raise CorpusError(f"{uri}: column {column!r} is {kind}; {rule}: make them alike, or leave it out")

    def _require(self, column: str, kind: pa.DataType, uri: str) -> None:
        if not _can_be_called(column):
            remedy = "which reads a dot as a path and reserves some names; rename it in the source, or leave it out"
            raise CorpusError(f"{uri}: column {column!r} has a name that Lance does not accept, {remedy}")
        if not (_is_known(kind) and self._comes_back(kind)):
            raise CorpusError(f"{uri}: column {column!r} is {kind}, which Lance shards cannot hold; cast it in the source, or leave it out")

    def _comes_back(self, kind: pa.DataType) -> bool:
        try:
            found = self._returned(pa.chunked_array([pa.nulls(1, kind)]))
        except (pa.ArrowException, ValueError, TypeError):
            return False
        return bool(found.type == _stored_type(kind) and found.to_pylist() == [None])


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """Of a Lance file with that table's rows: without metadata of others, which Lance keeps in no order; copied columns may hold nulls,
    whatever one of their source files says.
    """
    own = schema.names[schema.get_field_index(EMBEDDING) :] if EMBEDDING in schema.names else []
    return pa.schema([_stored(field, nullable=field.name not in own) for field in schema])


def batch_as_stored(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The rows with the types of `schema`: dictionaries hold what the rows do, in its order, and zeros lie under nulls."""
    columns = [
        _as_stored(column, field.type) if field.nullable else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.record_batch(columns, schema=schema)


def _stored(field: pa.Field, *, nullable: bool) -> pa.Field:
    kind = _stored_type(field.type)
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.field(field.name, kind, nullable, metadata=_COMPRESSED if _is_of_any_length(inner) else None)


def _stored_type(kind: pa.DataType) -> pa.DataType:
    """Lance has no views and no order of categories, and the numbers of a fixed-size list can be null."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _stored_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([_stored(field, nullable=field.nullable) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_stored(kind.value_field, nullable=True), kind.list_size)
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(_stored(kind.value_field, nullable=kind.value_field.nullable))
    return kind


def _can_be_called(column: str) -> bool:
    """Whether Lance makes a dataset with a column of that name, and finds it again."""
    with TemporaryDirectory(prefix="column-") as folder:
        try:
            call(lambda: library().write_dataset(pa.table({column: [1]}), folder, data_storage_version=VERSION).to_table())
        except ValueError:
            return False
    return True


def _is_known(kind: pa.DataType) -> bool:
    """Fixed-size lists of strings are found out by their first value only, by a panic."""
    if pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        return pa.types.is_primitive(inner) or (pa.types.is_fixed_size_list(inner) and _is_known(inner))
    return all(_is_known(kind.field(place).type) for place in range(kind.num_fields))


def _is_of_any_length(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary))


def _as_stored(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        values = column.dictionary.cast(kind.value_type).take(column.indices)  # Arrow decodes none of views
        return values.dictionary_encode().cast(kind)
    return column.cast(kind).take(pa.array(range(len(column))))
