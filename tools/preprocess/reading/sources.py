"""The files, folders and streams named by --input, in a fixed order, and what each of them holds."""

import glob
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megapatch.models.cli import Common, UserError, opt

STDIN = "-"
QUARANTINE = "quarantine="
_HEAD_BYTES = 256
_MAX_LINE_BYTES = 64 << 20
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
COLUMNAR = ("parquet", "arrow")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Common):
    """What to read, and what becomes of lines that cannot be read."""

    input: list[str] = opt(
        "files to read, in this order; a quoted pattern such as 'data/*.jsonl.gz' is expanded and sorted; "
        "a folder needs --glob; - reads standard input",
        nargs="+",
        metavar="FILE",
    )
    glob: str = opt("files to take from the folders in --input, also in their subfolders, such as '*.py'", "")
    format: Literal["auto", "jsonl", "text", "lines", "parquet", "arrow"] = opt(
        "jsonl: a JSON object a line, a document each; text: a file is one document; lines: a line is one document; "
        "parquet, arrow (both of its formats, also .feather): a row is one document; "
        "auto: by name, jsonl for .jsonl .json .ndjson and standard input, text for names of no format. "
        "jsonl, text and lines may be compressed (.gz .zst .xz .bz2; standard input is recognised by its first bytes). "
        "A UTF-8 byte-order mark at the start of a file is no text",
        "auto",
    )
    on_bad_line: str = opt(
        "what to do with a line, row or text file that is not JSON, not UTF-8 or lacks the key: "
        "fail: stop at the first and write nothing; skip: leave it out, count it and say where it is; "
        "quarantine=FILE: as skip, and keep it in FILE with its place and reason",
        "fail",
        metavar="fail|skip|quarantine=FILE",
    )
    shards: int = opt("parts into which the input is cut, one for each process of a job array", 1, metavar="N")
    shard: Optional[int] = opt(
        "the part for this process, from 0 to N - 1; the parts' outputs merged in order are the undivided output",
        None,
        metavar="I",
    )

    def __post_init__(self) -> None:
        if self.on_bad_line not in ("fail", "skip") and not self.on_bad_line.removeprefix(QUARANTINE).strip():
            raise ValueError(f"--on-bad-line {self.on_bad_line}: expected a file name after {QUARANTINE}")
        if self.on_bad_line not in ("fail", "skip") and not self.on_bad_line.startswith(QUARANTINE):
            raise ValueError(f"--on-bad-line {self.on_bad_line}: expected fail, skip or {QUARANTINE}FILE")
        if self.shards < 1:
            raise ValueError(f"--shards {self.shards}: expected 1 or more")
        if self.shards > 1 and self.shard is None:
            raise ValueError(f"--shards {self.shards} needs --shard, from 0 to {self.shards - 1}")
        if self.shard is not None and not 0 <= self.shard < self.shards:
            raise ValueError(f"--shard {self.shard}: expected 0 to {self.shards - 1}, as --shards is {self.shards}")

    @property
    def part(self) -> tuple[int, int]:
        """(--shard, --shards), as `chunks` takes it."""
        return self.shard or 0, self.shards

    @property
    def quarantine(self) -> Path | None:
        """Where bad lines are kept, if they are."""
        named = self.on_bad_line.removeprefix(QUARANTINE)
        return None if named == self.on_bad_line else Path(named)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of parquet and arrow files that are read, all if empty; overridden where others are needed."""
        return ()


@dataclass(frozen=True, kw_only=True)
class InputOptions(SourceOptions):
    """What to read as text."""

    text_key: list[str] = opt(
        "keys of the text in each JSON object, or columns; 'meta.text' also looks into objects, after a key of just "
        "that name; several keys give an output each",
        ["text"],
        nargs="+",
        metavar="KEY",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.text_key)) < len(self.text_key) or not all(self.text_key):
            raise ValueError(f"--text-key {' '.join(self.text_key)}: one is empty or named twice")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns with text."""
        return tuple(self.text_key)


