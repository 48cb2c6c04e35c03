"""Bad lines put aside: as they are, so that they can be mended and read again, and where they were and why."""

import json
from collections.abc import Sequence
from pathlib import Path

from megapatch.tools.preprocess.reading.records import Tally
from megapatch.tools.preprocess.run.ledger import Place

_LINES, _REASONS = "bad.lines", "bad.reasons"  # notes of the run


def reasons_path(quarantine: Path) -> Path:
    """The file of JSON lines beside FILE: a line for each of its lines."""
    return Path(f"{quarantine}.reasons.jsonl")


class BadLines:
    """FILE of --on-bad-line quarantine=FILE, and FILE.reasons.jsonl; nothing where ``quarantine`` is None."""

    def __init__(self, quarantine: Path | None) -> None:
        self._quarantine = quarantine
        self.paths = [] if quarantine is None else [quarantine, reasons_path(quarantine)]

    def notes(self, tallies: Sequence[Tally], places: Sequence[Place]) -> dict[str, bytes]:
        """What to append for the bad lines of a chunk, which are at ``places``."""
        if self._quarantine is None:
            return {}
        found = [(tally.piece, bad) for tally in tallies for bad in tally.bad]
        reasons = [
            {
                "place": place,
                "file": piece.path,
                "line": line,
                "byte": bad.offset,
                "reason": bad.reason,
                "bytes": len(bad.raw or b""),
            }
            for (place, line), (piece, bad) in zip(places, found, strict=True)
        ]
        lines = "".join(json.dumps(reason, ensure_ascii=False) + "\n" for reason in reasons)
        return {
            _LINES: b"".join((bad.raw or b"") + b"\n" for _, bad in found),
            _REASONS: lines.encode(errors="surrogateescape"),  # names of files
        }

    def files(self, folder: Path) -> dict[Path, bytes | Path]:
        """The two files, by path, to be taken from the run's folder."""
        notes = zip(self.paths, (_LINES, _REASONS), strict=False)
        return {path: folder / name if (folder / name).exists() else b"" for path, name in notes}
