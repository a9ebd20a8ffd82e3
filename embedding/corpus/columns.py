"""Which columns of a source are read, where they are in its schema, and what becomes the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, reduce
from string import Formatter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.corpus.formats.names import Format
from embedding.errors import ConfigError, CorpusError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_TEXT = pa.large_string()


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a source are read, and how; dotted paths reach into structs."""

    text: str
    """The column that holds the text; unused where there is a template."""
    copied: tuple[str, ...] = ()
    """Columns that go into the shard unchanged: the id column first, then the kept ones."""
    template: str | None = None
    """Makes the text of several columns, such as "{title}\\n\\n{body}"."""
    format: Format = Format.PARQUET
    """What the source files are."""
    schema: pa.Schema | None = None
    """Of JSON Lines, what is read of each line and as which type."""
    id: str | None = None
    """The id column, where there is one, for the sentences that name the option."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that the text is made of, each once."""
        if self.template is None:
            return (self.text,)
        return tuple(dict.fromkeys(column for _, column in parse_template(self.template) if column is not None))

    @property
    def all(self) -> tuple[str, ...]:
        """Every path that is read, each once."""
        return tuple(dict.fromkeys((*self.copied, *self.texts)))

    def option(self, column: str) -> str:
        """The option that asks for a column."""
        if column in self.texts:
            return "--text-column" if self.template is None else "--text-template"
        return "--id-column" if column == self.id else "--keep-columns"


@lru_cache(maxsize=16)  # asked for by every unit
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    r"""Pairs of literal text and the column that follows it, None after the last one.

    Python's format strings, of which only `{column}`, `{{` and `}}` are allowed; `\n`, `\t` and `\\` are understood in the literals.

    Raises:
        ConfigError: it is no such template, or names no column.
    """
    given = f"--text-template={template!r}"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{given} is invalid: {error}; write {{{{ and }}}} for literal braces") from None
    for _, column, form, conversion in parts:
        if column == "":
            raise ConfigError(f"{given} is invalid: {{}} names no column; write the name of a column between the braces")
        if form or conversion:
            raise ConfigError(f"{given} is invalid: {{{column}}} has a format or conversion; write only {{{column}}}")
    if all(column is None for _, column, _, _ in parts):
        raise ConfigError(f"{given} names no column, so all texts would be the same; write {{column}} where its value should appear")
    return tuple((re.sub(r"\\[nt\\]", lambda escape: _ESCAPES[escape[0]], literal), column) for literal, column, _, _ in parts)


def text_of(table: pa.Table, columns: Columns) -> pa.LargeStringArray:
    """The text of each row of a table that has the columns.

    In a template nulls are empty; a row that has nothing but nulls has no text.
    """
    if columns.template is None:
        return _as_text(select(table, columns.text))
    values = {column: _as_text(select(table, column)) for column in columns.texts}
    pieces: list[pa.Array | pa.Scalar] = []
    for literal, column in parse_template(columns.template):
        pieces += [pa.scalar(literal, _TEXT)] if literal else []
        pieces += [values[column]] if column is not None else []
    nothing = reduce(pc.and_, (value.is_null() for value in values.values()))
    joined = pc.binary_join_element_wise(*pieces, pa.scalar("", _TEXT), null_handling="replace", null_replacement="")
    return pc.if_else(nothing, pa.scalar(None, _TEXT), joined)


def require_columns(schema: pa.Schema, columns: Columns, uri: str) -> None:
    """Check that the schema has the columns, and text where text is needed.

    A line of JSON lacks what is null, so its file needs to show no more than one of the columns that make the text.

    Raises:
        CorpusError: it has not; the sentence names what it has.
    """
    needed, texts = columns.all, columns.texts
    if columns.schema is not None:
        needed = texts = tuple(column for column in texts if has_column(schema, column)) or texts
    for column in needed:
        require_column(schema, column, uri, columns.option(column))
    for column in texts:
        require_text(schema, column, uri, columns.option(column))


def has_column(schema: pa.Schema, column: str) -> bool:
    """Whether there is a field at a column name or dotted path."""
    try:
        field_at(schema, column)
    except KeyError:
        return False
    return True


