"""Documents from bytes: JSON lines or a whole text file. What is not a document is named with its place."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megapatch.tools.preprocess.inputs import Piece

_fast_loads: Callable[[bytes], Any] | None
try:
    from orjson import loads as _fast_loads
except ImportError:  # extra `data` is not installed; the standard library decides in any case, see parse_line
    _fast_loads = None

_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
_MAX_TOLD = 10  # bad records kept per piece; the rest are only counted


class BadRecord(ValueError):
    """Why a line or file is no document, and at which of its bytes."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason, offset)
        self.reason, self.offset = reason, offset


@dataclass(frozen=True)
class Bad:
    """A bad record: line within the piece (from 1; 0 for a text file), byte within the file, reason."""

    line: int
    offset: int
    reason: str


@dataclass
class Tally:
    """What a piece held besides its documents; ``bad`` has the first few of ``num_bad``."""

    piece: Piece
    num_lines: int = 0
    num_blank: int = 0
    num_bad: int = 0
    bad: list[Bad] = field(default_factory=list)

    def add_bad(self, line: int, offset: int, reason: str) -> None:
        """Count a bad record, and keep it when it is among the first."""
        self.num_bad += 1
        if len(self.bad) < _MAX_TOLD:
            self.bad.append(Bad(line, offset, reason))


def read_documents(piece: Piece, key: str) -> tuple[list[str], Tally]:
    """The texts of a piece in order, and what else was in it."""
    data = piece.read()
    tally = Tally(Piece(piece.path, piece.jsonl, piece.start, piece.size))  # without the data: it may cross a pipe
    texts = _read_lines(data, key, tally) if piece.jsonl else _read_text(data, tally)
    return texts, tally


def _read_text(data: bytes, tally: Tally) -> list[str]:
    try:
        return [_utf8(data)]
    except BadRecord as bad:
        tally.add_bad(0, bad.offset, bad.reason)
        return []


def _read_lines(data: bytes, key: str, tally: Tally) -> list[str]:
    texts = []
    start = tally.piece.start
    for line in data.split(b"\n"):
        if not start < tally.piece.start + len(data):
            break  # what follows the last newline is no line
        tally.num_lines += 1
        try:
            if line.strip():
                texts.append(parse_line(line, key))
            else:
                tally.num_blank += 1
        except BadRecord as bad:
            tally.add_bad(tally.num_lines, start + bad.offset, bad.reason)
        start += len(line) + 1
    return texts


def parse_line(line: bytes, key: str) -> str:
    """The text of a JSON line; the same with and without orjson, which only answers first where it can."""
    value = _load(line)
    if not isinstance(value, dict):
        raise BadRecord(f"{_kind(value)} found, expected an object with the key {key!r}")
    if key not in value:
        keys = ", ".join(map(repr, list(value)[:8])) or "none"
        raise BadRecord(f"no key {key!r}; keys found: {keys}; choose with --json-key")
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"{key!r} is {_kind(text)}, expected a string")
    if b"\\u" in line:
        _refuse_surrogates(text)
    return text


def _load(line: bytes) -> Any:
    if _fast_loads is not None:
        try:
            return _fast_loads(line)
        except ValueError:
            pass  # orjson also refuses what JSON allows; and the message below is exact
    text = _utf8(line)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg})", len(text[: error.pos].encode())) from None
    except RecursionError:
        raise BadRecord("not JSON that can be read (nested too deeply)") from None


def _refuse_constant(name: str) -> None:
    raise BadRecord(f"not JSON ({name} is not a JSON value)")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float)  # float: integers of any length


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte 0x{data[error.start]:02x}: {error.reason})", error.start) from None


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord(f"lone surrogate {found}, half of a character; UTF-8 cannot hold it") from None


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
