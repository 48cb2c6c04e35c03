"""The device's memory where the device is a CPU: what the C library has given out, less what stands for host memory.

The memory that a process is said to have (resident) also counts libraries, holes between what is in use, and both ends
of an emulated link. What is counted here is what a GPU's allocator would count.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2; ``uordblks`` and ``hblkhd`` are bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@cache
def _ask() -> Any:
    """glibc's mallinfo2, None in other C libraries."""
    found = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is not None:
        found.restype = _Mallinfo2
    return found


def given_out() -> int:
    """Bytes that the C library has given out to the main thread's code; 0 where it does not tell."""
    if (ask := _ask()) is None:
        return 0
    info = ask()
    return int(info.uordblks) + int(info.hblkhd)


class HeldPeak:
    """The most that is held on a CPU that stands for a device; ``host`` gives the bytes that stand for host memory."""

    def __init__(self, host: Callable[[], int]) -> None:
        self.host, self.most = host, 0

    def note(self, *_: Any) -> None:
        """Look now."""
        self.most = max(self.most, given_out() - self.host())

    def watch(self, layers: Sequence[Any]) -> None:
        """Look whenever a layer has computed, or its backward pass begins."""
        for layer in layers:
            layer.register_forward_hook(self._computed)

    def _computed(self, _: Any, __: Any, output: Any) -> None:
        self.note()
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(self.note)

    def measures(self) -> dict[str, int]:
        """For the log: the most so far, if it could be counted."""
        return {"device_memory_bytes": self.most} if self.most > 0 else {}
