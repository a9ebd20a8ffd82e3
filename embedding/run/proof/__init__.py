"""The proof of an output: `jobs/verify_corpus.py`."""
