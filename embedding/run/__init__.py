"""Joins texts-to-vectors and files-to-shards on Ray: worker, pipeline, progress, summary, command line."""
