"""What a proof found, in one line of JSON for pipelines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from embedding.corpus.findings import CheckedUnit, Finding, Kind
from embedding.corpus.verify import NOT_OURS_TO_MEND
from embedding.errors import ExitCode, count

ProofStatus: TypeAlias = Literal["proved", "not proved", "repaired", "interrupted", "crashed"]

_CASES = {
    Kind.UNREADABLE_SOURCE: ("sources unreadable", "restore or remove them, and run the job"),
    Kind.NOT_COMPLETE: ("run not finished", "run the job to complete the output"),
    Kind.SOURCE_CHANGED: ("sources changed since", "run the job to embed what is there now"),
    Kind.FOREIGN_FILE: ("foreign files in data/", "move them elsewhere"),
}
"""Where nothing of the output is wrong itself: what is said, and what is to be done. The first that is found counts."""


@dataclass
class Proof:
    """Counts of one proof, and everything that is wrong."""

    output: str
    status: ProofStatus = "crashed"
    shards: int = 0
    """Shards read."""
    rows: int = 0
    """Rows of those that nothing is wrong with."""
    rows_rejected: int = 0
    sampled: int = 0
    """Rows that were embedded again."""
    seed: int | None = None
    """Chooses the same rows again."""
    worst_cosine: float | None = None
    """Of the rows that were embedded again, with what the shards say."""
    findings: dict[str, int] = field(default_factory=dict)
    """Number of findings by kind."""
    deleted: int = 0
    """Objects that --repair removed."""
    seconds: float = 0.0
    details: list[Finding] = field(default_factory=list)
    """Every finding."""
    removed: list[str] = field(default_factory=list)

    def add(self, checked: CheckedUnit) -> None:
        """Count one shard."""
        self.shards += 1
        if checked.finding is None:
            self.rows += checked.rows
            self.rows_rejected += checked.rejected

    def conclude(self, findings: list[Finding], removed: list[str]) -> None:
        """Say what it comes to."""
        self.details, self.removed, self.deleted = findings, removed, len(removed)
        self.findings = dict(Counter(str(finding.kind) for finding in findings))
        self.status = "repaired" if removed else "not proved" if findings else "proved"

    @property
    def exit_code(self) -> ExitCode:
        """What the process answers."""
        return ExitCode.COMPLETE if self.status == "proved" else ExitCode.FAILED_UNITS

    @property
    def verdict(self) -> str:
        """What it comes to in one line, whose first words tell the cases of exit code 3 apart."""
        checked = f"{count(self.shards, 'shard')}, {count(self.rows, 'row')}"
        if self.status == "proved":
            if self.worst_cosine is None:
                return f"proved: {checked}, no vectors compared"
            return f"proved: {checked}, worst cosine {self.worst_cosine:.7f} of {count(self.sampled, 'row')}"
        if self.status == "repaired":
            return f"repaired: {count(self.deleted, 'object')} deleted; run the job to rebuild the output"
        if self.status != "not proved":
            return f"{self.status}: nothing is proved"
        kinds = {finding.kind for finding in self.details}
        found = ", ".join(f"{number:,} {kind}" for kind, number in self.findings.items())
        if kinds - NOT_OURS_TO_MEND:
            return f"damaged: {checked} without a fault, but {found}; use --repair, then run the job to rebuild the rest"
        for kind, (case, remedy) in _CASES.items():
            if kind in kinds:
                return f"{case}: {checked} without a fault, but {found}; {remedy}"
        raise AssertionError(f"no case for {found}")

    def line(self) -> str:
        """The one-line JSON, without the lists, which may be long."""
        facts = asdict(self)
        del facts["details"], facts["removed"]
        return json.dumps(facts)

    def document(self) -> bytes:
        """The whole proof as JSON."""
        return json.dumps(asdict(self), indent=1).encode()
