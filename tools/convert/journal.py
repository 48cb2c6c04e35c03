"""The journal of a conversion: which files of a plan are durable, so that a run that was killed can be gone on with.

    X.tmp-journal    JSON lines: the plan's identity, then a line for each finished file; locked while a run lives
    X.tmp-stage/     the files; no loader takes it, as those by which a folder is recognised come last (execute.LAST)

Both lie beside the target X and go when it is in place.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from megapatch.models import commit
from megapatch.models.cli import UserError
from megapatch.tools.convert.execute import LAST, Written
from megapatch.tools.convert.plan import Copy, Delta, Literal, Plan

log = logging.getLogger(__name__)
NOTED_BYTES = 1 << 20  # smaller files are sooner written again than noted
KEPT_BYTES = 64 << 20  # less than this is not kept when a run fails
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def identity(plan: Plan, sources: Mapping[str, Sequence[object]]) -> str:
    """xxh3-128 of all that decides the target's bytes: the plan, and the state of its sources."""
    state = xxhash.xxh3_128(b"1")
    for entry in plan.entries:
        if isinstance(entry, Literal):
            state.update(f"{entry.file} {entry.offset} {entry.size} ".encode() + entry.data)
        else:
            parts = [(str(part.source), *part[1:-1], *_identity(part.delta)) for part in entry.parts]
            scale = entry.scale and (str(entry.scale.source), *entry.scale[1:])
            state.update(repr((*entry._replace(parts=(), scale=None), parts, scale)).encode())
    state.update(repr(sorted(sources.items())).encode())
    return state.hexdigest()


def _identity(delta: Delta | None) -> tuple[object, ...]:
    return delta.identity() if delta else ()


def sources(plan: Plan) -> dict[str, Sequence[object]]:
    """Where each source of the plan really is, its bytes and the time of its last change."""
    paths = {part.source for entry in plan.entries if isinstance(entry, Copy) for part in entry.parts}
    paths |= {entry.scale.source for entry in plan.entries if isinstance(entry, Copy) and entry.scale}
    added = {id(delta.low): delta for e in plan.entries if isinstance(e, Copy) for delta in e.deltas}
    paths |= {path for delta in added.values() for path in delta.sources()}
    stats = {path: path.stat() for path in paths}
    return {str(path): (os.path.realpath(path), s.st_size, s.st_mtime_ns) for path, s in stats.items()}


class Journal:
    """The locked journal of a target; ``kept`` are the files of an interrupted run with the same identity."""

    def __init__(self, target: Path, plan: str) -> None:
        self.path, self.stage = paths(target)
        self.kept: dict[str, Written] = {}
        commit.make_parents(target)
        self._file = self._locked(target)
        try:
            self.found = self._read(plan)
            if not self.found:
                self._begin(plan)
        except BaseException:
            os.close(self._file)
            raise

    def _locked(self, target: Path) -> int:
        """The journal's descriptor, under a lock that ends with this process."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._lock(file, target)
                if self.path.exists() and os.fstat(file).st_nlink:
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # the run that had it has just put its target in place, and removed it

    def _lock(self, file: int, target: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target}: another mp-convert is writing it; wait, or choose another target") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{self.path}: its file system has no locks ({error.strerror}); have it mounted with flock, or "
                "write to another one"
            ) from error

    def _read(self, plan: str) -> bool:
        """Take over what an interrupted run of this plan has finished; False where there is none."""
        with open(self._file, "rb", closefd=False) as file:
            lines = file.read().split(b"\n")
        try:
            if json.loads(lines[0]) != {"plan": plan}:
                log.warning("%s: of an interrupted run with other options or another source; starting anew", self.path)
                return False
        except ValueError:
            return False
        for line in lines[1:-1]:  # the last one has no end: it was being written
            said = json.loads(line)
            name, written = said.pop("file"), Written(**said)
            if self._is(self.stage / name, written):
                self.kept[name] = written
        self._cut(sum(len(line) + 1 for line in lines[:-1]))
        return True

    @staticmethod
    def _is(path: Path, written: Written) -> bool:
        if not path.is_file():
            return False
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (written.bytes, written.mtime_ns)

    def _begin(self, plan: str) -> None:
        self._cut(0)
        self._line({"plan": plan})
        commit.fsync(self.path.parent)

    def _cut(self, size: int) -> None:
        with commit.naming(self.path):
            os.ftruncate(self._file, size)

    def make_stage(self) -> None:
        """The staging folder, with the kept files and no others."""
        self.stage.mkdir(exist_ok=True)
        for path in sorted(self.stage.rglob("*"), reverse=True):  # what is in a folder comes before it
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.stage).as_posix() not in self.kept:
                path.unlink()

    def note(self, name: str, written: Written) -> None:
        """Remember a file that is durable."""
        if written.bytes >= NOTED_BYTES and Path(name).name not in LAST:
            self._line({"file": name, **written._asdict()})
            self.kept[name] = written

    def _line(self, said: dict[str, object]) -> None:
        line = json.dumps(said).encode() + b"\n"
        with commit.naming(self.path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def finish(self) -> None:
        """Nothing is left to go on with."""
        commit.remove(self.stage)
        self.path.unlink()

    def fail(self) -> None:
        """Keep finished files for the next run where they are worth it; remove the others."""
        size = sum(written.bytes for written in self.kept.values())
        if size < KEPT_BYTES:
            self.finish()
            return
        self.make_stage()
        said = "%s: kept %d finished files (%s bytes); the same command goes on from them"
        log.warning(said, self.stage, len(self.kept), f"{size:,}")

    def close(self) -> None:
        """Let others have the lock."""
        os.close(self._file)


def paths(target: Path) -> tuple[Path, Path]:
    """Journal and staging folder of a target."""
    return target.with_name(f"{target.name}.tmp-journal"), target.with_name(f"{target.name}.tmp-stage")
