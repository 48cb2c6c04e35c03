"""Records of a piece: JSON lines, lines, whole texts or rows. What is none is named with its place and reason."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading.columnar import rows_of
from megapatch.tools.preprocess.reading.json_lines import BadRecord, fast_loads, kind_of, loads, refuse_surrogates, utf8
from megapatch.tools.preprocess.reading.pieces import LineNumbers, Piece

__all__ = ["Bad", "BadRecord", "Records", "Tally", "place_of", "read_records", "text_of"]
T = TypeVar("T")
Take = Callable[[Any], T]
_BOM = b"\xef\xbb\xbf"
_MAX_TOLD = 10  # bad records kept per piece when their bytes are not wanted; the rest are only counted


@dataclass(frozen=True)
class Bad:
    """A bad record: line (row, from 1; 0 for a whole text) within the piece, byte within the content of the input
    (None for a row), reason, and its bytes without the line's end (rows: as JSON) when they were asked for."""

    line: int
    offset: int | None
    reason: str
    raw: bytes | None = None


@dataclass
class Tally:
    """What a piece held besides what was taken: ``num_lines`` (or rows; a text is one) = taken + blank + bad.

    ``bad`` has the first few of ``num_bad``, or all when their bytes were asked for; ``piece`` is without its data.
    """

    piece: Piece
    num_lines: int = 0
    num_blank: int = 0
    num_bad: int = 0
    bad: list[Bad] = field(default_factory=list)


@dataclass
class Records(Generic[T]):
    """What was taken of each good record, in order, and the tally of the piece."""

    taken: list[T]
    tally: Tally


def read_records(piece: Piece, take: Take[T], *, keep_raw: bool = False) -> Records[T]:
    """What ``take`` makes of each record of a piece: a JSON value, a row as dict, or {"text": ...} for lines and texts.

    ``take`` raises BadRecord for what is none, and may be asked twice about a line. ``keep_raw``: keep the bytes of
    all bad records.
    """
    made = _Reading(Records([], Tally(replace(piece, data=None))), take, keep_raw)
    made.read(piece)
    return made.records


class _Reading(Generic[T]):
    """Fills the records of one piece."""

    def __init__(self, records: Records[T], take: Take[T], keep_raw: bool) -> None:
        self.records, self.tally, self._take, self._keep_raw = records, records.tally, take, keep_raw

    def read(self, piece: Piece) -> None:
        """All records of the piece."""
        if piece.kind in ("parquet", "arrow"):
            self._rows(piece)
            return
        data = piece.read()
        base = piece.start
        if piece.start == 0 and data.startswith(_BOM):
            data, base = data[len(_BOM) :], len(_BOM)
        {"jsonl": self._json, "lines": self._plain, "text": self._text}[piece.kind](data, base)

    def _bad(self, line: int, offset: int | None, reason: str, raw: Callable[[], bytes]) -> None:
        self.tally.num_bad += 1
        if self._keep_raw:
            self.tally.bad.append(Bad(line, offset, reason, raw()))
        elif len(self.tally.bad) < _MAX_TOLD:
            self.tally.bad.append(Bad(line, offset, reason))

    def _text(self, data: bytes, base: int) -> None:
        self.tally.num_lines = 1
        try:
            self.records.taken.append(self._take({"text": utf8(data)}))
        except BadRecord as bad:
            self._bad(0, base + bad.offset, bad.reason, lambda: data)

    def _json(self, data: bytes, base: int) -> None:
        lines = _split(data)
        if base <= len(_BOM):
            _refuse_whole_array(self.tally.piece.path, lines)
        if fast_loads:
            self._each(lines, base, fast_loads, self._take, self._again)
        else:
            self._each(lines, base, self._again, lambda taken: taken, self._again)

    def _plain(self, data: bytes, base: int) -> None:
        lines = _split(data)

        def load(line: bytes) -> dict[str, str]:
            if not line.strip():
                raise ValueError
            return {"text": utf8(line.removesuffix(b"\r"))}

        self._each(lines, base, load, self._take, lambda line: self._take(load(line)))

    def _again(self, line: bytes) -> T:
        """What is taken of a line by the standard library's word; BadRecord has the exact place."""
        if not line.strip():
            raise ValueError("a blank line")
        taken = self._take(loads(line))
        if b"\\u" in line:
            refuse_surrogates(taken)
        return taken

    def _each(
        self,
        lines: list[bytes],
        base: int,
        load: Callable[[bytes], Any],
        take: Callable[[Any], T],
        again: Callable[[bytes], T],
    ) -> None:
        """Take every line; ``again`` decides where ``load`` fails. Only bad lines cost more than loading and taking."""
        taken = self.records.taken
        self.tally.num_lines = len(lines)
        offset, reached = base, 0  # of lines[reached]
        for number, line in enumerate(lines):
            try:
                taken.append(take(load(line)))
                continue
            except BadRecord as bad:
                found = bad
            except ValueError:
                if not line.strip():
                    self.tally.num_blank += 1
                    continue
                try:
                    taken.append(again(line))
                    continue
                except BadRecord as bad:
                    found = bad
            offset += sum(map(len, islice(lines, reached, number))) + number - reached
            reached = number
            self._bad(number + 1, offset + found.offset, found.reason, line.__bytes__)

    def _rows(self, piece: Piece) -> None:
        for batch in rows_of(piece):
            try:
                rows: Sequence[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [batch.slice(i, 1) for i in range(batch.num_rows)]
            for row in rows:
                self.tally.num_lines += 1
                try:
                    row = row if isinstance(row, dict) else _row(row)
                    self.records.taken.append(self._take(row))
                except BadRecord as bad:
                    self._bad(self.tally.num_lines, None, bad.reason, partial(_dump, row))


def _split(data: bytes) -> list[bytes]:
    """Lines without their newlines; what follows the last newline is none when it is empty."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _row(batch: Any) -> dict[str, Any]:
    """The one row of a batch; BadRecord when it is not UTF-8."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})") from None


