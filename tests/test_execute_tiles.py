"""What a copy puts into the target: strided, joined, transposed, scaled, cast; against torch."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megapatch.models.open_files import OpenFiles
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert import casts, tiles
from megapatch.tools.convert.plan import Copy, Part, Scale

FLOATS = ("bfloat16", "float16", "float32")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")


def content(copy: Copy, limits: tuple[int, int, int] = (tiles.BUFFER_BYTES, tiles.BAND_BYTES, 16384)) -> bytes:
    """The bytes that a copy gives, with buffer, band and gap of these sizes in bytes."""
    with pytest.MonkeyPatch.context() as patch, OpenFiles() as sources:
        for name, limit in zip(("BUFFER_BYTES", "BAND_BYTES", "_GAP_BYTES"), limits, strict=True):
            patch.setattr(tiles, name, limit)
        found = [bytes(piece) for piece in tiles.Reader(sources).content(copy)]
    largest = max(limits[0], limits[1] if copy.transposed else 0, ITEM_BYTES[copy.write])
    assert all(0 < len(piece) <= largest for piece in found)
    return b"".join(found)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def finite(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Numbers of every size, without NaN, whose payload torch does not define."""
    made = torch.randint(0, 256, (math.prod(shape) * ITEM_BYTES[dtype],), generator=torch.Generator().manual_seed(seed))
    found = made.to(torch.uint8).view(getattr(torch, dtype)).reshape(shape)
    return torch.where(found.isnan(), torch.ones_like(found), found)


@st.composite
def rectangles(draw) -> tuple[Copy, torch.Tensor, dict[str, bytes]]:
    """A copy of columns of several matrices (stacked and transposed, or joined), what it should give, its files."""
    read, write = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    transposed, rows = draw(st.booleans()), draw(st.integers(1, 40))
    parts, columns, files = [], [], {}
    common = draw(st.integers(1, 30))
    for n in range(draw(st.integers(1, 3))):
        before, width, after = (draw(st.integers(low, 30)) for low in (0, 1, 0))
        width = common if transposed else width
        whole = finite((rows, before + width + after), read, draw(st.integers(0, 99)))
        item, lead = ITEM_BYTES[read], draw(st.integers(0, 9))  # the file's header need not be aligned
        files[f"s{n}"] = b"x" * lead + bits(whole)
        pitch = whole.shape[1] * item if before + after or draw(st.booleans()) else 0
        parts.append(Part(Path(f"s{n}"), lead + before * item, width, pitch))
        columns.append(whole[:, before : before + width])
    copy = Copy("w", "f", 0, tuple(parts), rows, read, write, transposed)
    joined = torch.cat(columns, 0 if transposed else 1).to(getattr(torch, write))
    return copy, joined.T if transposed else joined, files


def written(folder: Path, copy: Copy, files: dict[str, bytes]) -> Copy:
    """The copy with its sources on the disk."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return copy._replace(parts=tuple(part._replace(source=folder / part.source) for part in copy.parts))


@given(rectangles(), st.tuples(st.integers(8, 300), st.integers(8, 300), st.integers(0, 60)))
def test_any_rectangle_transposed_joined_or_cast_is_what_torch_gives(tmp_path_factory, made, limits):
    copy, expected, files = made
    copy = written(tmp_path_factory.mktemp("s"), copy, files)
    assert copy.size == len(bits(expected))
    assert content(copy, limits) == bits(expected)
    assert content(copy) == bits(expected)


@given(rectangles(), st.integers(1, 90))
def test_tiles_cover_a_copy_once_in_the_order_of_the_target_and_fit(made, most):
    copy = made[0]
    numbers = torch.arange(copy.rows * copy.items).reshape(copy.stored)
    found = []
    for tile in tiles.tiles(copy, most):
        part = numbers[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns]
        assert 0 < part.numel() <= most and part.shape == (tile.rows, tile.columns)
        found += (part.T if copy.transposed else part).flatten().tolist()
    assert found == (numbers.T if copy.transposed else numbers).flatten().tolist()


@st.composite
def quantised(draw) -> tuple[Copy, torch.Tensor, dict[str, bytes]]:
    """A copy of some rows and columns of a quantised matrix, what it should give, and the files."""
    read, write, kind = (draw(st.sampled_from(names)) for names in (EIGHT_BITS, FLOATS, FLOATS))
    high, wide = draw(st.integers(1, 7)), draw(st.integers(1, 7))  # of a block
    shape = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    grid = (-(-shape[0] // high), -(-shape[1] // wide))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scales = (torch.rand(grid, generator=generator) * 4 - 2).to(getattr(torch, kind))
    whole = finite(shape, read, draw(st.integers(0, 99))) if read != "float8_e5m2" else small_e5m2(shape, generator)
    row, column = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
    rows, columns = draw(st.integers(1, shape[0] - row)), draw(st.integers(1, shape[1] - column))
    spread = scales.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]
    value = (whole.float() * spread)[row : row + rows, column : column + columns].to(getattr(torch, write))
    origin = Part(Path("w"), 3 + row * shape[1] + column, columns, shape[1])
    scale = Scale(Path("s"), 5, kind, grid[1], row, column, high, wide)
    copy = Copy("w", "f", 0, (origin,), rows, read, write, draw(st.booleans()), scale)
    return copy, value.T if copy.transposed else value, {"w": b"xxx" + bits(whole), "s": b"yyyyy" + bits(scales)}


def small_e5m2(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Finite numbers: infinity times zero is not a number."""
    return (torch.rand(shape, generator=generator) * 8 - 4).to(torch.float8_e5m2)


