"""All inputs as numbered chunks of pieces, the same ones each time, and the part of them that one shard takes."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading import columnar
from megapatch.tools.preprocess.reading.cutting import EVERYTHING, Span, file_pieces, stream_pieces
from megapatch.tools.preprocess.reading.digests import InputDigests
from megapatch.tools.preprocess.reading.pieces import Chunk, LineNumbers, Piece
from megapatch.tools.preprocess.reading.sources import (
    InputOptions,
    Source,
    SourceOptions,
    find_sources,
    refuse_streams,
    total_bytes,
)

__all__ = [
    "Chunk",
    "InputDigests",
    "InputOptions",
    "LineNumbers",
    "Piece",
    "Source",
    "SourceOptions",
    "chunks",
    "find_sources",
    "total_bytes",
]
_MAX_PIECES = 1000  # per chunk, so that a million empty files do not make one task
Made = tuple[Piece, Callable[[], bytes] | None]  # a piece, and what makes its data if that costs something


def chunks(
    sources: list[Source],
    chunk_bytes: int,
    *,
    shard: tuple[int, int] = (0, 1),
    skip: int = 0,
    hashes: InputDigests | None = None,
) -> Iterator[Chunk]:
    """All records in order, in chunks of about ``chunk_bytes``; the same for the same arguments, whoever reads them.

    ``shard`` = (i, n): the i-th of n parts. ``skip``: so many chunks are passed over; of what lies in files only the
    ends of lines are looked for then, unless ``hashes``, which takes all bytes and compares what was passed over.
    """
    number = 0
    with closing(_groups(_made(sources, chunk_bytes, shard, hashes), chunk_bytes)) as groups:
        for group in groups:
            if number >= skip:
                pieces = tuple(piece if load is None else replace(piece, data=load()) for piece, load in group)
                yield Chunk(number, pieces, hashes.mark() if hashes else "")
            number += 1
            if number == skip and hashes:
                hashes.check()
    if number < skip:
        raise UserError(
            f"--resume: the inputs hold {number:,} chunks, the interrupted run had read {skip:,}; start anew"
        )


def _groups(made: Generator[Made, None, None], chunk_bytes: int) -> Generator[list[Made], None, None]:
    group: list[Made] = []
    size = 0
    with closing(made):
        for piece, load in made:
            group.append((piece, load))
            size += piece.size
            if size >= chunk_bytes or len(group) >= _MAX_PIECES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _made(
    sources: list[Source], chunk_bytes: int, shard: tuple[int, int], digests: InputDigests | None
) -> Generator[Made, None, None]:
    for source, span in _shares(sources, shard):
        if source.kind == "parquet":
            yield from columnar.parquet_pieces(source, chunk_bytes, span, digests)
        elif source.kind in ("text", "lines", "jsonl") and source.size is not None and not source.packing:
            if source.kind != "text" or _holds_start(span):
                yield from ((piece, None) for piece in file_pieces(source, chunk_bytes, span, digests))
        elif _holds_start(span):
            if source.kind == "arrow":
                yield from columnar.arrow_pieces(source, chunk_bytes, digests)
            else:
                yield from ((piece, None) for piece in stream_pieces(source, chunk_bytes, digests))


def _shares(sources: list[Source], shard: tuple[int, int]) -> Iterator[tuple[Source, Span]]:
    """The inputs of which a shard has something, and which positions of each: what begins there is the shard's."""
    index, num_shards = shard
    if num_shards == 1:
        yield from ((source, (0, EVERYTHING)) for source in sources)
        return
    refuse_streams(sources)
    total = total_bytes(sources) or 0
    first = total * index // num_shards
    past = EVERYTHING if index == num_shards - 1 else total * (index + 1) // num_shards
    position = 0
    for source in sources:
        size = source.size or 0
        if first < position + max(size, 1) and position < past:
            yield source, (first - position, past - position)
        position += size


def _holds_start(span: Span) -> bool:
    """Is the whole input this shard's, where it cannot be divided?"""
    return span[0] <= 0 < span[1]