@dataclass(frozen=True)
class Source:
    """One input: ``kind`` is what it holds (never 'auto'), ``packing`` how it is compressed ('' if it is not).

    ``size`` in bytes, None for a stream that cannot be read twice; ``columns`` wanted of it, all if empty.
    """

    path: str
    kind: str
    size: int | None
    packing: str = ""
    columns: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in messages."""
        return "stdin" if self.path == STDIN else self.path


def find_sources(options: SourceOptions) -> list[Source]:
    """Every input in order (files of a folder or pattern sorted by path); what cannot be read is a UserError."""
    if options.glob and not any(Path(name).is_dir() for name in options.input):
        raise UserError(f"--glob {options.glob}: no folder among --input {' '.join(options.input)}; leave --glob out")
    paths = [path for name in options.input for path in _expand(name, options.glob)]
    if paths.count(STDIN) > 1:
        raise UserError("--input -: standard input is named twice; it can be read once")
    sources = [_source(path, options) for path in paths]
    if options.shards > 1:
        refuse_streams(sources)
    if isinstance(options, InputOptions):
        _refuse_keys_of_plain_text(sources, options.text_key)
    return sources


def _expand(name: str, pattern: str) -> Iterable[str]:
    path = Path(name)
    if name == STDIN:
        return [STDIN]
    if path.is_dir():
        if not pattern:
            raise UserError(f"{name}: is a folder; say which of its files with --glob, such as --glob '*.txt'")
        names = sorted(str(one) for one in path.rglob(pattern) if one.is_file())
        if not names:
            raise UserError(f"{name}: holds no file that matches --glob {pattern}")
        return names
    if path.exists():
        return [name]
    if glob.has_magic(name):
        names = sorted(one for one in glob.glob(name, recursive=True) if os.path.isfile(one))
        if names:
            return names
        raise UserError(f"--input {name}: matches no file; expected one or more")
    raise UserError(f"{name}: no such file; expected a file, a pattern, a folder with --glob, or - for standard input")


def _source(path: str, options: SourceOptions) -> Source:
    stem, suffix = os.path.splitext(path)
    packing = PACKINGS.get(suffix, "")
    named = _KINDS.get(os.path.splitext(stem)[1] if packing else suffix, "text")
    kind = options.format if options.format != "auto" else "jsonl" if path == STDIN else named
    if packing and kind in COLUMNAR:
        raise UserError(f"{path}: {packing} around {kind}, which compresses by itself; unpack it first")
    size = _size(path)
    if options.format == "auto" and kind == "text" and size and not packing:
        _refuse_json(path)
    if size is None and kind == "parquet":
        raise UserError(f"{'stdin' if path == STDIN else path}: parquet is read from its end; give a file")
    return Source(path, kind, size, packing, options.columns if kind in COLUMNAR else ())


def _refuse_json(path: str) -> None:
    """A file that is text by its name alone must not begin with a line of JSON lines."""
    with open(path, "rb") as file:
        if not file.read(_HEAD_BYTES).lstrip().startswith(b"{"):
            return
        file.seek(0)
        line = file.read(_MAX_LINE_BYTES).lstrip().split(b"\n", 1)[0]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # among them: not UTF-8
        return
    if isinstance(value, dict):
        raise UserError(
            f"{path}: text by its name, but its first line is a JSON object; say --format jsonl, or --format text if "
            "the whole file is one document"
        )


def _size(path: str) -> int | None:
    if path == STDIN:
        return None
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def refuse_streams(sources: list[Source]) -> None:
    """A stream cannot be divided among processes."""
    for source in sources:
        if source.size is None:
            raise UserError(
                f"{source.label}: a stream cannot be divided by --shards; give files, or leave --shards out"
            )


def _refuse_keys_of_plain_text(sources: list[Source], keys: list[str]) -> None:
    for source in sources:
        if source.kind in ("text", "lines") and keys != ["text"]:
            raise UserError(
                f"{source.label}: {source.kind} has no keys, --text-key asks for {', '.join(keys)}; say --format jsonl "
                "if it is JSON lines, or leave --text-key out"
            )


def total_bytes(sources: list[Source]) -> int | None:
    """Bytes of all inputs together, None when one is a stream."""
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)
