"""Where inputs of bytes are cut: after the first end of a line that makes a piece as long as asked."""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import BinaryIO

from megapatch.tools.preprocess.reading.compressed import BLOCK_BYTES, LEAST_BLOCK_BYTES, unpacked
from megapatch.tools.preprocess.reading.digests import InputDigests
from megapatch.tools.preprocess.reading.pieces import Piece, refuse_changed, stamp_of
from megapatch.tools.preprocess.reading.sources import STDIN, Source

_SEEK_BYTES = 64 << 10
Span = tuple[int, int]  # of a file: the first byte, and the first that is not in it
EVERYTHING = 1 << 62  # after any byte


def file_pieces(
    source: Source, chunk_bytes: int, span: Span, digests: InputDigests | None
) -> Generator[Piece, None, None]:
    """Pieces of a plain file: of the lines that begin in ``span``, or of all of it when it is one text."""
    size = source.size or 0
    with open(source.path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        stamp = stamp_of(source.path, descriptor, size)
        start, stop = 0, size
        if source.kind != "text":
            start, stop = (_line_start(descriptor, position, size) for position in span)
            if start >= stop and size:
                return  # no line begins here
        if digests:
            digests.begin(source.label, start)
        for begin, end in _spans(descriptor, source.kind, chunk_bytes, (start, stop), size):
            if digests:
                digests.take_file(descriptor, end)
            refuse_changed(source.path, descriptor, stamp)
            yield Piece(
                source.path, source.kind, begin, end - begin, None, end - begin, 0 if begin == 0 else None, stamp
            )
        if digests:
            digests.end(whole=(start, stop) == (0, size))


def _spans(descriptor: int, kind: str, chunk_bytes: int, span: Span, size: int) -> Iterator[Span]:
    start, stop = span
    if kind == "text":
        yield span
        return
    while start < stop:
        end = min(stop, _after_newline(descriptor, start + chunk_bytes - 1, size))
        yield start, end
        start = end


def _line_start(descriptor: int, position: int, size: int) -> int:
    """The first byte of the first line that begins at ``position`` or after it; ``size`` when none does."""
    return 0 if position <= 0 else size if position >= size else _after_newline(descriptor, position - 1, size)


def _after_newline(descriptor: int, position: int, size: int) -> int:
    """The byte after the first newline at ``position`` or after it; ``size`` when there is none."""
    while position < size:
        block = os.pread(descriptor, min(_SEEK_BYTES, size - position), position)
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        if not block:
            break  # shorter than it was: whoever reads the piece says so
        position += len(block)
    return size


def stream_pieces(source: Source, chunk_bytes: int, digests: InputDigests | None) -> Generator[Piece, None, None]:
    """Pieces with their data, of standard input, a pipe or a compressed file."""
    with opened(source) as file:
        stamp = stamp_of(source.path, file.fileno(), source.size) if source.size is not None else None
        counted = Counted(file, digests)
        if digests:
            digests.begin(source.label)
        piped = source.size is None
        at_a_time = min(BLOCK_BYTES, max(chunk_bytes, LEAST_BLOCK_BYTES))
        unpack = unpacked(counted, source.packing, source.label, sniff=piped, block_bytes=at_a_time)
        with closing(unpack) as blocks:
            start = lines = spent = 0
            for data in _whole(blocks) if source.kind == "text" else _lines(blocks, chunk_bytes):
                now, spent = counted.num_bytes - spent, counted.num_bytes
                yield Piece(source.label, source.kind, start, len(data), data, now, lines)
                start += len(data)
                lines += data.count(b"\n")
        if source.size is not None:
            refuse_changed(source.path, file.fileno(), stamp)
        if digests:
            digests.end()


def opened(source: Source) -> BinaryIO:
    """The input, opened; closing it leaves standard input's own object open."""
    if source.path != STDIN:
        return open(source.path, "rb")
    return _Borrowed(sys.stdin.buffer)  # type: ignore[return-value]


class _Borrowed:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read

    def __enter__(self) -> "_Borrowed":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Counted:
    """A file whose bytes are counted and digested as they are read; pyarrow takes it for one."""

    closed = False

    def __init__(self, file: BinaryIO, digests: InputDigests | None) -> None:
        self._file, self._digests, self.num_bytes = file, digests, 0

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer only at the end."""
        block = self._file.read(num_bytes)
        self.num_bytes += len(block)
        if self._digests:
            self._digests.take(block)
        return block


def _whole(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield b"".join(blocks)


def _lines(blocks: Iterator[bytes], chunk_bytes: int) -> Iterator[bytes]:
    """Whole lines, cut where a plain file of the same bytes would be."""
    held: list[bytes] = []
    size = 0  # of what is held
    for block in blocks:
        begin = 0
        while True:
            end = block.find(b"\n", begin + max(0, chunk_bytes - 1 - size)) + 1
            if not end:
                break
            yield b"".join([*held, block[begin:end]])
            held, size, begin = [], 0, end
        held.append(block[begin:])
        size += len(block) - begin
    if size:
        yield b"".join(held)
