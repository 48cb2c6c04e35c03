"""What a copy puts into the target, in order and in pieces of bounded size, whatever the copy does to its source.

A range of bytes goes through one buffer. Rows with gaps between them are read in bands, gaps and all, while a gap is
cheaper than a system call (measured: 16 KiB), else one by one. A transposed copy is made in bands of target rows, from
square-like tiles of the source. Casts and block scales are applied to tiles that stay in the processor's cache.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megapatch.models.cli import UserError
from megapatch.models.commit import naming
from megapatch.models.open_files import OpenFiles
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert import casts
from megapatch.tools.convert.plan import Copy, Delta, LowRank, Part, Scale

if TYPE_CHECKING:
    from numpy import ndarray

BUFFER_BYTES = 2 << 20
BAND_BYTES = 16 << 20  # of a transposed copy's target
_GAP_BYTES = 16 << 10
_COMPUTED_BYTES = 8  # an item with its float32 intermediate


class Tile(NamedTuple):
    """Rows [row, row + rows) and columns [column, column + columns) of a copy, as they lie in its source."""

    row: int
    rows: int
    column: int
    columns: int


def tiles(copy: Copy, most_items: int) -> Iterator[Tile]:
    """The copy cut into tiles of at most ``most_items`` items which, in this order, fill the target's range."""
    outer, inner = copy.stored[::-1] if copy.transposed else copy.stored
    high, wide = max(1, most_items // max(1, inner)), max(1, min(inner, most_items))
    for top in range(0, outer, high):
        for left in range(0, inner, wide):
            a, b = (top, min(high, outer - top)), (left, min(wide, inner - left))
            yield Tile(*b, *a) if copy.transposed else Tile(*a, *b)


def _overlaps(copy: Copy, tile: Tile) -> Iterator[tuple[Part, tuple[int, int], slice, slice]]:
    """What a tile has of each part: the row and column where that begins in the part; rows, columns in the tile."""
    for part, top, left in copy.places():
        row, last = max(tile.row, top), min(tile.row + tile.rows, top + copy.rows)
        column, end = max(tile.column, left), min(tile.column + tile.columns, left + part.items)
        if row < last and column < end:
            rows, columns = slice(row - tile.row, last - tile.row), slice(column - tile.column, end - tile.column)
            yield part, (row - top, column - left), rows, columns


def flattened(copy: Copy) -> Copy:
    """The same copy as one row, where it is a mere range of its only source."""
    (first, *others) = copy.parts
    if others or copy.transposed or copy.computed or _pitch(first, copy.read) != first.items * ITEM_BYTES[copy.read]:
        return copy
    return copy._replace(rows=1, parts=(first._replace(items=copy.rows * first.items, pitch=0),))


def _pitch(part: Part, dtype: str) -> int:
    return part.pitch or part.items * ITEM_BYTES[dtype]


class Reader:
    """Reads copies for one thread, with buffers that it uses again: a piece holds until the next is asked for."""

    def __init__(self, sources: OpenFiles) -> None:
        self.sources = sources
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._band: ndarray | None = None
        self._low: tuple[LowRank, ndarray, ndarray] | None = None  # the adapters used last

    def content(self, copy: Copy) -> Iterator[memoryview]:
        """The bytes of the target's range."""
        copy = flattened(copy)
        if copy.rows == 1 and len(copy.parts) == 1 and copy.read == copy.write and not copy.computed:
            yield from self._range(copy.parts[0].source, copy.parts[0].offset, copy.size)
        elif copy.transposed:
            for band in tiles(copy, BAND_BYTES // ITEM_BYTES[copy.write]):
                yield self._transposed(copy, band).data.cast("B")
        else:
            for tile in tiles(copy, _most_items(copy)):
                yield self._values(copy, tile).data.cast("B")

    def _range(self, path: Path, offset: int, count: int) -> Iterator[memoryview]:
        file = self.sources[path].fileno()
        for at in range(0, count, len(self._buffer)):
            view = self._buffer[: min(len(self._buffer), count - at)]
            read(file, path, view, offset + at)
            yield view

    def _transposed(self, copy: Copy, band: Tile) -> "ndarray":
        """Columns of the source as rows: stored numbers [columns, rows]."""
        import numpy as np

        if self._band is None:
            self._band = np.empty(BAND_BYTES, np.uint8)
        item = ITEM_BYTES[copy.write]
        made = self._band[: band.columns * band.rows * item].view(f"u{item}").reshape(band.columns, band.rows)
        high = max(1, _most_items(copy) // band.columns)
        for row in range(0, band.rows, high):
            rows = min(high, band.rows - row)
            made[:, row : row + rows] = self._values(copy, band._replace(row=band.row + row, rows=rows)).T
        return made

    def _values(self, copy: Copy, tile: Tile) -> "ndarray":
        """The numbers of a tile as the target stores them, [rows, columns]."""
        bits = casts.stored(self._raw(copy, tile), copy.read)
        if not copy.computed:
            return casts.cast(bits, copy.read, copy.write)
        values = casts.to_float32(bits, copy.read)
        if copy.scale is not None:
            self._multiply(values, copy.scale, tile)
        for part, place, rows, columns in _overlaps(copy, tile):
            if part.delta is not None:
                self._add(values[rows, columns], part.delta, *place)
        return casts.from_float32(values, copy.write)

    def _raw(self, copy: Copy, tile: Tile) -> "ndarray":
        """The bytes of a tile, [rows, columns * item]."""
        import numpy as np

        item = ITEM_BYTES[copy.read]
        made = np.empty((tile.rows, tile.columns * item), np.uint8)
        for part, (row, column), rows, columns in _overlaps(copy, tile):
            pitch = _pitch(part, copy.read)
            into = made[rows, columns.start * item : columns.stop * item]
            self._fill(into, part.source, part.offset + row * pitch + column * item, pitch)
        return made

    def _fill(self, into: "ndarray", path: Path, offset: int, pitch: int) -> None:
        """Fill ``into`` [rows, width] with rows that start ``pitch`` bytes apart."""
        import numpy as np

        file, (rows, width) = self.sources[path].fileno(), into.shape
        if into.flags.c_contiguous and pitch == width:
            read(file, path, into.reshape(-1).data, offset)
        elif pitch - width > _GAP_BYTES or pitch > len(self._buffer) or rows == 1:
            for row in range(rows):
                read(file, path, into[row].data, offset + row * pitch)
        else:
            step = len(self._buffer) // pitch
            for row in range(0, rows, step):
                count = min(step, rows - row)
                band = self._buffer[: (count - 1) * pitch + width]
                read(file, path, band, offset + row * pitch)
                into[row : row + count] = np.ndarray((count, width), np.uint8, band, 0, (pitch, 1))

    def _multiply(self, values: "ndarray", scale: Scale, tile: Tile) -> None:
        """Multiply float32 values [rows, columns] by their blocks' scales, in place."""
        import numpy as np

        top, left = scale.row + tile.row, scale.column + tile.column
        first, last = top // scale.rows, (top + tile.rows - 1) // scale.rows
        raw = np.empty((last - first + 1, scale.width * ITEM_BYTES[scale.dtype]), np.uint8)
        self._fill(raw, scale.source, scale.offset + first * raw.shape[1], raw.shape[1])
        scales = casts.to_float32(casts.stored(raw, scale.dtype), scale.dtype)
        blocks = (left + np.arange(tile.columns)) // scale.columns
        for number in range(first, last + 1):
            start, end = max(0, number * scale.rows - top), (number + 1) * scale.rows - top
            values[start:end] *= scales[number - first].take(blocks)

    def _add(self, stored: "ndarray", delta: Delta, row: int, column: int) -> None:
        """Add what adapters say to float32 values that are stored from this row and column of the part; in place."""
        low, a, b = self._factors(delta.low)
        values = stored.T if delta.turned else stored
        place = (delta.row + row, delta.column + column)
        top, left = place[::-1] if delta.turned else place
        rows, columns = values.shape
        for part, first, last in low.spans(top, top + rows):
            its = a[part * low.rank : (part + 1) * low.rank, left : left + columns]
            values[first - top : last - top] += (b[first:last] @ its) * casts.float32(low.scale)

    def _factors(self, low: LowRank) -> "tuple[LowRank, ndarray, ndarray]":
        """The adapters as float32: A [parts*rank, in], B [out, rank]."""
        import numpy as np

        if self._low is None or self._low[0] is not low:
            whole = (b"".join(bytes(piece) for copy in copies for piece in self.content(copy)) for copies in low[1:3])
            a, b = (np.frombuffer(data, np.float32) for data in whole)
            rows = sum(count for _, count in low.runs)
            parts = 1 + max(part for part, _ in low.runs)
            self._low = (low, a.reshape(parts * low.rank, -1), b.reshape(rows, low.rank))
        return self._low


def _most_items(copy: Copy) -> int:
    computed = copy.read != copy.write or copy.computed
    return BUFFER_BYTES // (_COMPUTED_BYTES if computed else ITEM_BYTES[copy.read])


def read(file: int, path: Path, view: memoryview, offset: int) -> None:
    """Fill ``view`` with the bytes of an open file from ``offset``; a file that ends before is a UserError."""
    done = 0
    while done < len(view):
        with naming(path):
            moved = os.preadv(file, [view[done:]], offset + done)
        if moved == 0:
            raise UserError(f"{path}: became shorter while it was copied; run again")
        done += moved
