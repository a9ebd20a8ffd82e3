"""Damaged JSON Lines, CSV and Arrow files, read as the job would, in a process of its own that says how each ended.

    python -m tests.fuzz.formats FOLDER COUNT

What is in a damaged file is asked of Python's own parsers and, for Arrow, of plain pyarrow.
"""

from __future__ import annotations

import csv
import faulthandler
import gzip
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedding.corpus.columns import Columns
from embedding.corpus.formats.names import Format, format_by_name
from tests.fuzz.reader import HANG_SECONDS, READ_ERRORS, MisreadError, limit_memory, pairs, peak_bytes, read_file, say
from tests.support.corpora import sentences

UNIT_ROWS, BATCH_ROWS = 8, 11
TEXTS = [*sentences(30, seed=31), None, "", 'a "quote"', "comma, tab\t", "two\nlines", "é 名 🎉", "\r", "}{", '"'] * 2
TYPES = pa.schema({"id": pa.int64(), "text": pa.string()})
SPICE = [b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"{", b"}", b"[", b"\\", b"1", b" "]


def originals() -> dict[str, bytes]:
    """Sound files of all formats, by name."""
    lines = [json.dumps({"id": number, "text": text, "more": {"deep": [number, text]}}) for number, text in enumerate(TEXTS)]
    sheet = io.StringIO(newline="")
    csv.writer(sheet, lineterminator="\r\n").writerows([["id", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    file, stream = io.BytesIO(), io.BytesIO()
    for sink, make in ((file, pa.ipc.new_file), (stream, pa.ipc.new_stream)):
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
    text = "\n".join(lines).encode()
    return {
        "a.jsonl": text,
        "a.jsonl.gz": gzip.compress(text, mtime=0),
        "a.csv": sheet.getvalue().encode(),
        "a.arrow": file.getvalue(),
        "b.arrow": stream.getvalue(),
    }


def _flip(data: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << choose.randrange(8)]) + data[place + 1 :]


def _insert(data: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(data))
    return data[:place] + choose.choice(SPICE) + data[place:]


def _replace(data: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(data))
    return data[:place] + choose.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f", choose.choice(SPICE)]) + data[place + 1 :]


def _cut(data: bytes, choose: random.Random) -> bytes:
    return data[: choose.randrange(len(data))]


def _remove(data: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(data))
    return data[:place] + data[place + choose.randrange(1, 60) :]


def _repeat(data: bytes, choose: random.Random) -> bytes:
    place, other = choose.randrange(len(data)), choose.randrange(len(data))
    return data[:place] + data[other : other + choose.randrange(1, 60)] + data[place:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _insert, _replace, _cut, _remove, _repeat)


def judge(path: Path) -> dict[str, str]:
    """What became of a damaged file: all its `rows`, `some` of them, or it was `refused`.

    Raises:
        MisreadError: a row that is not in the file, or a line that is rejected though it is one.
    """
    kind = format_by_name(path.name)
    assert kind is not None
    found, refusals = read_file(path, Columns("text", ("id",), None, kind, TYPES if kind is Format.JSONL else None), UNIT_ROWS)
    if found is None:
        return {"outcome": "refused", "why": refusals[0]}
    expected = dict(REFERENCES[kind](path.read_bytes(), path.name))
    for row, values in found.items():
        if kind is Format.CSV and values:
            values = (values[0] or None, values[1] or None)
        if row not in expected or expected[row] != values:
            raise MisreadError(f"row {row} is {values!r}, in the file is {expected.get(row)!r}")
    if not refusals and len(found) != len(expected):
        raise MisreadError(f"{len(found)} rows, in the file are {len(expected)}")
    if not refusals:
        return {"outcome": "some" if None in found.values() else "rows", "why": ""}
    return {"outcome": "some" if found else "refused", "why": refusals[0]}


def _json_rows(data: bytes, name: str) -> Iterator[tuple[int, Any]]:
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    for row, line in enumerate(line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r\n")):
        found = None
        with suppress(ValueError, AttributeError, RecursionError):
            value = json.loads(line.decode(errors="surrogateescape"))
            number, text = value.get("id"), value.get("text")
            if type(number) in (int, type(None)):
                found = number, None if text is None else text.encode(errors="surrogateescape")
        yield row, found


def _csv_rows(data: bytes, _name: str) -> Iterator[tuple[int, Any]]:
    """Python's parser does not tell nothing from quotes round nothing: the sound file has none, and null is the empty text here."""
    text = io.StringIO(data.decode(errors="surrogateescape").removeprefix("\ufeff"), newline="")
    header, *rows = [row for row in csv.reader(text) if row]
    places = {name: index for index, name in enumerate(header)}
    for number, row in enumerate(rows):
        if len(row) == len(header):
            yield number, (row[places["id"]] or None, row[places["text"]].encode(errors="surrogateescape") or None)
        else:
            yield number, None


def _arrow_rows(data: bytes, _name: str) -> Iterator[tuple[int, Any]]:
    """What is in each batch that can be read."""
    position = 0
    for batch in _file_batches(data) if data.startswith(b"ARROW1") else _stream_batches(data):
        if batch is not None:
            with suppress(*READ_ERRORS):
                text = batch.column("text").view(pa.binary())
                text.validate(full=True)
                yield from enumerate(pairs(batch.column("id"), text), position)
        position += BATCH_ROWS if batch is None else batch.num_rows


def _file_batches(data: bytes) -> Iterator[pa.RecordBatch | None]:
    file = pa.ipc.open_file(data)
    for index in range(file.num_record_batches):
        batch = None
        with suppress(*READ_ERRORS):
            batch = file.get_batch(index)
        yield batch


def _stream_batches(data: bytes) -> Iterator[pa.RecordBatch]:
    with suppress(*READ_ERRORS):
        yield from pa.ipc.open_stream(data)


REFERENCES = {Format.JSONL: _json_rows, Format.CSV: _csv_rows, Format.ARROW: _arrow_rows}


def main(folder: Path, count: int) -> None:
    limit_memory()
    sound = list(originals().items())
    for number in range(count):
        choose = random.Random(number)
        name, data = sound[number % len(sound)]
        damage = DAMAGES[number // len(sound) % len(DAMAGES)]
        facts = {"number": number, "original": name, "damage": damage.__name__}
        say(**facts)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        path = folder / name
        path.write_bytes(damage(data, choose))
        try:
            say(**facts, **judge(path), peak_bytes=peak_bytes())
        except Exception as error:  # noqa: BLE001  (whatever it is, the parent shall hear of it)
            say(**facts, outcome="wrong", why=f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
