"""Embed a Parquet corpus: `python jobs/embed_corpus.py --input URI --output URI`, or the same through `ray job submit`.

config -> plan -> Ray Data (read | tokenize, encode, pool, write, commit) -> records -> manifest -> summary
"""

from __future__ import annotations

from embedding.run.cli import main

if __name__ == "__main__":
    main()
