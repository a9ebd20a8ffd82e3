"""Prove an output: `python jobs/verify_corpus.py URI`, or the same through `ray job submit`.

settings -> plan -> Ray Data (read source and shard, compare) -> sample embedded again -> manifest, ledger -> findings
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process silently, also before main() has its own handler
    from embedding.run.proof.cli import main

    main()
