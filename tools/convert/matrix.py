"""Matrices that lie in pieces in files: taken apart, stacked and turned on paper, then copied.

Every conversion is one such rearrangement. A source gives each core weight as a Matrix; a target takes parts of it.
Tensors of more axes count as [first axis, all others], tensors of one axis as a column.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import NamedTuple

from megapatch.models.cli import UserError
from megapatch.models.cuts import Region
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import Copy, Delta, Part, Scale


class Rectangle(NamedTuple):
    """``rows`` x ``columns`` items at (row, column) of a matrix, and where they are stored: row after row, the first
    item at byte ``offset``, rows ``pitch`` bytes apart; column after column, ``pitch`` apart, where ``turned``."""

    row: int
    column: int
    rows: int
    columns: int
    dtype: str
    source: Path
    offset: int
    pitch: int
    turned: bool = False
    scale: Scale | None = None
    delta: Delta | None = None

    def within(self, region: Region) -> "Rectangle | None":
        """What of it lies in a region, placed as the region's corner were the origin; None: nothing."""
        row, column = max(self.row, region.row), max(self.column, region.column)
        rows = min(self.row + self.rows, region.row + region.rows) - row
        columns = min(self.column + self.columns, region.column + region.columns) - column
        if rows <= 0 or columns <= 0:
            return None
        down, right = row - self.row, column - self.column
        steps = (right, down) if self.turned else (down, right)
        scale = self.scale and self.scale._replace(row=self.scale.row + down, column=self.scale.column + right)
        delta = self.delta and self.delta._replace(row=self.delta.row + steps[0], column=self.delta.column + steps[1])
        return self._replace(
            row=row - region.row,
            column=column - region.column,
            rows=rows,
            columns=columns,
            offset=self.offset + steps[0] * self.pitch + steps[1] * ITEM_BYTES[self.dtype],
            scale=scale,
            delta=delta,
        )

    def transposed(self) -> "Rectangle":
        """Its place and shape in the transposed matrix."""
        assert self.scale is None, f"{self.source}: block scales of a transposed tensor"
        return self._replace(
            row=self.column, column=self.row, rows=self.columns, columns=self.rows, turned=not self.turned
        )


@dataclass(frozen=True)
class Matrix:
    """``rows`` x ``columns`` items, tiled by rectangles; ``origin`` says in errors whose they are."""

    origin: str
    rows: int
    columns: int
    rectangles: tuple[Rectangle, ...]

    @property
    def dtypes(self) -> list[str]:
        """The types of its items as stored."""
        return sorted({rectangle.dtype for rectangle in self.rectangles})

    def take(self, regions: Sequence[Region]) -> "Matrix":
        """These regions of equal width, one below the other."""
        return stack(self.origin, [self._part(region) for region in regions])

    def _part(self, region: Region) -> "Matrix":
        if region == (0, 0, self.rows, self.columns):
            return self
        found = (rectangle.within(region) for rectangle in self.rectangles)
        return Matrix(self.origin, region.rows, region.columns, tuple(r for r in found if r))

    def transposed(self) -> "Matrix":
        """Rows as columns."""
        turned = tuple(rectangle.transposed() for rectangle in self.rectangles)
        return Matrix(self.origin, self.columns, self.rows, turned)

    def copies(self, name: str, file: str, offset: int, dtype: str) -> Iterator[Copy]:
        """The ranges that write it row after row from byte ``offset`` of ``file``; gaps are a UserError."""
        return _joined(self._copies(name, file, offset, dtype))

    def _copies(self, name: str, file: str, offset: int, dtype: str) -> Iterator[Copy]:
        for row, end, across in self._bands():
            edges = list(itertools.accumulate((r.columns for r in across), initial=0))
            if [r.column for r in across] != edges[:-1] or edges[-1] != self.columns:
                raise UserError(
                    f"{self.origin} leave a part of it out, or overlap, at row {row}; the checkpoint is incomplete"
                )
            cut = [r.within(Region(row, r.column, end - row, r.columns)) for r in across]
            copy = _copy(name, file, offset, [r for r in cut if r], dtype)
            yield copy
            offset += copy.size

    def _bands(self) -> Iterator[tuple[int, int, list[Rectangle]]]:
        """(first row, end, rectangles from left to right) of bands of rows in which the same rectangles lie."""
        waiting = sorted(self.rectangles, key=lambda r: r.row, reverse=True)
        edges = {0, self.rows} | {edge for r in waiting for edge in (r.row, r.row + r.rows)}
        active: list[Rectangle] = []
        for row, end in itertools.pairwise(sorted(edges)):
            active = [r for r in active if r.row + r.rows > row]
            while waiting and waiting[-1].row <= row:
                active.append(waiting.pop())
            yield row, end, sorted(active, key=lambda r: r.column)


def stack(origin: str, parts: Sequence[Matrix]) -> Matrix:
    """Matrices of equal width, one below the other."""
    if len(parts) == 1:
        return parts[0]
    found, row = [], 0
    for part in parts:
        found += [r._replace(row=r.row + row) for r in part.rectangles]
        row += part.rows
    return Matrix(origin, row, parts[0].columns, tuple(found))


def _copy(name: str, file: str, offset: int, across: Sequence[Rectangle], dtype: str) -> Copy:
    """One band: rectangles of equal height, side by side."""
    first = across[0]
    if any((r.turned, r.dtype) != (first.turned, first.dtype) for r in across):
        raise UserError(f"{name}: pieces of different types side by side ({first.source}); save it in one type")
    height = gcd(*(r.columns for r in across)) if first.turned else first.rows
    parts = tuple(part for r in across for part in _parts(r, height))
    if len(parts) == 1 and not (parts[0].pitch or first.turned or first.scale or first.delta):
        parts, height = (parts[0]._replace(items=parts[0].items * height),), 1
    return Copy(name, file, offset, parts, height, first.dtype, dtype, first.turned, first.scale)


def _parts(rectangle: Rectangle, height: int) -> Iterator[Part]:
    """The stored rows, ``height`` at a time."""
    rows, items = (rectangle.columns, rectangle.rows) if rectangle.turned else (rectangle.rows, rectangle.columns)
    gapless = rectangle.pitch == items * ITEM_BYTES[rectangle.dtype] or height == 1
    for row in range(0, rows, height):
        at = rectangle.offset + row * rectangle.pitch
        delta = rectangle.delta and rectangle.delta._replace(row=rectangle.delta.row + row)
        yield Part(rectangle.source, at, items, 0 if gapless else rectangle.pitch, delta)


def _joined(copies: Iterable[Copy]) -> Iterator[Copy]:
    """The same, with ranges that follow each other in the source as one."""
    last: Copy | None = None
    for copy in copies:
        if last and _plain(last) and _plain(copy) and (last.read, last.write) == (copy.read, copy.write):
            (before,), (after,) = last.parts, copy.parts
            if (before.source, before.offset + before.items * ITEM_BYTES[last.read]) == (after.source, after.offset):
                last = last._replace(parts=(before._replace(items=before.items + after.items),))
                continue
        if last:
            yield last
        last = copy
    if last:
        yield last


def _plain(copy: Copy) -> bool:
    return len(copy.parts) == 1 and copy.rows == 1 and not copy.transposed and not copy.computed