def _dump(row: Any) -> bytes:
    """A row as JSON; bytes that are not UTF-8 as \\xff."""
    if not isinstance(row, dict):
        row = {name: _value(column) for name, column in zip(row.schema.names, row.columns, strict=True)}
    return json.dumps(row, ensure_ascii=False, default=repr).encode(errors="backslashreplace")


def _value(column: Any) -> Any:
    try:
        return column[0].as_py()
    except UnicodeDecodeError as error:
        return error.object.decode(errors="backslashreplace")


def _refuse_whole_array(label: str, lines: list[bytes]) -> None:
    """UserError when the first lines are the beginning of one JSON value that goes on over several lines."""
    first, second = (*islice((one.strip() for one in lines if one.strip()), 2), b"", b"")[:2]
    opens = first in (b"[", b"{", b"[{") and second and not _is_json(second)
    if opens or (first.startswith(b"[") and first.endswith(b",") and _is_json(first[:-1] + b"]")):
        raise UserError(
            f"{label}: one JSON value over several lines, expected JSON lines (an object a line); convert an array "
            "with: jq -c '.[]' FILE > FILE.jsonl"
        )


def _is_json(line: bytes) -> bool:
    try:
        loads(line)
    except BadRecord:
        return False
    return True


def text_of(keys: Sequence[str]) -> Take[tuple[str, ...]]:
    """A function from a record to the texts at ``keys``; BadRecord when one is missing or no string."""
    names = tuple(keys)

    def texts(value: Any) -> tuple[str, ...]:
        found = []
        for key in names:
            text = value.get(key) if type(value) is dict else None
            found.append(text if type(text) is str else _text_at(value, key))
        return tuple(found)

    def only(value: Any) -> tuple[str, ...]:
        if type(value) is dict and type(text := value.get(names[0])) is str:
            return (text,)
        return (_text_at(value, names[0]),)

    return only if len(names) == 1 else texts


def _text_at(value: Any, key: str) -> str:
    if not isinstance(value, dict):
        hint = "; if the whole file is one array, convert it: jq -c '.[]' FILE" if isinstance(value, list) else ""
        raise BadRecord(f"{kind_of(value)} found, expected an object with the key {key!r}{hint}")
    try:
        text = _at(value, key)
    except KeyError:
        keys = ", ".join(map(repr, list(value)[:8])) or "none"
        raise BadRecord(f"no key {key!r}; keys found: {keys}; choose with --text-key") from None
    if not isinstance(text, str):
        raise BadRecord(f"{key!r} is {kind_of(text)}, expected a string")
    return text


def _at(value: dict[str, Any], key: str) -> Any:
    """The value at a key, or at a path of keys with dots; the key as it stands comes first, or KeyError."""
    if key in value:
        return value[key]
    head, _, rest = key.partition(".")
    if rest and isinstance(value.get(head), dict):
        return _at(value[head], rest)
    raise KeyError(key)


def place_of(bad: Bad, piece: Piece, lines: LineNumbers) -> str:
    """Where a bad record is: FILE:LINE (byte N), FILE (row N), or FILE (byte N) for a whole text."""
    number = lines.before(piece) + bad.line if bad.line else 0
    if bad.offset is None:
        return f"{piece.path} (row {number})"
    return f"{piece.path}:{number} (byte {bad.offset})" if bad.line else f"{piece.path} (byte {bad.offset})"
