"""Matrices on paper: whatever is taken, stacked and transposed, the copies give what numpy gives."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapatch.models.cli import UserError
from megapatch.models.cuts import Region
from megapatch.models.open_files import OpenFiles
from megapatch.tools.convert.matrix import Matrix, Rectangle, stack
from megapatch.tools.convert.plan import Plan
from megapatch.tools.convert.tiles import Reader

ITEM = 4


def tiled(draw, rows: int, columns: int) -> list[Region]:
    """Regions that tile rows x columns, cut again and again."""
    found = [Region(0, 0, rows, columns)]
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(found) - 1))
        row, column, high, wide = found[at]
        if draw(st.booleans()) and high > 1:
            cut = draw(st.integers(1, high - 1))
            found[at : at + 1] = [Region(row, column, cut, wide), Region(row + cut, column, high - cut, wide)]
        elif wide > 1:
            cut = draw(st.integers(1, wide - 1))
            found[at : at + 1] = [Region(row, column, high, cut), Region(row, column + cut, high, wide - cut)]
    return found


@st.composite
def stored(draw, columns: int | None = None) -> tuple[Matrix, np.ndarray, bytes]:
    """A matrix in rectangles of one file, its values, and the file; all rectangles are stored turned, or none."""
    rows, columns = draw(st.integers(1, 9)), columns or draw(st.integers(1, 9))
    turned, found, data = draw(st.booleans()), [], b"header"
    values = np.array(draw(st.lists(st.integers(0, 1 << 30), min_size=rows * columns, max_size=rows * columns)))
    values = values.astype("<u4").reshape(rows, columns)
    for row, column, high, wide in tiled(draw, rows, columns):
        part = values[row : row + high, column : column + wide]
        part = part.T if turned else part
        gap = draw(st.integers(0, 2))  # items between the stored rows
        wider = np.full((part.shape[0], part.shape[1] + gap), 7, "<u4")
        wider[:, : part.shape[1]] = part
        at, pitch = len(data), wider.shape[1] * ITEM
        found.append(Rectangle(row, column, high, wide, "float32", Path("f"), at, pitch, turned))
        data += wider.tobytes()
    return Matrix("a", rows, columns, tuple(draw(st.permutations(found)))), values, data


def written(folder: Path, matrix: Matrix, data: bytes) -> bytes:
    """What the copies of a matrix put into a file."""
    (folder / "f").write_bytes(data)
    moved = tuple(r._replace(source=folder / "f") for r in matrix.rectangles)
    copies = list(Matrix(matrix.origin, matrix.rows, matrix.columns, moved).copies("w", "out", 0, "float32"))
    Plan(list(copies)).finish()
    with OpenFiles() as sources:
        return b"".join(bytes(piece) for copy in copies for piece in Reader(sources).content(copy))


@given(st.data())
def test_regions_taken_stacked_and_transposed_are_those_of_numpy(tmp_path_factory, data):
    matrix, values, file = data.draw(stored())
    for _ in range(data.draw(st.integers(0, 3))):
        if data.draw(st.booleans()):
            matrix, values = matrix.transposed(), values.T
        wide = data.draw(st.integers(1, matrix.columns))
        regions = []
        for _ in range(data.draw(st.integers(1, 3))):
            high = data.draw(st.integers(1, matrix.rows))
            row, column = (
                data.draw(st.integers(0, matrix.rows - high)),
                data.draw(st.integers(0, matrix.columns - wide)),
            )
            regions.append(Region(row, column, high, wide))
        matrix = matrix.take(regions)
        values = np.concatenate([values[r : r + h, c : c + w] for r, c, h, w in regions])
    assert written(tmp_path_factory.mktemp("m"), matrix, file) == values.tobytes()


def test_ranges_that_follow_each_other_are_one_copy():
    whole = Matrix("a", 6, 4, (Rectangle(0, 0, 6, 4, "float32", Path("f"), 10, 16),))
    (copy,) = stack("a", [whole.take([Region(row, 0, 2, 4)]) for row in (0, 2, 4)]).copies("w", "out", 0, "float32")
    assert (copy.parts[0].offset, copy.size, copy.rows) == (10, 96, 1)
    swapped = stack("a", [whole.take([Region(row, 0, 2, 4)]) for row in (2, 0, 4)])
    assert len(list(swapped.copies("w", "out", 0, "float32"))) == 3


def test_pieces_of_two_types_side_by_side_are_told():
    left = Rectangle(0, 0, 2, 1, "float32", Path("f"), 0, 4)
    right = Rectangle(0, 1, 2, 1, "bfloat16", Path("f"), 8, 2)
    with pytest.raises(UserError, match="w: pieces of different types side by side"):
        list(Matrix("a", 2, 2, (left, right)).copies("w", "out", 0, "float32"))
