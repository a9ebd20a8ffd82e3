"""What a proof found, in one line of JSON for pipelines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from embedding.corpus.findings import CheckedUnit, Finding
from embedding.errors import ExitCode

ProofStatus: TypeAlias = Literal["proved", "not proved", "repaired", "interrupted", "crashed"]


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

    def count(self, checked: CheckedUnit) -> None:
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

    def line(self) -> str:
        """The one-line JSON, without the lists, which may be long."""
        facts = asdict(self)
        del facts["details"], facts["removed"]
        return json.dumps(facts)

    def document(self) -> bytes:
        """The whole proof as JSON."""
        return json.dumps(asdict(self), indent=1).encode()
