"""Embed a Parquet corpus: `python jobs/embed_corpus.py --input URI --output URI`, or the same through `ray job submit`.

config -> plan -> Ray Data (read | tokenize, encode, pool, write, commit) -> records -> manifest -> summary
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process silently, also before main() has its own handler
    from embedding.run.cli import main

    main()
