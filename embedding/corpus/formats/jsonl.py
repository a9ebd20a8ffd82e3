"""JSON Lines: one object a line. Columns have the types that the first rows of the corpus show, which the output then keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.json

from embedding.corpus.columns import Columns, require_columns, require_storable
from embedding.corpus.formats.found import Found, RowError
from embedding.corpus.formats.lines import first_bad, read_head, rows_of, scan
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source
from embedding.errors import CorpusError

_BLANK = b" \t\r\n"
_REASON_CHARS = 200
"""Arrow quotes the value that it cannot read."""
_NO_JSON = (ValueError, RecursionError)
_NO_TYPE = (pa.ArrowException, ValueError, TypeError, OverflowError)
"""Of pyarrow about values that have no type in common."""


def find(stream: pa.NativeFile | BinaryIO, source: Source, _columns: Columns) -> Found:
    """Rows, and the schema that the first of them show.

    Raises:
        ValueError: none of the first lines is a JSON object.
    """
    scanned = scan(stream, source, _split, 0)
    if not scanned.rows:
        return Found(None, ())
    return Found(_schema_of(_objects(scanned.head)), (scanned.rows,), scanned.marks)


def read(stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> pa.Table:
    """The unit's rows; a key that a line lacks is null.

    Raises:
        RowError: a line is no JSON object, or a value is not of its column's type.
    """
    assert columns.schema is not None
    pieces = [_table(lines, columns.schema, row) for row, lines in rows_of(stream, unit, _split)]
    return pa.concat_tables([columns.schema.empty_table(), *pieces])


def first_objects(stream: pa.NativeFile | BinaryIO, source: Source) -> list[dict[str, Any]]:
    """The first objects of a file.

    Raises:
        ValueError: it has rows, and none of the first ones is a JSON object.
    """
    lines = read_head(stream, source, _split)
    return _objects(lines) if lines else []


def with_types(columns: Columns, rows: Sequence[Mapping[str, Any]], uri: str) -> Columns:
    """The columns with the types that these rows show, texts as strings.

    Raises:
        CorpusError: a column is in none of the rows, or its values have no type in common.
    """
    columns = replace(columns, schema=None)
    schema = _schema_of(rows)
    require_columns(schema, columns, uri)
    types: dict[str, Any] = {}
    for column in columns.all:
        path = [column] if column in schema.names else column.split(".")
        kind = pa.string() if column in columns.texts else _type_of(_values(rows, path))
        if kind is None:
            raise CorpusError(f"{uri}: column {column!r} has values that are of no one type; mend them, or leave it out")
        _put(types, path, type_to_json(kind))
    schema = schema_from_json(types)
    require_storable(schema, columns, uri)
    return replace(columns, schema=schema)


def schema_to_json(schema: pa.Schema) -> dict[str, Any]:
    """Types by column: a name such as "int64", the same again for a struct, a list of one for a list."""
    return {field.name: type_to_json(field.type) for field in schema}


def schema_from_json(types: Mapping[str, Any]) -> pa.Schema:
    """The inverse of `schema_to_json`."""
    return pa.schema([(name, _type_from_json(kind)) for name, kind in types.items()])


def type_to_json(kind: pa.DataType) -> Any:
    """A type as `schema_to_json` says it; what only ever was null becomes a string."""
    if pa.types.is_struct(kind):
        return {field.name: type_to_json(field.type) for field in kind}
    if pa.types.is_list(kind):
        return [type_to_json(kind.value_type)]
    return "string" if pa.types.is_null(kind) else str(kind)


def _type_from_json(kind: Any) -> pa.DataType:
    if isinstance(kind, dict):
        return pa.struct([(name, _type_from_json(each)) for name, each in kind.items()])
    return pa.list_(_type_from_json(kind[0])) if isinstance(kind, list) else pa.type_for_alias(kind)


def _put(types: dict[str, Any], path: Sequence[str], kind: Any) -> None:
    """Add a type; of a column and a field of it, the whole column is read."""
    *above, name = path
    for each in above:
        types = types.setdefault(each, {})
    if not isinstance(types.get(name), dict):
        types[name] = kind
    elif isinstance(kind, dict):
        types[name] = kind | types[name]


def _split(data: bytes, *, last: bool) -> tuple[list[bytes], int]:
    end = len(data) if last else data.rfind(b"\n") + 1
    return [line for line in data[:end].split(b"\n") if line.strip(_BLANK)], end


def _objects(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Those lines that are objects; the others fail their units, if there is one at all."""
    found: list[dict[str, Any]] = []
    first = ""
    for line in lines:
        try:
            value = json.loads(line)
        except _NO_JSON as error:
            first = first or str(error)
        else:
            if isinstance(value, dict):
                found.append(value)
            first = first or f"it is of the type {type(value).__name__}"
    if not found:
        raise ValueError(f"no line at its beginning is a JSON object ({first}); write one object a line")
    return found


def _schema_of(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of all keys; string where the values are of no one type, so that their units fail, where they are read at all."""
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {name: _type_of([row.get(name) for row in rows]) for name in names}
    return pa.schema([(name, pa.string() if kind is None else kind) for name, kind in kinds.items()])


def _type_of(values: Sequence[Any]) -> pa.DataType | None:
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, dict) for value in there):
        return pa.struct(list(_schema_of(there)))
    try:
        return pa.array(there).type
    except _NO_TYPE:
        return None


def _values(rows: Sequence[Mapping[str, Any]], path: Sequence[str]) -> list[Any]:
    values: list[Any] = list(rows)
    for name in path:
        values = [value.get(name) if isinstance(value, dict) else None for value in values]
    return values


def _table(lines: Sequence[bytes], schema: pa.Schema, first: int) -> pa.Table:
    try:
        return _parsed(lines, schema)
    except ValueError:
        bad = first_bad(lines, partial(_parsed, schema=schema))
        raise RowError(f"row {first + bad}: {_fault(lines[bad], schema)}") from None


def _parsed(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """The rows of the lines.

    Arrow parses objects and cares for no lines, but where each line begins and ends like an object, and there are as many as
    lines, each line is one: after the brace that ends a line, an object that goes on cannot have the one that begins the next.

    Raises:
        ValueError: some line is not one object with the types of the schema.
    """
    data = b"\n".join(lines)
    trimmed = (line.strip(_BLANK) for line in lines)
    if b"\0" in data or not all(line.startswith(b"{") and line.endswith(b"}") for line in trimmed):
        raise ValueError("it is no JSON object")
    table = pyarrow.json.read_json(
        pa.BufferReader(data),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if table.num_rows != len(lines):
        raise ValueError("it is more than one JSON object")
    return table


def _fault(line: bytes, schema: pa.Schema) -> str:
    """What is wrong with a line: its JSON, else a column."""
    try:
        _parsed([line], pa.schema([]))
    except ValueError as error:
        return f"no JSON object ({_first_line(error)})"
    for field in schema:
        try:
            _parsed([line], pa.schema([field]))
        except ValueError as error:
            return f"column {field.name!r} is not {field.type} as at the beginning of the corpus ({_first_line(error)})"
    return "it cannot be read"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].removeprefix("JSON parse error: ").removesuffix(" in row 0").removesuffix(".")[:_REASON_CHARS]
