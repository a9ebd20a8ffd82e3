"""Folders of files that are a table: which of them still are in it, only the table's own log says."""
