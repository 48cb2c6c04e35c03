"""Disks that are full, or fail: one line with path, free and needed bytes, exit status 73. Imports no torch."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapatch.models.cli import UserError
from megapatch.models.commit import FullDisk

EXIT_STATUS = 73  # EX_CANTCREAT of sysexits.h
FULL = {errno.ENOSPC, errno.EDQUOT}
ERRNOS = FULL | {errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.EREMOTEIO}


class DiskError(UserError):
    """A disk that does not take what is to be written, or does not give what is to be read."""

    status = EXIT_STATUS


@contextmanager
def naming(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn errors of the disk under ``target`` into a DiskError; all others pass."""
    try:
        yield
    except (OSError, FullDisk, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise failed(getattr(error, "filename", None) or target, reason, needed_bytes, target) from error


def _reason(error: Exception) -> str | None:
    """What a disk has done, None where it is not the disk."""
    if isinstance(error, OSError):
        return ("disk full" if error.errno in FULL else error.strerror) if error.errno in ERRNOS else None
    if isinstance(error, FullDisk):
        return "disk full"
    of_torch = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))  # of torch.save
    return f"not written ({str(error).splitlines()[0]})" if of_torch else None


def failed(path: str | Path, reason: str, needed_bytes: int | None, target: Path) -> DiskError:
    """The error of an output ``path`` that could not be written below ``target``."""
    there = next(parent for parent in (target.absolute(), *target.absolute().parents) if parent.exists())
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    free = f"{shutil.disk_usage(there).free:,} bytes are free"
    mend = "free space" if reason == "disk full" else "look at the disk, or name another place"
    return DiskError(f"{path}: {reason}: {needed}{free}; what was complete before is kept; {mend} and run again")
