"""A conversion as a list: every byte of every target file, and where it comes from. Nothing is read or written here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from megapatch.models.torch_save import ITEM_BYTES

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # --dtype


class Literal(NamedTuple):
    """Bytes known beforehand: headers, indices."""

    file: str
    offset: int
    data: bytes

    @property
    def size(self) -> int:
        """Bytes in the target."""
        return len(self.data)

    def line(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"file": self.file, "offset": self.offset, "bytes": self.size, "from": "header"}


class Scale(NamedTuple):
    """Block scales of a quantised tensor: item (r, c) of the copy is multiplied by scale[r // rows, c // columns].

    ``offset`` is that of the scale of the tensor's first block; (row, column) is the place of the copy's first item in
    the tensor, ``width`` the number of scales in a row of blocks.
    """

    source: Path
    offset: int
    dtype: str
    width: int
    row: int
    column: int
    rows: int = 128
    columns: int = 128


class LowRank(NamedTuple):
    """What adapters add to a core weight: ``scale`` x B A. ``a`` [parts*rank, in] and ``b`` [out, rank] are copies to
    float32; ``runs`` are the rows of the weight from the first: (place of their part in ``a``, -1: none; how many)."""

    name: str
    a: tuple["Copy", ...]
    b: tuple["Copy", ...]
    rank: int
    scale: float
    runs: tuple[tuple[int, int], ...]

    def spans(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(part, first row, last row + 1) for the rows from ``first`` to ``last`` - 1 that have an adapter."""
        row = 0
        for part, rows in self.runs:
            low, high = max(first, row), min(last, row + rows)
            if part >= 0 and low < high:
                yield part, low, high
            row += rows


class Delta(NamedTuple):
    """What adapters add to a part, whose first item is at a place in the weight; ``turned``: its columns are stored."""

    low: LowRank
    row: int  # of what is stored
    column: int
    turned: bool

    def identity(self) -> tuple[Any, ...]:
        """What decides the numbers, beside the content of the files."""
        return (*self[1:], self.low.name, self.low.rank, self.low.scale)

    def sources(self) -> set[Path]:
        """The files with the adapters."""
        return {part.source for copy in (*self.low.a, *self.low.b) for part in copy.parts}


class Part(NamedTuple):
    """Rows of ``items`` items each in ``source``: the first at byte ``offset``, the next ``pitch`` bytes later, ..."""

    source: Path
    offset: int
    items: int
    pitch: int = 0  # 0: one row right after the other
    delta: Delta | None = None  # what is added to it


class Copy(NamedTuple):
    """A range of a target file: ``rows`` rows, each made of one row of every part.

    Almost always one row of one part: a range of bytes. Items are of dtype ``read`` in the sources and ``write`` in
    the target. The parts of a ``transposed`` copy, all of ``rows`` rows and equal width, lie one below the other, not
    side by side: the columns of that stack are written as rows.
    """

    name: str  # of the tensor, or of a file copied whole
    file: str
    offset: int
    parts: tuple[Part, ...]
    rows: int = 1
    read: str = "uint8"
    write: str = "uint8"
    transposed: bool = False
    scale: Scale | None = None

    @property
    def computed(self) -> bool:
        """Whether numbers are computed with, not only cast."""
        return self.scale is not None or self.deltas != []

    @property
    def deltas(self) -> list[Delta]:
        """What is added to its parts."""
        return [part.delta for part in self.parts if part.delta]

    @property
    def items(self) -> int:
        """Items of a row."""
        return sum(part.items for part in self.parts)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the parts together, as they are stored."""
        return (self.rows * len(self.parts), self.parts[0].items) if self.transposed else (self.rows, self.items)

    def places(self) -> Iterator[tuple[Part, int, int]]:
        """Each part, and the row and the column where it starts among them."""
        column = 0
        for n, part in enumerate(self.parts):
            yield (part, n * self.rows, 0) if self.transposed else (part, 0, column)
            column += part.items

    @property
    def size(self) -> int:
        """Bytes in the target."""
        return self.rows * self.items * ITEM_BYTES[self.write]

    def line(self) -> dict[str, Any]:
        """As a JSON object."""
        said: dict[str, Any] = {"file": self.file, "offset": self.offset, "bytes": self.size, "tensor": self.name}
        origin: list[dict[str, Any]] = [{"file": str(part.source), "offset": part.offset} for part in self.parts]
        if len(origin) > 1 or self.parts[0].pitch or self.transposed:
            said["rows"] = self.rows
            for part, place in zip(self.parts, origin, strict=True):
                place["row_bytes"] = part.items * ITEM_BYTES[self.read]
                place |= {"pitch": part.pitch} if part.pitch else {}
        said["from"] = origin if len(origin) > 1 else origin[0]
        said |= {"transposed": True} if self.transposed else {}
        said |= {"scale": {"file": str(self.scale.source), "offset": self.scale.offset}} if self.scale else {}
        said |= {"adds": self.deltas[0].low.name} if self.deltas else {}
        return said | ({"cast": [self.read, self.write]} if self.read != self.write else {})


Entry = Literal | Copy


@dataclass
class Plan:
    """What goes where, in the order of the files and their bytes; ``notes`` are for the user."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_file(self, path: Path, name: str) -> None:
        """A file copied whole."""
        self.entries.append(Copy(path.name, name, 0, (Part(path, 0, path.stat().st_size),)))

    def finish(self) -> "Plan":
        """This plan in order; a byte named twice or not at all is a broken invariant."""
        self.entries.sort(key=lambda entry: (entry.file, entry.offset))
        for file, entries in self.files().items():
            at = 0
            for entry in entries:
                assert entry.offset == at, f"{file}: byte {min(at, entry.offset)} is not named once"
                at += entry.size
        return self

    def files(self) -> dict[str, list[Entry]]:
        """The entries of each target file."""
        return {file: list(entries) for file, entries in groupby(self.entries, key=lambda entry: entry.file)}

    def lines(self) -> Iterator[dict[str, Any]]:
        """The plan as JSON objects, one for each range."""
        return (entry.line() for entry in self.entries)
