"""A conversion read again: is every byte of the target what the plan makes of the sources? Nothing is written."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError
from megapatch.models.commit import MANIFEST, naming, read_manifest
from megapatch.models.open_files import OpenFiles
from megapatch.tools.convert.plan import Entry, Literal, Plan
from megapatch.tools.convert.tiles import Reader

log = logging.getLogger(__name__)
_OPTIONS = "was it written from this source, with the same options?"


def compare(plan: Plan, folder: Path, jobs: int, tell: Callable[[int], Any]) -> None:
    """Refuse (UserError) a folder that is not what the plan makes, naming the first tensor that departs.

    Each range is compared with its sources, after the cast if there is one, and each file with the folder's manifest.
    ``tell`` hears of bytes compared.
    """
    files, manifest = plan.files(), (read_manifest(folder) or {}).get("files", {})
    for name, entries in files.items():
        _check_size(folder / name, sum(entry.size for entry in entries))
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST, *files}
    if others:
        log.warning("%s: not looked at, as the source has nothing like it: %s", folder, ", ".join(sorted(others)))
    run = _Run(folder, manifest, tell)
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(run.compare, name, entries) for name, entries in files.items()]
        try:
            for future in work:  # in the plan's order: what is told first is first
                future.result()
        finally:
            run.stop.set()


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; the plan writes {size} bytes there: {_OPTIONS}")
    if path.stat().st_size != size:
        raise UserError(f"{path}: {path.stat().st_size} bytes, the plan writes {size}; {_OPTIONS}")


class _Run:
    """What the threads of one comparison share."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], tell: Callable[[int], Any]) -> None:
        self.folder, self.manifest, self.tell, self.stop = folder, manifest, tell, threading.Event()
        self._lock = threading.Lock()

    def compare(self, name: str, entries: Sequence[Entry]) -> None:
        """Compare one file, unless the comparison has ended."""
        path, state = self.folder / name, xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file, OpenFiles() as sources:
            reader = Reader(sources)
            for entry in entries:
                at = entry.offset
                for data in _content(entry, reader):
                    if self.stop.is_set():
                        return
                    expected = bytes(data)
                    with naming(path):
                        found = os.pread(file.fileno(), len(expected), at)
                    if found != expected:
                        raise _departure(path, entry, at, found, expected)
                    state.update(found)
                    at += len(found)
                    with self._lock:
                        self.tell(len(found))
        if self.manifest and self.manifest.get(name, {}).get("xxh3_128") != state.hexdigest():
            raise UserError(f"{path}: as the source has it, but {MANIFEST} has another digest; convert again")


def _content(entry: Entry, reader: Reader) -> Iterator[bytes | memoryview]:
    if isinstance(entry, Literal):
        yield entry.data
    else:
        yield from reader.content(entry)


def _departure(path: Path, entry: Entry, at: int, found: bytes, expected: bytes) -> UserError:
    """What to say of the first byte that differs in a piece that starts at byte ``at`` of the file."""
    same = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
    if isinstance(entry, Literal):
        return UserError(f"{path}: byte {at + same} differs from what the plan writes there (a header or index)")
    source = entry.parts[0].source
    return UserError(
        f"{path}: {entry.name} departs from {source} at byte {at + same} of the file; convert again, or get it again"
    )
