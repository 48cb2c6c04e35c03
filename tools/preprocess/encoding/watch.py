"""What the parent knows of a run's engine: it takes the reports of chunks in input order, and changes the engine."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LOG = logging.getLogger("megapatch.tools.preprocess")
REFERENCE = "tokenizers"
_PATIENCE = 3  # texts that differ before the engine is changed


@dataclass
class Report:
    """What the parent must know of a chunk's texts: counts of texts, and of special tokens spelled out by token."""

    fast: bool  # encoded by another engine than the reference
    texts: int = 0
    compared: int = 0
    differed: int = 0
    by_reference: int = 0  # sent there at once, for their characters or for special tokens that shall stay text
    example: str = ""
    special: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Count what another report says with this one's."""
        _count(self, other)
        self.example = self.example or other.example


@dataclass
class Watch:
    """Counts over all chunks. What it decides depends on the reports alone, so not on the number of workers."""

    engine: str
    version: str
    reference: str  # version of tokenizers
    why_reference: str | None = None  # from the start, in words
    hard_texts: int = 0
    chunks: int = 0
    texts: int = 0
    compared: int = 0
    differed: int = 0
    by_reference: int = 0
    example: str = ""
    switched_at: int | None = None  # the first chunk that is the reference's alone
    special: dict[str, int] = field(default_factory=dict)

    def absorb(self, report: Report) -> str | None:
        """Count a chunk; or the order under which it must be encoded again, and then nothing is counted."""
        if self.switched_at is not None and report.fast:
            return REFERENCE
        self.chunks += 1
        _count(self, report)
        if report.example and not self.example:
            self.example = report.example
            _LOG.warning("%s %s %s; corrected", self.engine, self.version, report.example)
        if report.fast and self.differed >= _PATIENCE:
            self.switched_at = self.chunks
            _LOG.warning("%s texts differed: from here on with %s", self.differed, REFERENCE)
        return None

    def order(self) -> str | None:
        """What workers of a run that is gone on with must obey from the start."""
        return REFERENCE if self.switched_at is not None else None

    def verdict(self) -> dict[str, Any]:
        """For the manifest."""
        changed, corrected = self.switched_at is not None, self.differed > 0
        said = "changed to the reference" if changed else "differences corrected" if corrected else "exact"
        return {
            "engine": {"name": self.engine, "version": self.version},
            "reference": {"name": REFERENCE, "version": self.reference, "why": self.why_reference},
            "hard_texts_compared": self.hard_texts,
            "texts": self.texts,
            "compared": self.compared,
            "differed": self.differed,
            "by_reference": self.by_reference,
            "example": self.example or None,
            "switched_at": self.switched_at,
            "verdict": said,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Watch":
        """One that ``dataclasses.asdict`` has made JSON of."""
        return cls(**state)


def _count(total: Report | Watch, report: Report) -> None:
    for name in ("texts", "compared", "differed", "by_reference"):
        setattr(total, name, getattr(total, name) + getattr(report, name))
    total.special = dict(Counter(total.special) + Counter(report.special))
