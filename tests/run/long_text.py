"""What one long text costs a process on its way from the file to its tokens.

    python -m tests.run.long_text FILE MODEL

prints how many bytes the process grew by at most, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from embedding.corpus.plan import plan_units
from embedding.corpus.reader import Columns, read_layout, read_unit, text_faults
from embedding.corpus.sources import list_sources
from embedding.model.tokenizer import Tokenizer
from embedding.run.exchange import ReadUnit, decode_read, decode_rows, encode_read, encode_rows
from tests.model.tiny import spec_of

COLUMNS = Columns("text")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def tokens_of(file: Path, tokenize: Tokenizer) -> int:
    """As the two stages do it, in one process."""
    [source] = list_sources([str(file)])
    [unit] = plan_units([read_layout(source, COLUMNS)], unit_rows=10, fingerprint="f")
    [read] = decode_read(encode_read([ReadUnit(unit, encode_rows(read_unit(unit, COLUMNS)), None, 0.0, 0.0)]))
    assert read.rows is not None
    rows = decode_rows(read.rows)
    assert not text_faults(rows.text)
    return len(tokenize(rows.text.to_pylist()).ids)


if __name__ == "__main__":
    file, model = map(Path, sys.argv[1:])
    tokenize, other = (Tokenizer(spec_of(model), model) for _ in range(2))
    tokens_of(file.with_name("small.parquet"), other)  # what libraries take once is not the text's; a tokenizer's first call is
    before = peak_bytes()
    tokens = tokens_of(file, tokenize)
    print(json.dumps({"tokens": tokens, "grown": peak_bytes() - before}))
