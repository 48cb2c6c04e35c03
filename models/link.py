"""Copies between the device and host memory beside the computation, and host buffers to copy to.

On a GPU a lane is a stream; on a CPU it is a thread that copies between two parts of the same memory, at a stated rate
if one is to be emulated. Whoever waits for a copy sees the same bytes in both.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SLAB_BYTES = 256 << 20  # taken from the system at once
STEPS = 8  # sizes of buffers between one power of two and the next
ALIGN_BYTES = 512


class Copy(Protocol):
    """A copy under way; it holds both ends until it was waited for."""

    def done(self) -> bool:
        """Whether it has ended."""

    def drop(self) -> None:
        """Let both ends go, which are not used again until the copy has ended."""


class Lane(Protocol):
    """Copies in one direction, one after the other, in the order in which they were asked for."""

    copied_bytes: int  # in all

    def copy(self, target: Tensor, source: Tensor, after: Copy | None = None) -> Copy:
        """Start to copy bytes [n] to [n], after what was computed so far and after another copy."""

    def wait(self, copy: Copy) -> None:
        """What is computed from now on comes after the copy."""

    def waited_s(self) -> float:
        """Seconds that the computation stood still for copies since this was asked last, when the device is idle."""


def lanes(device: torch.device, bytes_per_s: float | None = None, count: int = 2) -> list[Lane]:
    """Lanes between ``device`` and host memory; on a CPU the rate of each can be emulated."""
    if device.type != "cpu":
        return [StreamLane(device) for _ in range(count)]
    return [ThreadLane(bytes_per_s) for _ in range(count)]


class StreamCopy:
    """A copy on a stream of the GPU."""

    def __init__(self, ends: tuple[Tensor, Tensor], stream: Any, ended: Any) -> None:
        self.ends, self.stream, self.ended = ends, stream, ended

    def done(self) -> bool:
        return bool(self.ended.query())

    def drop(self) -> None:
        for end in self.ends:
            if end.device.type != "cpu" and not self.done():
                end.record_stream(self.stream)
        self.ends = ()  # type: ignore[assignment]


class StreamLane:
    """A stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.api: Any = torch.get_device_module(device)
        self.stream = self.api.Stream(device)
        self.copied_bytes = 0
        self.waits: list[tuple[Any, Any]] = []

    def copy(self, target: Tensor, source: Tensor, after: Copy | None = None) -> StreamCopy:
        self.stream.wait_stream(self.api.current_stream())
        if isinstance(after, StreamCopy):
            self.stream.wait_event(after.ended)
        with self.api.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.copied_bytes += source.nbytes
        return StreamCopy((target, source), self.stream, self.stream.record_event())

    def wait(self, copy: Copy) -> None:
        assert isinstance(copy, StreamCopy)
        now = self.api.current_stream()
        before, after = (self.api.Event(enable_timing=True) for _ in range(2))
        before.record(now)
        now.wait_event(copy.ended)
        after.record(now)
        self.waits.append((before, after))
        copy.ends = ()  # type: ignore[assignment]  # what is freed here is used again by this stream alone, after the copy

    def waited_s(self) -> float:
        self.api.synchronize()
        waits, self.waits = self.waits, []
        return sum(before.elapsed_time(after) for before, after in waits) / 1e3


class ThreadCopy:
    """A copy by a thread."""

    def __init__(self, ended: "Future[None]") -> None:
        self.ended = ended

    def done(self) -> bool:
        return self.ended.done()

    def drop(self) -> None:
        """The thread holds both ends until it has copied."""


class ThreadLane:
    """A thread that stands for a copy engine."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="link")
        self.copied_bytes, self.waited = 0, 0.0

    def copy(self, target: Tensor, source: Tensor, after: Copy | None = None) -> ThreadCopy:
        assert target.nbytes == source.nbytes and target.is_contiguous() and source.is_contiguous()
        self.copied_bytes += source.nbytes
        return ThreadCopy(self.thread.submit(self._move, target, source, after))

    def _move(self, target: Tensor, source: Tensor, after: Copy | None) -> None:
        if isinstance(after, ThreadCopy):
            after.ended.result()
        start = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)  # others compute meanwhile: no lock is held
        if self.bytes_per_s:
            time.sleep(max(0.0, start + source.nbytes / self.bytes_per_s - time.perf_counter()))

    def wait(self, copy: Copy) -> None:
        assert isinstance(copy, ThreadCopy)
        start = time.perf_counter()
        copy.ended.result()
        self.waited += time.perf_counter() - start

    def waited_s(self) -> float:
        waited, self.waited = self.waited, 0.0
        return waited


@dataclass
class Buffer:
    """Host memory [n] bytes; ``last`` is the copy that may still be using it."""

    memory: Tensor
    last: Copy | None = None


@dataclass
class Pool:
    """Host buffers that are used again; ``allocate`` gives memory of so many bytes, pinned where there is a GPU.

    Sizes are rounded up by at most an eighth, so that those that vary, as of experts, share buffers.
    """

    allocate: Callable[[int], Tensor]
    slab_bytes: int = SLAB_BYTES
    used_bytes: int = 0
    peak_bytes: int = 0  # of used_bytes
    held_bytes: int = 0  # taken from the system
    free: dict[int, list[Buffer]] = field(default_factory=dict)
    rests: list[Tensor] = field(default_factory=list)  # of slabs

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least ``nbytes``."""
        size = rounded(nbytes)
        waiting = self.free.get(size)
        buffer = waiting.pop(0) if waiting else Buffer(self._new(size))  # the oldest: its last copy has ended first
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back."""
        self.used_bytes -= buffer.memory.numel()
        self.free.setdefault(buffer.memory.numel(), []).append(buffer)

    def _new(self, size: int) -> Tensor:
        place = next((i for i, rest in enumerate(self.rests) if rest.numel() >= size), None)
        if place is None:
            slab = max(self.slab_bytes, size)
            self.rests.append(self.allocate(slab))
            self.held_bytes += slab
            place = len(self.rests) - 1
        rest = self.rests[place]
        self.rests[place] = rest[size:]
        return rest[:size]


def rounded(nbytes: int) -> int:
    """The size of the buffer for ``nbytes``: one of STEPS between powers of two, a multiple of ALIGN_BYTES."""
    step = max(ALIGN_BYTES, (1 << max(0, nbytes - 1).bit_length()) // (2 * STEPS))
    return -(-nbytes // step) * step
