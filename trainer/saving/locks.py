"""Locks between runs that end with the process that holds them, however it ends. Imports no torch."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megapatch.models.cli import UserError

log = logging.getLogger(__name__)
RUN_LOCK = "run.lock"
WAIT_S = 10.0  # for the run before this one, which may be about to end: of a requeued job, say
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}
_held: dict[Path, int] = {}  # by this process


def hold(folder: Path) -> None:
    """Keep other runs out of the folder until ``release``, or until this process ends (UserError if one is in it)."""
    path = folder.resolve() / RUN_LOCK
    if path in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + WAIT_S
    while not _locked(descriptor, path):
        if time.monotonic() > end:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(f"{folder}: another run ({holder}) writes here; wait for it, or name another --save")
        time.sleep(0.1)
    said = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, said.encode(), 0)
    _held[path] = descriptor


def release(folder: Path) -> None:
    """Let other runs in; harmless where nothing is held."""
    if (descriptor := _held.pop(folder.resolve() / RUN_LOCK, None)) is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path, asked: Callable[[], int] = int) -> Iterator[int]:
    """A block that one process at a time is in, of those that name the folder; the others wait.

    Its lock, a descriptor, is held by whom it is passed on to as well. A signal that ``asked`` gives ends the waiting
    (UserError).
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(descriptor, folder):
            log.info("%s: waiting for another run that builds here", folder)
            while not _locked(descriptor, folder):
                if signal := asked():
                    raise UserError(f"signal {signal}: left while another run builds in {folder}; run again to go on")
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    """Take the lock if it is free; where the file system has none, say so and go on without."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s: the file system has no locks (%s); runs here are not kept apart", path, error.strerror)
    return True
