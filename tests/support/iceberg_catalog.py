"""A catalog of Iceberg tables that needs no server and leaves nothing open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from pyiceberg.catalog.sql import SqlCatalog


@contextmanager
def iceberg_catalog(warehouse: str, **properties: str) -> Iterator[SqlCatalog]:
    """A catalog, in memory, of tables under the URL `warehouse`; it has the namespace `n`. `properties` are those of the store."""
    with closing(SqlCatalog("tests", uri="sqlite:///:memory:", warehouse=warehouse, **properties)) as catalog:
        catalog.create_namespace("n")
        yield catalog