@given(quantised(), st.tuples(st.integers(64, 300), st.integers(16, 300), st.integers(0, 60)))
def test_block_scales_give_what_torch_gives_also_across_blocks(tmp_path_factory, made, limits):
    copy, expected, files = made
    folder = tmp_path_factory.mktemp("q")
    copy = written(folder, copy, files)
    copy = copy._replace(scale=copy.scale._replace(source=folder / "s"))
    assert content(copy, limits) == bits(expected)
    assert content(copy) == bits(expected)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_each_value_of_eight_bits_is_the_one_of_torch(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    found = torch.from_numpy(casts.to_float32(codes.numpy(), dtype))
    assert torch.equal(found.nan_to_num(7e7), codes.view(getattr(torch, dtype)).float().nan_to_num(7e7))


@pytest.mark.parametrize("read, write", itertools.product(("bfloat16", "float16"), FLOATS))
def test_each_value_of_sixteen_bits_is_cast_as_torch_casts_it(read, write):
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    expected = codes.view(getattr(torch, read)).to(getattr(torch, write))
    same_numbers(codes.numpy(), read, write, expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(FLOATS))
@example([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x00000001, 0x33000000, 0x33000001], "bfloat16")
@example([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x387FE000, 0x387FFFFF, 0x7F800000], "float16")
def test_float32_is_rounded_as_torch_rounds(codes, write):
    made = torch.tensor(codes, dtype=torch.int64).to(torch.uint32)
    same_numbers(made.numpy(), "float32", write, made.view(torch.float32).to(getattr(torch, write)))


def same_numbers(codes, read: str, write: str, expected: torch.Tensor) -> None:
    """Bits are equal, but for those of NaN, which must be NaN."""
    found = torch.from_numpy(casts.cast(codes, read, write).copy()).view(expected.dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert bits(found.masked_fill(expected.isnan(), 0)) == bits(expected.masked_fill(expected.isnan(), 0))


def test_memory_stays_bounded_for_a_transposed_matrix_and_a_slice_of_long_rows(tmp_path):
    import tracemalloc

    rows, columns = 50_000, 700
    with (tmp_path / "m").open("wb") as file:
        file.truncate(rows * columns * 2)
    for copy in (
        Copy("w", "f", 0, (Part(tmp_path / "m", 0, columns),), rows, "bfloat16", "bfloat16", True),
        Copy("w", "f", 0, (Part(tmp_path / "m", 0, rows * 300, rows * 350 * 2),), 2, "bfloat16", "float32"),
    ):
        tracemalloc.start()
        with OpenFiles() as sources:
            assert sum(len(piece) for piece in tiles.Reader(sources).content(copy)) == copy.size
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < tiles.BAND_BYTES + 6 * tiles.BUFFER_BYTES
