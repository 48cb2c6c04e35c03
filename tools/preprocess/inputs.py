"""The files, folders and streams named by --input, cut into pieces of bounded size in a fixed order."""

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from megapatch.models.cli import Common, UserError, opt

STDIN = "-"
_JSONL = (".jsonl", ".json", ".ndjson")
_UNPACK = {".gz": "zcat", ".zst": "zstdcat", ".xz": "xzcat", ".bz2": "bzcat"}
_MAX_PIECES = 1000  # per chunk, so that a million empty files do not make one task


@dataclass(frozen=True, kw_only=True)
class InputOptions(Common):
    """What to read."""

    input: list[str] = opt(
        "files to read, in this order; a folder needs --glob; - reads standard input", nargs="+", metavar="FILE"
    )
    glob: str = opt("files to take from the folders in --input, also in their subfolders, such as '*.py'", "")
    format: Literal["auto", "jsonl", "text"] = opt(
        "jsonl: a JSON object a line, a document each; text: a file is one document; "
        "auto: jsonl for names ending in .jsonl .json .ndjson and for standard input, else text",
        "auto",
    )
    json_key: str = opt("key of the text in each JSON object", "text", metavar="KEY")
    on_bad_input: Literal["fail", "skip"] = opt(
        "fail: stop at the first line or file that is not JSON, not UTF-8 or lacks the key, and write nothing; "
        "skip: leave it out, count it and say where it is",
        "fail",
    )


@dataclass(frozen=True)
class Source:
    """One input; ``size`` in bytes, None for a stream that cannot be read twice."""

    path: str
    jsonl: bool
    size: int | None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return "stdin" if self.path == STDIN else self.path


@dataclass(frozen=True)
class Piece:
    """Bytes [start, start + size) of an input: whole lines, or a whole text file; ``data`` only for streams."""

    path: str
    jsonl: bool
    start: int
    size: int
    data: bytes | None = None

    def read(self) -> bytes:
        """The bytes of the piece."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.start)
            while len(data) < self.size and (
                more := os.pread(file.fileno(), self.size - len(data), self.start + len(data))
            ):
                data += more  # Linux reads at most 2 GiB a call
        if len(data) != self.size:
            raise UserError(
                f"{self.path}: ends at byte {self.start + len(data):,}, was {self.start + self.size:,} or longer; "
                "it changed while it was read: run again when it is complete"
            )
        return data


Chunk = tuple[Piece, ...]


def find_sources(options: InputOptions) -> list[Source]:
    """Every input in order (files of a folder sorted by path); what cannot be read is a UserError."""
    if options.glob and not any(Path(name).is_dir() for name in options.input):
        raise UserError(f"--glob {options.glob}: no folder among --input {' '.join(options.input)}; leave --glob out")
    found = []
    for name in options.input:
        for path in _expand(name, options.glob):
            jsonl = options.format == "jsonl" if options.format != "auto" else path == STDIN or path.endswith(_JSONL)
            found.append(Source(path, jsonl, _size(path)))
    return found


def _expand(name: str, glob: str) -> list[str]:
    path = Path(name)
    if name == STDIN:
        return [STDIN]
    if path.is_dir():
        if not glob:
            raise UserError(f"{name}: is a folder; say which of its files with --glob, such as --glob '*.txt'")
        names = sorted(str(one) for one in path.rglob(glob) if one.is_file())
        if not names:
            raise UserError(f"{name}: holds no file that matches --glob {glob}")
        return names
    if not path.exists():
        raise UserError(f"{name}: no such file; expected a file, a folder with --glob, or - for standard input")
    if tool := _UNPACK.get(path.suffix):
        raise UserError(f"{name}: is compressed; unpack it on the way: {tool} {name} | ... --input -")
    return [name]


def _size(path: str) -> int | None:
    if path == STDIN:
        return None
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def total_bytes(sources: list[Source]) -> int | None:
    """Bytes of all inputs together, None when one is a stream."""
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def chunks(sources: list[Source], chunk_bytes: int) -> Iterator[Chunk]:
    """All pieces in order, in groups of about ``chunk_bytes``."""
    group: list[Piece] = []
    size = 0
    for source in sources:
        for piece in _pieces(source, chunk_bytes):
            group.append(piece)
            size += piece.size
            if size >= chunk_bytes or len(group) >= _MAX_PIECES:
                yield tuple(group)
                group, size = [], 0
    if group:
        yield tuple(group)


def _pieces(source: Source, chunk_bytes: int) -> Iterator[Piece]:
    if source.size is None:
        yield from _stream_pieces(source, chunk_bytes)
    elif not source.jsonl:
        yield Piece(source.path, False, 0, source.size)
    else:
        start = 0
        with open(source.path, "rb") as file:
            while start < source.size:
                end = _line_end(file, start + chunk_bytes, source.size)
                yield Piece(source.path, True, start, end - start)
                start = end


def _line_end(file: BinaryIO, position: int, size: int) -> int:
    """The first end of a line after ``position``, or ``size``."""
    if position >= size:
        return size
    file.seek(position)
    return min(size, position + len(file.readline()))


def _stream_pieces(source: Source, chunk_bytes: int) -> Iterator[Piece]:
    file = sys.stdin.buffer if source.path == STDIN else open(source.path, "rb")
    if not source.jsonl:
        data = file.read()
        yield Piece(source.label, False, 0, len(data), data)
        return
    start, rest = 0, b""
    while block := file.read(chunk_bytes):
        rest += block
        if cut := rest.rfind(b"\n") + 1:
            yield Piece(source.label, True, start, cut, rest[:cut])
            start, rest = start + cut, rest[cut:]
    if rest:
        yield Piece(source.label, True, start, len(rest), rest)
