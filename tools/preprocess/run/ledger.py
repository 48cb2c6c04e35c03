"""Counts that add up: lines = documents + empty + bad + filtered + duplicate; a bad line has a place and a reason."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading.pieces import LineNumbers
from megapatch.tools.preprocess.reading.records import Tally, place_of

_LOG = logging.getLogger("megapatch.tools.preprocess")
_MAX_WARNINGS = 10
_MAX_SOURCES = 1000  # with counts of their own; those that come later are counted together
Place = tuple[str, int | None]  # of a bad record: in words, and the number of the line or row
OTHERS = "(all others)"
KINDS = ("documents", "empty", "bad", "filtered", "duplicate")


class BadLine(UserError):
    """The first bad line, under --on-bad-line fail."""


@dataclass
class Ledger:
    """Takes the tallies of all pieces in input order. ``lines``: lines, rows, or files where a file is a document.

    ``empty``: blank lines and documents without text; ``filtered`` by reason; ``others``: counts that are no part
    of the sum, such as end-of-document tokens inside documents.
    """

    on_bad_line: str
    by_key: bool = False  # sources are values in the documents; else inputs
    lines: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    duplicate: int = 0
    tokens: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = LineNumbers()

    def read(self, tally: Tally) -> list[Place]:
        """Count a piece; where its bad records are; under 'fail' the first is a UserError."""
        places = []
        for bad in tally.bad:
            place = place_of(bad, tally.piece, self._numbers)
            places.append((place, self._numbers.before(tally.piece) + bad.line if bad.line else None))
            if self.on_bad_line == "fail":
                raise BadLine(f"{place}: {bad.reason}; mend it, or leave it out with --on-bad-line skip")
            if self.bad < _MAX_WARNINGS:
                _LOG.warning("%s: %s; %s", place, bad.reason, "skipped" if self.on_bad_line == "skip" else "put aside")
            self.bad += 1
        self.bad += tally.num_bad - len(tally.bad)
        self.lines += tally.num_lines
        self.empty += tally.num_blank
        source = {"lines": tally.num_lines, "empty": tally.num_blank, "bad": tally.num_bad}
        if not self.by_key:
            self.of_source(tally.piece.path, source)
        return places

    def of_source(self, name: str, counts: Mapping[str, int]) -> None:
        """Add to the counts of one source (the first 1,000 have their own)."""
        if name not in self.sources and len(self.sources) >= _MAX_SOURCES:
            name = OTHERS
        mine = self.sources.setdefault(name, {})
        for kind, count in counts.items():
            if count:
                mine[kind] = mine.get(kind, 0) + count

    def settle(self, source: str, fates: Mapping[str, int]) -> None:
        """Count what became of documents of one source: documents, empty, duplicate, or a reason to be filtered."""
        for fate, count in fates.items():
            if not count:
                continue
            if fate in KINDS:
                setattr(self, fate, getattr(self, fate) + count)
            else:
                self.filtered[fate] = self.filtered.get(fate, 0) + count
            self.of_source(source, {fate if fate in KINDS else "filtered": count})

    def counts(self) -> dict[str, Any]:
        """What a manifest says."""
        sums: dict[str, Any] = {"lines": self.lines} | {kind: self.total(kind) for kind in KINDS}
        return sums | {"filtered_by_reason": dict(self.filtered), "tokens": self.tokens, **self.others}

    def total(self, kind: str) -> int:
        """How many lines became one of KINDS."""
        return sum(self.filtered.values()) if kind == "filtered" else int(getattr(self, kind))

    def state(self) -> dict[str, Any]:
        """JSON values for ``restore``."""
        self.check()
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; --on-bad-line may differ where nothing was bad."""
        mode = self.on_bad_line
        for name, value in state.items():
            setattr(self, name, value)
        self.on_bad_line = mode
        self.check()
        if self.bad and state["on_bad_line"] != mode:
            raise UserError(
                f"--on-bad-line {mode}: the interrupted run found {self.bad:,} bad lines with --on-bad-line "
                f"{state['on_bad_line']}; go on with that, or start anew with --force"
            )

    def check(self) -> None:
        """The law of conservation."""
        total = sum(self.total(kind) for kind in KINDS)
        assert self.lines == total, f"lines lost: {self.counts()}"

    def line(self) -> str:
        """The law, in words and figures."""
        parts = " + ".join(f"{self.total(kind):,} {kind}" for kind in KINDS)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.filtered.items()))
        return f"{self.lines:,} lines = {parts}" + (f"; filtered: {reasons}" if reasons else "")

    def close(self) -> None:
        """Check that the counts add up, and say them."""
        self.check()
        _LOG.info("%s", self.line())
