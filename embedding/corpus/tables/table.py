"""What a table is to the job, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from embedding.errors import CorpusError, first_line

REWRITE = "write its rows to plain Parquet files and name those"
"""What is left to do with a table that is not read."""


class Kind(StrEnum):
    """What tables there are; a folder that is of two kinds counts as the first."""

    DELTA = "Delta Lake"
    ICEBERG = "Iceberg"
    HUDI = "Hudi"
    LANCE = "Lance"

    @property
    def described(self) -> str:
        """A table of this kind, in a sentence."""
        return f"{'an' if self is Kind.ICEBERG else 'a'} {self} table"


@dataclass(frozen=True, slots=True)
class Table:
    """A folder that is a table."""

    given: str
    """What the user called it, for sentences."""
    kind: Kind
    folder: str
    """Path on the file system."""
    metadata: str | None = None
    """Of Iceberg, the metadata file that was named instead of the folder."""


@dataclass(frozen=True, slots=True)
class Live:
    """The table at one version."""

    version: str
    files: tuple[str, ...]
    """Paths on the file system."""


def require_inside(table: Table, path: str) -> None:
    """Check that a file that the table names lies in its folder: a corpus names nothing else to be read.

    Raises:
        CorpusError: it does not.
    """
    if not path.startswith(f"{table.folder}/") or ".." in path.split("/"):
        said = f"lists {path}, which lies outside its folder, perhaps because the table was moved or shares files with another"
        raise CorpusError(f"--input {table.given} {said}; {REWRITE}")


def refusal(table: Table, has: str, remedy: str) -> CorpusError:
    """The error for a table of which the list of its files does not tell the rows."""
    return CorpusError(f"--input {table.given} is {table.kind.described} with {has}, which this job cannot read; {remedy}")


def damaged(table: Table, error: Exception) -> CorpusError:
    """The error for a table that its library cannot read."""
    return CorpusError(f"--input {table.given} is not a readable {table.kind} table: {first_line(error)}")
