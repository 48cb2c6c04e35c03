"""Files joined into one: each is read once, through a small buffer, and digested on the way.

Measured with copy_file_range beside it (1 GB in the page cache, CPU-seconds): on ext4 0.34 with digest in the buffer,
0.43 in the kernel, 0.55 in the kernel with the source digested beside; on tmpfs 0.51, 0.45 and 0.58. So the kernel
copies only where no digest is asked for: file systems that share blocks, or servers that copy by themselves, gain.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from megapatch.models.cli import UserError
from megapatch.models.commit import naming

_BUFFER_BYTES = 1 << 20  # stays in the processor's cache
_KERNEL_BYTES = 1 << 28  # a call, so that progress shows
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # other file systems, or one that cannot


class Appender:
    """A new file that grows by whole files; ``digests``: learn the xxh3-128 of what is read and of all together."""

    def __init__(self, target: Path, tell: Callable[[int], Any], *, digests: bool) -> None:
        self._file, self.target, self._tell = target.open("xb", buffering=0), target, tell
        self._whole = xxhash.xxh3_128() if digests else None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def digest(self) -> str | None:
        """xxh3-128 of all that was appended, None without digests."""
        return self._whole and self._whole.hexdigest()

    def add(self, path: Path, num_bytes: int) -> str | None:
        """Append the file, which has ``num_bytes``; its xxh3-128, None without digests."""
        with path.open("rb", buffering=0) as source:
            done = 0 if self._whole else self._by_kernel(source.fileno(), num_bytes)
            state = xxhash.xxh3_128() if self._whole else None
            for data in self._blocks(source.fileno(), path, done, num_bytes):
                if state:
                    state.update(data)
                self._write(data)
        return state and state.hexdigest()

    def add_as(self, path: Path, num_bytes: int, dtype: np.dtype) -> None:
        """Append the file's bytes, each as a number of ``dtype``."""
        with path.open("rb", buffering=0) as source:
            for data in self._blocks(source.fileno(), path, 0, num_bytes):
                self._write(np.frombuffer(data, np.uint8).astype(dtype).view(np.uint8).data)

    def _blocks(self, source: int, path: Path, done: int, num_bytes: int) -> Iterator[memoryview]:
        while done < num_bytes:
            with naming(path):
                got = os.preadv(source, [self._buffer[: num_bytes - done]], done)
            if not got:
                raise UserError(f"{path}: ended at byte {done:,} of {num_bytes:,}; it changed: merge it again")
            yield self._buffer[:got]
            done += got

    def _write(self, data: memoryview) -> None:
        self._tell(len(data))
        if self._whole:
            self._whole.update(data)
        with naming(self.target):
            while data:
                data = data[os.write(self._file.fileno(), data) :]

    def _by_kernel(self, source: int, num_bytes: int) -> int:
        """Bytes that the kernel copied: all, or as many as it could."""
        done = 0
        while done < num_bytes:
            try:
                moved = os.copy_file_range(source, self._file.fileno(), min(num_bytes - done, _KERNEL_BYTES), done)
            except OSError as error:
                if error.errno in _CANNOT:
                    return done
                error.filename = str(self.target)
                raise
            if not moved:  # the end, or a file system that says so wrongly; reading will tell
                return done
            done += moved
            self._tell(moved)
        return done