def require_storable(schema: pa.Schema, columns: Columns, uri: str) -> None:
    """Check that those copied columns that the schema has can be written as Parquet.

    Raises:
        CorpusError: one cannot.
    """
    for column in columns.copied:
        if has_column(schema, column):
            field = field_at(schema, column)
            try:
                pq.write_table(pa.schema([field.with_name("column")]).empty_table(), pa.BufferOutputStream())
            except pa.ArrowException as error:
                raise CorpusError(
                    f"{uri}: column {column!r} is {field.type}, which Parquet shards cannot hold; leave it out of {columns.option(column)}"
                ) from error


def require_column(schema: pa.Schema, column: str, uri: str, option: str) -> None:
    """Check that the schema has the column, which that option asks for.

    Raises:
        CorpusError: it has not, or twice; the sentence names what it has.
    """
    if any(schema.names.count(name) > 1 for name in (column, column.partition(".")[0])):
        raise CorpusError(f"{uri} has several columns named {column!r}; rename all but one of them")
    try:
        field_at(schema, column)
    except KeyError:
        paths = [path for path, _ in paths_of(schema)]
        close = get_close_matches(column, paths, n=1)
        hint = ", separated by spaces, not commas" if "," in column else f" (did you mean {close[0]!r}?)" if close else ""
        folder = f"; {column!r} is a folder of the path, and data/ keeps those folders (Parquet output)" if _is_folder(column, uri) else ""
        raise CorpusError(f"{uri} has no column {column!r}; {_remedy(option, 'columns')}{hint}: {', '.join(paths)}{folder}") from None


def require_text(schema: pa.Schema, column: str, uri: str, option: str) -> None:
    """Check that a column of the schema, which that option asks for, is text.

    Raises:
        CorpusError: it is not; the sentence names the columns that are.
    """
    field = field_at(schema, column)
    if not _is_text(field.type):
        others = [path for path, kind in paths_of(schema) if _is_text(kind)]
        remedy = f"{_remedy(option, 'string columns')}: {', '.join(others)}" if others else "the file has no string column for " + option
        raise CorpusError(f"{uri}: column {column!r} is {field.type}, not string; {remedy}")


def _is_folder(column: str, uri: str) -> bool:
    """Whether the path has the column as a hive folder: .../lang=de/part.parquet."""
    return any(folder.startswith(f"{column}=") for folder in uri.split("/")[:-1])


def _remedy(option: str, which: str) -> str:
    """What to do with an option that asks for the wrong column."""
    several = option in ("--keep-columns", "--text-template")
    return f"use only its {which} in {option}" if several else f"set {option} to one of its {which}"


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind))


def _as_text(column: pa.ChunkedArray) -> pa.LargeStringArray:
    chunks = column.chunks
    if pa.types.is_dictionary(column.type) and pa.types.is_string_view(column.type.value_type):  # polars' kind, which Arrow cannot decode
        chunks = [pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(_TEXT)) for chunk in chunks]
    return pa.chunked_array([chunk.cast(_TEXT) for chunk in chunks], _TEXT).combine_chunks()


def field_at(schema: pa.Schema, column: str) -> pa.Field:
    """The field at a column name or dotted path; a column whose own name has dots comes first.

    Raises:
        KeyError: there is none.
    """
    if column in schema.names:
        return schema.field(column)
    head, *path = column.split(".")
    field = schema.field(head)
    for name in path:
        if not pa.types.is_struct(field.type) or field.type.get_field_index(name) < 0:
            raise KeyError(column)
        field = field.type.field(name)
    return field


def paths_of(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Every column and field of a struct, by dotted path, with its type."""
    for field in fields:
        yield above + field.name, field.type
        if pa.types.is_struct(field.type):
            yield from paths_of(field.type, f"{above}{field.name}.")


def select(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The values at a column name or dotted path, which the table has."""
    if column in table.column_names:
        return table.column(column)
    head, *path = column.split(".")
    return pc.struct_field(table.column(head), path)
