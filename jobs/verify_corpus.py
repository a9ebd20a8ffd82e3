"""Prove an output: `python jobs/verify_corpus.py URI`, or the same through `ray job submit`.

settings -> plan -> Ray Data (read source and shard, compare) -> sample embedded again -> manifest, ledger -> findings
"""

from __future__ import annotations

from embedding.run.proof.cli import main

if __name__ == "__main__":
    main()
