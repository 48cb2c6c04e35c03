"""Counts that add up: every line read is a document, empty, blank or bad, and a bad one has a place and a reason."""

import logging
from dataclasses import dataclass, field

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.records import Bad, Tally

_LOG = logging.getLogger("megapatch.tools.preprocess")
_MAX_WARNINGS = 10


@dataclass
class Counts:
    """``records`` (non-blank lines and text files) = ``documents`` + ``empty`` + ``bad``."""

    records: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    blank_lines: int = 0
    tokens: int = 0
    eod_inside_documents: int = 0


@dataclass
class Ledger:
    """Takes the tallies of all pieces in input order; ``on_bad_line`` is 'fail' or 'skip'."""

    on_bad_line: str
    counts: Counts = field(default_factory=Counts)
    _lines: int = 0  # of the current input, before the current piece

    def add(self, tally: Tally) -> None:
        """Count a piece; under 'fail' its first bad record is a UserError."""
        if tally.piece.start == 0:
            self._lines = 0
        for bad in tally.bad:
            where = self._place(tally, bad)
            if self.on_bad_line == "fail":
                raise UserError(f"{where}; mend it, or leave it out with --on-bad-line skip")
            if self.counts.bad < _MAX_WARNINGS:
                _LOG.warning("%s; skipped", where)
            self.counts.bad += 1
        self.counts.bad += tally.num_bad - len(tally.bad)
        self.counts.blank_lines += tally.num_blank
        self.counts.records += tally.num_lines - tally.num_blank if tally.piece.jsonl else 1
        self._lines += tally.num_lines

    def _place(self, tally: Tally, bad: Bad) -> str:
        line = f":{self._lines + bad.line}" if bad.line else ""
        return f"{tally.piece.path}{line} (byte {bad.offset}): {bad.reason}"

    def close(self) -> None:
        """Check that the counts add up, and say how many bad records were left out."""
        counts = self.counts
        assert counts.records == counts.documents + counts.empty + counts.bad, f"records lost: {counts}"
        if counts.bad:
            _LOG.warning("%s bad records skipped of %s", f"{counts.bad:,}", f"{counts.records:,}")
        if counts.eod_inside_documents:
            _LOG.warning(
                "%s end-of-document tokens inside documents, where the text spells them out: a trainer that resets "
                "positions or attention there will take them for ends",
                f"{counts.eod_inside_documents:,}",
            )
        if not counts.documents:
            raise UserError(f"no documents in --input ({counts.empty} empty, {counts.bad} bad); nothing was written")
