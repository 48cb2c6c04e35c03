"""Pieces of inputs, as they go to workers, and where in its file a line of a piece is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megapatch.models.cli import UserError

_COUNT_BYTES = 8 << 20
Stamp = tuple[int, int, int]  # of a file: number, bytes, time of the last change in ns


@dataclass(frozen=True)
class Piece:
    """Whole records of an input: bytes [start, start + size), or rows from ``start`` on for parquet and arrow.

    ``data``: the bytes themselves where no worker can read them: unpacked or from a stream, rows as an arrow stream.
    ``size``: bytes of content (rows: estimated); ``input_bytes``: bytes of the input spent on it, for the progress.
    ``lines_before``: lines or rows of the input before the piece, None where nobody has counted them.
    """

    path: str
    kind: str
    start: int
    size: int
    data: bytes | None = None
    input_bytes: int = 0
    lines_before: int | None = None
    stamp: Stamp | None = None
    group: int = -1  # of a parquet file: the row group
    columns: tuple[str, ...] = ()

    def read(self) -> bytes:
        """The bytes of the piece; a file that changed since it was cut is a UserError."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.start)
            while len(data) < self.size and (
                more := os.pread(file.fileno(), self.size - len(data), self.start + len(data))
            ):
                data += more  # Linux reads at most 2 GiB a call
            refuse_changed(self.path, file.fileno(), self.stamp)
        if len(data) != self.size:
            raise changed(self.path)
        return data


@dataclass(frozen=True)
class Chunk:
    """Pieces that a worker takes at a time. ``number`` counts from 0, also over those passed over by ``skip``.

    ``mark``: digest of all input up to the end of the chunk, for InputDigests(expected=...) of a run that goes on
    after it; '' where no digests are taken.
    """

    number: int
    pieces: tuple[Piece, ...]
    mark: str = ""

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs spent on it."""
        return sum(piece.input_bytes for piece in self.pieces)

    @property
    def place(self) -> str:
        """Where it begins, for messages."""
        first = self.pieces[0]
        return f"{first.path} ({'row' if first.group >= 0 else 'byte'} {first.start:,})"


def stamp_of(path: str, descriptor: int, size: int | None) -> Stamp:
    """What changes when an open file does; it must have ``size`` bytes."""
    stamp = _stamp(descriptor)
    if stamp[1] != size:
        raise changed(path)
    return stamp


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def refuse_changed(path: str, descriptor: int, stamp: Stamp | None) -> None:
    """UserError when an open file is not what it was when it was stamped."""
    if stamp is not None and _stamp(descriptor) != stamp:
        raise changed(path)


class Changed(UserError):
    """An input is not what it was; what was made of it cannot be gone on with."""


def changed(path: str) -> Changed:
    """The error for a file that is not what it was."""
    return Changed(f"{path}: changed while it was read; run again when nothing writes to it")


class LineNumbers:
    """Lines of an input before a piece. Counts in the file itself when first asked, and from there on when asked
    again: pass pieces in input order to count each byte once."""

    def __init__(self) -> None:
        self._path, self._position, self._count = "", 0, 0

    def before(self, piece: Piece) -> int:
        """How many lines (rows) of the input come before the piece."""
        if piece.lines_before is not None:
            return piece.lines_before
        if piece.path != self._path or piece.start < self._position:
            self._path, self._position, self._count = piece.path, 0, 0
        with open(piece.path, "rb", buffering=0) as file:
            while self._position < piece.start:
                block = os.pread(file.fileno(), min(_COUNT_BYTES, piece.start - self._position), self._position)
                if not block:
                    raise changed(piece.path)
                self._count += block.count(b"\n")
                self._position += len(block)
        return self._count
