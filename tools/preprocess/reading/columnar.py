"""Rows of parquet and arrow files, through pyarrow (extra `data`): only the columns wanted, bounded parts."""

import mmap
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading.cutting import Counted, Span, opened
from megapatch.tools.preprocess.reading.digests import InputDigests
from megapatch.tools.preprocess.reading.pieces import Piece, refuse_changed, stamp_of
from megapatch.tools.preprocess.reading.sources import Source

_GROUP_BYTES = 16 << 20  # row groups up to this size are read by workers, larger ones are handed out in parts
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_ROW_BYTES = 64  # at least, for what is said of columns of repeated values is their size without the repetition
_ARROW_FILE, _OLD_FEATHER = b"ARROW1", b"FEA1"
Made = tuple[Piece, Callable[[], bytes] | None]


def parquet_pieces(
    source: Source, chunk_bytes: int, span: Span, digests: InputDigests | None
) -> Generator[Made, None, None]:
    """Row groups that begin in ``span`` (each at its rows' share of the file's bytes), large ones in parts."""
    with open(source.path, "rb") as raw, _naming(source.label, "parquet"):
        stamp = stamp_of(source.path, raw.fileno(), source.size)
        file = _parquet(raw)
        columns = _columns(source, file.schema_arrow)
        rows, edges = _edges(file.metadata, source.size or 0)
        mine = [i for i, edge in enumerate(edges[:-1]) if span[0] <= edge < span[1]]
        if digests and (mine or len(rows) == 1):
            digests.begin(source.label, edges[mine[0]] if mine else 0)
        for i in mine:
            if digests:
                digests.take_file(raw.fileno(), edges[i + 1])
            refuse_changed(source.path, raw.fileno(), stamp)
            size, spent = _group_bytes(file.metadata, i, columns), edges[i + 1] - edges[i]
            piece = Piece(source.path, "parquet", rows[i], size, None, spent, rows[i], stamp, i, columns)
            if size <= max(_GROUP_BYTES, chunk_bytes):
                yield piece, None
            else:
                yield from _LargeGroup(file, piece, rows[i + 1] - rows[i]).parts(chunk_bytes)
        if digests and (mine or len(rows) == 1):
            digests.take_file(raw.fileno(), edges[mine[-1] + 1] if mine else edges[0])
            digests.end(whole=len(mine) == len(edges) - 1)


def _parquet(raw: BinaryIO) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_BUFFER_BYTES)  # or it reads whole columns


