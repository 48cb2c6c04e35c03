"""A plan carried out: each file written once from its start, through one small buffer, and digested on the way.

A buffer that stays in the processor's cache is faster here than copy_file_range, which copies page by page unless
source and target are aligned alike, and would need the data read again for the digest.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError
from megapatch.models.open_files import OpenFiles
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import Copy, Entry, Literal, Plan

BUFFER_BYTES = 2 << 20
_FLUSH_S = 0.05


def execute(plan: Plan, folder: Path, jobs: int, tell: Callable[[int], Any]) -> dict[str, str]:
    """Write the plan's files into ``folder``; the xxh3-128 of each. ``tell`` hears of bytes written."""
    files = plan.files()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    run = _Run(tell)
    with ThreadPoolExecutor(jobs + 1) as pool:
        flusher = pool.submit(run.flush)
        work = {name: pool.submit(run.write, folder / name, entries) for name, entries in files.items()}
        try:
            digests = {name: future.result() for name, future in work.items()}
        finally:
            run.stop.set()
        flusher.result()
    return digests


class _Run:
    """What the threads of one execution share."""

    def __init__(self, tell: Callable[[int], Any]) -> None:
        self.tell, self.stop = tell, threading.Event()
        self._lock = threading.Lock()
        self._writing: set[int] = set()  # file descriptors

    def flush(self) -> None:
        """Send to the disk what is written so far, again and again: little is left to wait for at the end."""
        while not self.stop.wait(_FLUSH_S):
            with self._lock:
                copies = [os.dup(descriptor) for descriptor in self._writing]  # the writers close theirs
            for descriptor in copies:
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)

    def write(self, path: Path, entries: Sequence[Entry]) -> str:
        """Write one file; its xxh3-128."""
        state, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_BYTES))
        with path.open("xb", buffering=0) as file, OpenFiles() as sources:
            with self._lock:
                self._writing.add(file.fileno())
            try:
                for data in _data(entries, sources, buffer):
                    if self.stop.is_set():  # another file failed
                        return ""
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    state.update(data)
                    with self._lock:
                        self.tell(len(data))
            finally:
                with self._lock:
                    self._writing.remove(file.fileno())
        return state.hexdigest()


def _data(entries: Sequence[Entry], sources: OpenFiles, buffer: memoryview) -> Iterator[bytes | memoryview]:
    for entry in entries:
        if isinstance(entry, Literal):
            yield entry.data
        else:
            yield from _content(entry, sources, buffer)


def _read(sources: OpenFiles, path: Path, view: memoryview, offset: int) -> None:
    """Fill ``view`` with the bytes from ``offset``."""
    file, done = sources[path].fileno(), 0
    while done < len(view):
        moved = os.preadv(file, [view[done:]], offset + done)
        if moved == 0:
            raise UserError(f"{path}: became shorter while it was copied; run again")
        done += moved


def _content(copy: Copy, sources: OpenFiles, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of an entry, in pieces that fit the buffer."""
    for piece in pieces(copy, len(buffer)):
        size = piece.rows * piece.items * ITEM_BYTES[piece.read]
        data = buffer[:size] if size <= len(buffer) else memoryview(bytearray(size))
        if len(piece.parts) == 1:
            _read(sources, piece.parts[0].source, data, piece.parts[0].offset)
        else:
            _join_columns(piece, sources, data)
        yield data if piece.read == piece.write else cast(data, piece.read, piece.write)


def pieces(copy: Copy, limit_bytes: int) -> Iterator[Copy]:
    """The same copy, cut so that each piece reads at most ``limit_bytes`` (or one row of several parts)."""
    item = ITEM_BYTES[copy.read]
    if len(copy.parts) == 1:
        (part,) = copy.parts
        total, step = copy.rows * part.items, limit_bytes // item
        for at in range(0, total, step):
            count = min(step, total - at)
            yield copy._replace(rows=1, parts=(part._replace(offset=part.offset + at * item, items=count),))
        return
    step = max(1, limit_bytes // (copy.items * item))
    for row in range(0, copy.rows, step):
        parts = tuple(p._replace(offset=p.offset + row * p.items * item) for p in copy.parts)
        yield copy._replace(rows=min(step, copy.rows - row), parts=parts)


def _join_columns(copy: Copy, sources: OpenFiles, data: memoryview) -> None:
    """Fill ``data`` with rows whose columns come from several parts."""
    import numpy as np

    item = ITEM_BYTES[copy.read]
    whole, column = np.frombuffer(data, np.uint8).reshape(copy.rows, -1), 0
    for part in copy.parts:
        width = part.items * item
        rows = bytearray(copy.rows * width)
        _read(sources, part.source, memoryview(rows), part.offset)
        whole[:, column : column + width] = np.frombuffer(rows, np.uint8).reshape(copy.rows, width)
        column += width


def cast(data: memoryview, read: str, write: str) -> memoryview:
    """The items of ``data`` in another dtype, rounded as torch rounds."""
    import torch

    made = torch.frombuffer(data, dtype=getattr(torch, read)).to(getattr(torch, write))
    return made.view(torch.uint8).numpy().data
