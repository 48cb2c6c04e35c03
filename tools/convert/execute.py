"""A plan carried out: ranges copied in the kernel where the file system can, through one bounded buffer otherwise."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import Copy, Plan

PIECE_BYTES = 32 << 20  # copied at a time; also the size of each thread's buffer
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class Engine:
    """Copies ranges between open files; ``kernel`` tells whether copy_file_range is used."""

    def __init__(self, kernel: bool = True) -> None:
        self.kernel = kernel and hasattr(os, "copy_file_range")
        self._own = threading.local()

    def copy(self, source: int, source_offset: int, target: int, offset: int, count: int) -> None:
        """Copy ``count`` bytes between file descriptors."""
        done = 0
        while done < count and self.kernel:
            try:
                moved = os.copy_file_range(source, target, count - done, source_offset + done, offset + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self.kernel = False
                break
            _whole(moved)
            done += moved
        view = self._buffer() if done < count else memoryview(b"")
        while done < count:
            part = view[: min(len(view), count - done)]
            read_into(source, part, source_offset + done)
            write_all(target, part, offset + done)
            done += len(part)

    def _buffer(self) -> memoryview:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(PIECE_BYTES))
        return self._own.buffer

    def runs(self, copy: Copy, source: int, target: int) -> None:
        """Carry out a copy of several runs, or with a cast, through the buffer."""
        read_bytes = copy.items * ITEM_BYTES[copy.read]
        for row in range(copy.rows):
            whole = self._buffer()[:read_bytes] if read_bytes <= PIECE_BYTES else memoryview(bytearray(read_bytes))
            read_into(source, whole, copy.source_offset + row * copy.source_step)
            data = whole if copy.read == copy.write else cast(whole, copy.read, copy.write)
            write_all(target, data, copy.offset + row * copy.step)


def _whole(moved: int) -> None:
    if moved == 0:
        raise UserError("a source file became shorter while it was copied; run again")


def read_into(source: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from a file descriptor."""
    done = 0
    while done < len(view):
        moved = os.preadv(source, [view[done:]], offset + done)
        _whole(moved)
        done += moved


def write_all(target: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` to a file descriptor."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)


def cast(data: memoryview, read: str, write: str) -> memoryview:
    """The items of ``data`` in another dtype, rounded as torch rounds."""
    import torch

    made = torch.frombuffer(data, dtype=getattr(torch, read)).to(getattr(torch, write))
    return made.view(torch.uint8).numpy().data


def pieces(copy: Copy) -> Iterator[Copy]:
    """The same copy in parts of about PIECE_BYTES."""
    item = max(ITEM_BYTES[copy.read], ITEM_BYTES[copy.write])
    if copy.rows > 1:
        step = max(1, PIECE_BYTES // (copy.items * item))
        for row in range(0, copy.rows, step):
            start, to = copy.source_offset + row * copy.source_step, copy.offset + row * copy.step
            yield copy._replace(rows=min(step, copy.rows - row), source_offset=start, offset=to)
        return
    step = PIECE_BYTES // item
    for at in range(0, copy.items, step):
        start, to = copy.source_offset + at * ITEM_BYTES[copy.read], copy.offset + at * ITEM_BYTES[copy.write]
        yield copy._replace(items=min(step, copy.items - at), source_offset=start, offset=to)


def execute(plan: Plan, folder: Path, jobs: int, tell: Callable[[int], Any], kernel: bool = True) -> None:
    """Write the plan's files into ``folder``; ``tell`` hears of bytes written."""
    engine = Engine(kernel)
    for name in plan.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        opened: dict[Path, int] = {}

        def descriptor(path: Path, flags: int) -> int:
            if path not in opened:
                opened[path] = os.open(path, flags, 0o666)
                stack.callback(os.close, opened[path])
            return opened[path]

        targets = {name: descriptor(folder / name, os.O_RDWR | os.O_CREAT) for name in plan.files}
        sources = {path: descriptor(path, os.O_RDONLY) for path in {copy.source for copy in plan.copies}}
        for name, size in plan.files.items():
            os.truncate(targets[name], size)
        for literal in plan.literals:
            write_all(targets[literal.file], literal.data, literal.offset)

        def work(copy: Copy) -> int:
            source, target = sources[copy.source], targets[copy.file]
            if copy.plain:
                engine.copy(source, copy.source_offset, target, copy.offset, copy.size)
            else:
                engine.runs(copy, source, target)
            return copy.size

        with ThreadPoolExecutor(jobs) as pool:
            todo = [pool.submit(work, piece) for copy in plan.copies for piece in pieces(copy)]
            try:
                for future in todo:
                    tell(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