def _edges(metadata: Any, size: int) -> tuple[list[int], list[int]]:
    """First row of each row group, and its first byte if all rows were as long; both with the end."""
    rows = [0]
    for i in range(metadata.num_row_groups):
        rows.append(rows[-1] + metadata.row_group(i).num_rows)
    return rows, [size * row // max(1, rows[-1]) for row in rows[:-1]] + [size]


def _group_bytes(metadata: Any, group: int, columns: tuple[str, ...]) -> int:
    """Bytes of the columns of a row group when they are unpacked."""
    meta = metadata.row_group(group)
    least = meta.num_rows * _ROW_BYTES
    parts = [meta.column(i) for i in range(meta.num_columns)]
    wanted = [part for part in parts if not columns or _is_of(part.path_in_schema, columns)]
    return max(least, sum(part.total_uncompressed_size for part in wanted))


def _is_of(path: str, columns: tuple[str, ...]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


class _LargeGroup:
    """A row group in parts of so many rows; only parts that are loaded are read, and what lies before them in it."""

    def __init__(self, file: Any, piece: Piece, num_rows: int) -> None:
        self._file, self._piece, self._num_rows = file, piece, num_rows
        self._batches: Iterator[Any] = iter(())
        self._reached = num_rows  # rows of the group that the batches are past

    def parts(self, chunk_bytes: int) -> Iterator[Made]:
        """Pieces with their loaders."""
        piece, total = self._piece, self._num_rows
        at_a_time = max(1, total * chunk_bytes // piece.size)
        for first in range(0, total, at_a_time):
            past = min(total, first + at_a_time)
            row = piece.start + first
            size, spent = (whole * past // total - whole * first // total for whole in (piece.size, piece.input_bytes))
            part = replace(piece, kind="arrow", start=row, size=size, input_bytes=spent, lines_before=row, stamp=None)
            yield part, partial(self._load, first, past, at_a_time)

    def _load(self, first: int, past: int, at_a_time: int) -> bytes:
        if self._reached > first:
            names, group = list(self._piece.columns) or None, [self._piece.group]
            self._batches = self._file.iter_batches(at_a_time, row_groups=group, columns=names, use_threads=False)
            self._reached = 0
        found = []
        while self._reached < past:
            batch = next(self._batches)
            start, self._reached = self._reached, self._reached + batch.num_rows
            assert self._reached <= past, "a batch goes beyond the rows asked for"
            if start >= first:
                found.append(batch)
        return _ipc(tuple(found))


def arrow_pieces(source: Source, chunk_bytes: int, digests: InputDigests | None) -> Generator[Made, None, None]:
    """Rows of an arrow file or stream, as parts with their data."""
    with opened(source) as file, _naming(source.label, "arrow"):
        stamp = stamp_of(source.path, file.fileno(), source.size) if source.size is not None else None
        if digests:
            digests.begin(source.label)
        mapped = None if source.size is None else _map(source, file)
        batches = _mapped(source, mapped, file, digests) if mapped else _piped(source, Counted(file, digests))
        piece = Piece(source.label, "arrow", 0, 0, lines_before=0)
        for made in _parts(piece, batches, chunk_bytes):
            refuse_changed(source.path, file.fileno(), stamp)
            yield made
            if mapped:
                mapped.madvise(mmap.MADV_DONTNEED)  # or all that was read would count as resident
        if digests:
            digests.end()


def _piped(source: Source, file: Counted) -> Iterator[tuple[Any, int]]:
    """Batches of a stream, and the bytes read for each."""
    import pyarrow as pa

    spent = 0
    calm = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.ipc.open_stream(pa.PythonFile(file, "r"), options=calm) as reader:
        names = _tops(_columns(source, reader.schema), reader.schema)
        for batch in reader:
            yield batch.select(names) if names else batch, file.num_bytes - spent
            spent = file.num_bytes
    while file.read(_BATCH_ROWS):
        pass  # what is written after the stream's end belongs to its digest


def _map(source: Source, file: BinaryIO) -> mmap.mmap:
    """The bytes of a file as memory, of which only what is used is read."""
    if not source.size:
        raise UserError(f"{source.label}: damaged, or no arrow (it is empty); get the file again")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _mapped(
    source: Source, mapped: mmap.mmap, file: BinaryIO, digests: InputDigests | None
) -> Iterator[tuple[Any, int]]:
    """Batches of a file, and the bytes of each in it."""
    import pyarrow as pa

    size, spent = source.size or 0, 0
    head = mapped[: len(_ARROW_FILE)]
    if head.startswith(_OLD_FEATHER):
        raise UserError(f"{source.label}: the first version of feather; read it with pyarrow and write it as parquet")
    calm = pa.ipc.IpcReadOptions(use_threads=False)
    reader: Any
    if head == _ARROW_FILE:
        reader = pa.ipc.open_file(pa.py_buffer(mapped), options=calm)
        count = reader.num_record_batches
        found = ((reader.get_batch(i), size * (i + 1) // count) for i in range(count))
    else:
        stream = pa.BufferReader(pa.py_buffer(mapped))
        reader = pa.ipc.open_stream(stream, options=calm)
        found = ((batch, stream.tell()) for batch in reader)
    names = _tops(_columns(source, reader.schema), reader.schema)
    for batch, position in found:
        if digests:
            digests.take_file(file.fileno(), position)
        yield batch.select(names) if names else batch, position - spent
        spent = position
    if digests:
        digests.take_file(file.fileno(), size)


def _parts(piece: Piece, batches: Iterable[tuple[Any, int]], chunk_bytes: int) -> Iterator[Made]:
    """Pieces like ``piece`` of about ``chunk_bytes``, out of batches and the bytes of input spent on each."""
    held: list[Any] = []
    spent, start = 0, piece.start

    def part() -> Made:
        made = replace(piece, start=start, size=size, input_bytes=spent, lines_before=start)
        return made, partial(_ipc, tuple(held))

    for batch, num_bytes in batches:
        spent += num_bytes
        for rows in _slices(_plain(batch), chunk_bytes):
            held.append(rows)
            size = sum(one.nbytes for one in held)
            if size >= chunk_bytes:
                yield part()
                start += sum(one.num_rows for one in held)
                held, spent = [], 0
    if held:
        size = sum(one.nbytes for one in held)
        yield part()


def _slices(batch: Any, chunk_bytes: int) -> Iterator[Any]:
    at_a_time = max(1, batch.num_rows * chunk_bytes // max(1, batch.nbytes))
    for first in range(0, batch.num_rows, at_a_time):
        yield batch.slice(first, at_a_time)


def _plain(batch: Any) -> Any:
    """The batch without dictionaries, which would go along with each of its slices."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _ipc(batches: tuple[Any, ...]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _columns(source: Source, schema: Any) -> tuple[str, ...]:
    """The columns wanted; one that the file lacks is a UserError."""
    for column in source.columns:
        if not _has(schema, column):
            names = ", ".join(schema.names[:12]) or "none"
            raise UserError(f"{source.label}: no column {column!r}; columns found: {names}; choose with --text-key")
    return source.columns


def _has(fields: Iterable[Any], column: str) -> bool:
    """Does a schema or a struct have the column, or a struct with the rest of its name?"""
    import pyarrow as pa

    kinds = {field.name: field.type for field in fields}
    head, _, rest = column.partition(".")
    inner = kinds.get(head)
    return column in kinds or bool(rest and inner and pa.types.is_struct(inner) and _has(inner, rest))


def _tops(columns: tuple[str, ...], schema: Any) -> list[str]:
    """The columns of the schema that hold those wanted."""
    return list(dict.fromkeys(c if c in schema.names else c.partition(".")[0] for c in columns))


def rows_of(piece: Piece) -> Iterator[Any]:
    """Batches of the rows of a piece, in a worker."""
    import pyarrow as pa

    with _naming(piece.path, piece.kind):
        if piece.data is not None:
            with pa.ipc.open_stream(piece.data) as reader:
                yield from reader
            return
        with open(piece.path, "rb") as raw:
            columns = list(piece.columns) or None
            yield from _parquet(raw).iter_batches(
                _BATCH_ROWS, row_groups=[piece.group], columns=columns, use_threads=False
            )
            refuse_changed(piece.path, raw.fileno(), piece.stamp)


@contextmanager
def _naming(label: str, kind: str) -> Iterator[None]:
    """Errors of pyarrow, and its absence, as one line with the input's name."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{label}: {kind} needs pyarrow; pip install 'megapatch[data]'") from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, pyarrow.ArrowException):
            raise
        raise UserError(f"{label}: damaged, or no {kind} ({error}); get the file again") from None
