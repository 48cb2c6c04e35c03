"""PREFIX.partial/: a run that lives or was interrupted, from which the same run can be gone on with.

    lock          locked while a run lives
    state.json    what is done; replaced in one step, after all that it tells of is on the disk
    0.bin ...     the outputs as far as they are, and 0.lengths: elements of their sequences, int32
    NAME          what the job notes (hashes of documents, bad lines)

When all is done state.json lists renames instead. Whoever finds that list carries it out: outputs appear all or none.
"""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models import commit
from megapatch.models.cli import UserError
from megapatch.tools.preprocess.run.job import Output
from megapatch.tools.preprocess.run.worker_process import Target

_LOG = logging.getLogger("megapatch.tools.preprocess")
EVERY_S = 5.0  # between two states on the disk
_SHARE = 20  # of the time at most 1/20 is spent on saving
FORMAT = 1


def partial_path(prefix: Path) -> Path:
    """The folder of a run that writes ``prefix``."""
    return Path(f"{prefix}.partial")


class RunState:
    """The locked folder of a run; ``found`` is the last state of an interrupted one, None when there is none."""

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.folder = prefix, partial_path(prefix).absolute()
        self._state, self.found = self.folder / "state.json", None
        self._files: dict[str, int] = {}
        self.sizes: dict[str, int] = {}  # of the growing files
        self._latest: str | None = None  # of what is durable
        self._pending: dict[int, str] = {}  # states after chunks that are settled
        self._saved: str | None = None
        self._next_s = time.monotonic() + EVERY_S
        commit.make_parents(self.folder)
        self.lock = self._locked()
        try:
            self.found = self._read()
        except BaseException:
            os.close(self.lock)
            raise

    def _locked(self) -> int:
        path = self.folder / "lock"
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: cannot be made ({error.strerror}); choose another --output-prefix"
                ) from error
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the run that had the folder has just removed it
                continue
            try:
                self._lock(descriptor)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another run is writing {self.prefix}; wait, or choose another") from None
        except OSError as error:
            raise UserError(
                f"{self.folder}: its file system has no locks ({error.strerror}); have it mounted with flock, or "
                "choose another --output-prefix"
            ) from error

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._state.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{self._state}: not a state that this version wrote; remove {self.folder} to start anew")
        return found

    def start(self, outputs: Sequence[Output], sizes: Mapping[str, int] | None) -> list[Target]:
        """Open the growing files, cut back to ``sizes``; None: empty them and forget what was found."""
        if sizes is None:
            self._empty()
        for number in range(len(outputs)):
            for name in (f"{number}.bin", f"{number}.lengths"):
                self._open(name, (sizes or {}).get(name, 0))
        for name, size in (sizes or {}).items():
            if name not in self._files:
                self._open(name, size)
        self.targets = [
            Target(self.folder / f"{i}.bin", self._files[f"{i}.bin"], output.dtype.itemsize, self.sizes[f"{i}.bin"])
            for i, output in enumerate(outputs)
        ]
        return self.targets

    def _empty(self) -> None:
        self._state.unlink(missing_ok=True)
        commit.fsync(self.folder)  # before the files that it tells of
        for path in self.folder.iterdir():
            if path.name != "lock":
                commit.remove(path)

    def _open(self, name: str, size: int) -> None:
        path = self.folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._files[name], self.sizes[name] = descriptor, size
        found = os.fstat(descriptor).st_size
        if found < size:
            raise UserError(f"{path}: {found:,} bytes found, {size:,} expected; it is damaged: start anew with --force")
        os.ftruncate(descriptor, size)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Add to a growing file."""
        if name not in self._files:
            self._open(name, 0)
        rest = memoryview(data)
        with commit.naming(self.folder / name):
            while rest:
                written = os.pwrite(self._files[name], rest, self.sizes[name])
                rest, self.sizes[name] = rest[written:], self.sizes[name] + written

    def settled(self, number: int, lengths: Sequence[np.ndarray], said: Mapping[str, Any]) -> None:
        """Remember the state after chunk ``number`` (from 0, of all); it counts once the chunk is written."""
        for i, (one, target) in enumerate(zip(lengths, self.targets, strict=True)):
            self.append(f"{i}.lengths", np.ascontiguousarray(one, "<i4").data.cast("B") if one.size else b"")
            self.sizes[f"{i}.bin"] += int(one.sum(dtype=np.int64)) * target.itemsize
        self._pending[number] = json.dumps({"format": FORMAT, **said, "chunks": number + 1, "sizes": self.sizes})

    def written(self, num_chunks: int) -> None:
        """The first ``num_chunks`` chunks of all are written; the state goes to the disk every few seconds."""
        self._latest = self._pending[num_chunks - 1]
        for number in [one for one in self._pending if one < num_chunks]:
            del self._pending[number]
        if time.monotonic() >= self._next_s:
            self.save()

    def save(self) -> bool:
        """Put what is durable on the disk; False when there is nothing worth keeping."""
        if self._latest is not None and self._latest != self._saved:
            began = time.monotonic()
            for descriptor in self._files.values():
                os.fdatasync(descriptor)
            self._replace(self._latest)
            self._saved = self._latest
            self._next_s = time.monotonic() + max(EVERY_S, _SHARE * (time.monotonic() - began))
        return self.has_saved

    @property
    def has_saved(self) -> bool:
        """Is there a state on the disk to go on from?"""
        return self._state.exists()

    def cut_back(self) -> None:
        """Free the room of what is not durable yet; no worker may write any more."""
        if self._latest is not None:
            for name, size in json.loads(self._latest)["sizes"].items():
                os.ftruncate(self._files[name], size)

    def forget(self) -> None:
        """Nothing that is done shall be kept."""
        self._latest = None
        self._state.unlink(missing_ok=True)

    def _replace(self, text: str) -> None:
        stage = self.folder / "state.json.new"
        with commit.naming(stage), stage.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, self._state)
        commit.fsync(self.folder)

    def lengths(self, number: int) -> np.ndarray:
        """Elements of each sequence of an output, int32, mapped."""
        path = self.folder / f"{number}.lengths"
        return np.memmap(path, "<i4", "r") if self.sizes[path.name] else np.zeros(0, "<i4")

    def commit(self, renames: Sequence[tuple[Path, Path]], stale: Sequence[Path]) -> None:
        """Remove ``stale`` and rename each file of the folder to its target, in this order, whatever happens."""
        for source, _ in renames:
            commit.fsync(source)
        said = {"renames": [[str(source), str(target)] for source, target in renames], "stale": list(map(str, stale))}
        self._replace(json.dumps({"format": FORMAT, **said}))
        self.finish(said)

    def finish(self, said: Mapping[str, Any]) -> None:
        """Carry out the renames of a state that lists them; done again after a kill, the rest of them."""
        for path in map(Path, said["stale"]):
            if path.exists() and not self._is_new(path, said):
                path.unlink()
        folders = {Path(target).parent for _, target in said["renames"]}
        for folder in folders:
            commit.fsync(folder)
        for name, target in said["renames"]:
            if os.path.exists(name):
                os.replace(name, target)
        for folder in folders:
            commit.fsync(folder)
        self.remove()

    def _is_new(self, path: Path, said: Mapping[str, Any]) -> bool:
        """Is this target already renamed, by a run that was killed after it?"""
        return any(target == str(path) and not os.path.exists(name) for name, target in said["renames"])

    def remove(self) -> None:
        """Nothing is left to go on with."""
        for path in self.folder.iterdir():
            if path.name not in ("lock", self._state.name):
                commit.remove(path)
        self._state.unlink(missing_ok=True)  # until here renames that are done are found done
        (self.folder / "lock").unlink()
        try:
            self.folder.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # the next run has made its lock there
                raise
        commit.fsync(self.folder.parent)

    def close(self) -> None:
        """Let others have the lock."""
        for descriptor in (*self._files.values(), self.lock):
            os.close(descriptor)
