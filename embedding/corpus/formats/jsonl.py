"""JSON Lines: one object a line. Columns have the types that the first rows of the corpus show, which the output then keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json

from embedding.corpus.columns import Columns, require_columns, require_storable
from embedding.corpus.formats.found import Found, Rows, joined
from embedding.corpus.formats.lines import bad_rows, parse_but, read_head, rows_of, scan
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source
from embedding.errors import CorpusError

_BLANK = b" \t\r\n"
_TYPE_CHARS = 100
"""Structs have long names."""
_NEARLY_ALL = 0.9
_TOO_LARGE = 2**63
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


def read(stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> Rows:
    """The unit's rows; a key that a line lacks is null.

    A line that is no JSON object, or has a value that is not of its column's type, is a row with a fault, and what can be read of it.
    """
    assert columns.schema is not None
    return joined((_rows(lines, columns.schema) for _, lines in rows_of(stream, unit, _split)), columns.schema)


def first_objects(stream: pa.NativeFile | BinaryIO, source: Source) -> list[dict[str, Any]]:
    """The first objects of a file.

    Raises:
        ValueError: it has rows, and none of the first ones is a JSON object.
    """
    lines = read_head(stream, source, _split)
    return _objects(lines) if lines else []


def with_types(columns: Columns, rows: Sequence[Mapping[str, Any]], uri: str) -> Columns:
    """The columns with the types that these rows show, or nearly all of them, texts as strings.

    Raises:
        CorpusError: a column is in none of the rows, or too many of its values are of another type than the others.
    """
    columns = replace(columns, schema=None)
    schema = _schema_of(rows)
    require_columns(schema, columns, uri)
    types: dict[str, Any] = {}
    for column in columns.all:
        path = [column] if column in schema.names else column.split(".")
        kind = pa.string() if column in columns.texts else _type_of_most(_values(rows, path))
        if kind is None:
            raise CorpusError(
                f"{uri}: column {column!r} has values of different types; give them one type, or leave it out of {columns.option(column)}"
            )
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


def _objects(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Those lines that are objects; the others are rejected rows, if there is one at all."""
    if lines[0].strip(_BLANK) == b"[":  # its last row alone would be an object, all others end with a comma
        raise ValueError("it is a single JSON array; write one object per line")
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
            first = first or f"the first is of the type {type(value).__name__}"
    if not found:
        raise ValueError(f"none of its first lines is a JSON object ({first}); write one object per line")
    return found


def _schema_of(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of all keys; string where the values have different types: if the column is read, those rows are faults."""
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


def _type_of_most(values: Sequence[Any]) -> pa.DataType | None:
    """As `_type_of`, but without the few that are not like the others, and of a struct, each field so: their rows will be rejected.

    None where they are not few: whichever type was taken, a great part of the corpus would not be of it.
    """
    there = [value for value in values if value is not None]
    if (kind := _type_of(there)) is not None and not pa.types.is_struct(kind):
        return kind
    [(most, count)] = Counter(map(_kind_of, there)).most_common(1)
    if count < _NEARLY_ALL * len(there):
        return None
    alike = [value for value in there if _kind_of(value) == most]
    if most is not dict:
        return _type_of(alike)
    kinds = {name: _type_of_most([value.get(name) for value in alike]) for name in dict.fromkeys(name for value in alike for name in value)}
    return None if any(kind is None for kind in kinds.values()) else pa.struct(list(kinds.items()))


def _kind_of(value: Any) -> object:
    """What JSON calls its type, but whole numbers that no column of numbers holds are of their own."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("number", isinstance(value, int) and abs(value) >= _TOO_LARGE) if is_number else type(value)


def _values(rows: Sequence[Mapping[str, Any]], path: Sequence[str]) -> list[Any]:
    values: list[Any] = list(rows)
    for name in path:
        values = [value.get(name) if isinstance(value, dict) else None for value in values]
    return values


def _rows(lines: Sequence[bytes], schema: pa.Schema) -> Rows:
    try:
        return Rows(_parsed(lines, schema))
    except ValueError:
        bad = bad_rows(lines, partial(_parsed, schema=schema))
    rest = _salvaged([lines[row] for row in bad], schema)
    good = np.delete(np.arange(len(lines)), bad).tolist()
    tables = [_parsed([lines[row] for row in good], schema)] if good else []
    table = pa.concat_tables([*tables, rest.table]).take(np.argsort([*good, *bad]))
    return Rows(table, {bad[row]: reason for row, reason in rest.faults.items()})


def _salvaged(lines: Sequence[bytes], schema: pa.Schema) -> Rows:
    """Lines that cannot be read, with those of their columns that can: one may be the id."""
    no_objects = bad_rows(lines, partial(_parsed, schema=pa.schema([])))
    objects = sorted(set(range(len(lines))).difference(no_objects))
    faults = dict.fromkeys(no_objects, "the line is not a JSON object")
    columns = []
    for field in schema:
        parse = partial(_parsed, schema=pa.schema([field]))
        wrong = [objects[place] for place in bad_rows([lines[row] for row in objects], parse)]
        columns.append(parse_but(lines, {*no_objects, *wrong}, parse, pa.schema([field])).column(0))
        reason = f"column {field.name!r} is not {str(field.type)[:_TYPE_CHARS]}, its type at the beginning of the corpus"
        faults = dict.fromkeys(wrong, reason) | faults  # of several columns, the first is named
    for row in objects:
        faults.setdefault(row, "the columns of the line cannot be read together")
    return Rows(pa.table(columns, schema=schema), faults)


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
        raise ValueError("it is not a JSON object")
    table = pyarrow.json.read_json(
        pa.BufferReader(data),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if table.num_rows != len(lines):
        raise ValueError("it is more than one JSON object")
    return table
