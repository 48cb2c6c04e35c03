"""A plan carried out: each file written once from its start, through one small buffer, and digested on the way.

The engine is pread, xxh3 and write with a buffer that stays in the processor's cache. copy_file_range was measured
beside it (tests/bench/engines.py, with fsync): on ext4 as fast where source and target are aligned alike, half as slow
again where they are not, which is always so here (a checkpoint aligns to 64 bytes, safetensors to 8; nor could such
ranges share blocks on XFS or btrfs); on tmpfs a fifth faster; across file systems it fails. And the digest would need
the target read again.

Network file systems: files are written from start to end by one thread each, never mapped, never reopened for writing;
an error that comes late, with fsync (as NFS tells of a full disk), fails the file. Holes of a source are read as zeros.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megapatch.models.commit import naming
from megapatch.models.core_files import BACKEND, METADATA
from megapatch.models.hf_files import CONFIG, INDEX
from megapatch.models.open_files import OpenFiles
from megapatch.tools.convert.plan import Entry, Literal, Plan
from megapatch.tools.convert.tiles import Reader

LAST = (METADATA, BACKEND, CONFIG, INDEX)  # no loader takes a folder without them
_FLUSH_S = 0.05


class Written(NamedTuple):
    """A durable file: enough to know it again."""

    bytes: int
    mtime_ns: int
    xxh3_128: str


def execute(
    plan: Plan,
    folder: Path,
    jobs: int,
    tell: Callable[[int], Any],
    kept: Mapping[str, Written] | None = None,
    note: Callable[[str, Written], Any] = lambda name, written: None,
) -> dict[str, str]:
    """Write the plan's files into ``folder`` and make them durable; the xxh3-128 of each.

    ``tell`` hears of bytes written. ``kept``: files that are there already; ``note`` hears of each that is added.
    Files by which a folder is recognised come last, when all others are durable.
    """
    files, kept = plan.files(), kept or {}
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    run = _Run(folder, tell, note)
    with ThreadPoolExecutor(jobs + 1) as pool:
        pool.submit(run.flush)
        try:
            for last in (False, True):
                turn = [name for name in files if name not in kept and (Path(name).name in LAST) == last]
                work = [pool.submit(run.write, name, files[name]) for name in turn]
                for future in work:
                    future.result()
        finally:
            run.stop.set()
    return {name: written.xxh3_128 for name, written in {**kept, **run.done}.items()}


class _Open:
    """A file being written. The system tells only once that data did not reach the disk: it is kept for the writer."""

    def __init__(self, path: Path) -> None:
        self.file, self.path = path.open("xb", buffering=0), path
        self._lock = threading.Lock()
        self._failed: OSError | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append all of the data."""
        view, descriptor = memoryview(data), self.file.fileno()
        with naming(self.path):
            if self._failed:
                raise self._failed
            while view:
                view = view[os.write(descriptor, view) :]

    def flush(self) -> None:
        """Send to the disk what is written so far; called by another thread than the writer's."""
        with self._lock:
            if not self.file.closed and self._failed is None:
                try:
                    os.fdatasync(self.file.fileno())
                except OSError as error:
                    self._failed = error

    def finish(self, digest: str) -> Written:
        """Make the file durable and close it."""
        with self._lock, self.file, naming(self.path):
            os.fsync(self.file.fileno())
            if self._failed:
                raise self._failed
            stat = os.fstat(self.file.fileno())
            return Written(stat.st_size, stat.st_mtime_ns, digest)


class _Run:
    """What the threads of one execution share."""

    def __init__(self, folder: Path, tell: Callable[[int], Any], note: Callable[[str, Written], Any]) -> None:
        self.folder, self.tell, self.note, self.stop = folder, tell, note, threading.Event()
        self.done: dict[str, Written] = {}
        self._lock = threading.Lock()
        self._writing: list[_Open] = []

    def flush(self) -> None:
        """Flush all files again and again: little is left to wait for at their ends."""
        while not self.stop.wait(_FLUSH_S):
            with self._lock:
                writing = list(self._writing)
            for file in writing:
                file.flush()

    def write(self, name: str, entries: Sequence[Entry]) -> None:
        """Write one file, unless another one fails; a failure stops the others."""
        file, state = _Open(self.folder / name), xxhash.xxh3_128()
        with file.file, OpenFiles() as sources:
            with self._lock:
                self._writing.append(file)
            try:
                for data in _data(entries, Reader(sources)):
                    if self.stop.is_set():
                        return
                    file.write(data)
                    state.update(data)
                    with self._lock:
                        self.tell(len(data))
                written = file.finish(state.hexdigest())
                with self._lock:
                    self.note(name, written)
                    self.done[name] = written
            except BaseException:
                self.stop.set()
                raise
            finally:
                with self._lock:
                    self._writing.remove(file)


def _data(entries: Sequence[Entry], reader: Reader) -> Iterator[bytes | memoryview]:
    for entry in entries:
        if isinstance(entry, Literal):
            yield entry.data
        else:
            yield from reader.content(entry)
