"""Adam on chunks: where they lie, on the host's processors, or streamed through the device; all give the same bits."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megapatch.models.link import Copy, Lane
from megapatch.models.planning.stages import AHEAD
from megapatch.trainer.offload.chunks import FLOAT_BYTES, ROWS, Chunk, Parts, stride

CASTS = 2  # chunks whose weights are on their way
POLL_S = 2e-5
RESIDENT = -1  # key of a chunk's own memory and gradient; others are those of slots


@dataclass
class Rates:
    """Adam's settings for this update, by parameter group."""

    groups: Sequence[dict[str, Any]]
    update: int  # counted from 1

    def __post_init__(self) -> None:
        self.steps: dict[torch.device, Tensor] = {}

    def adamw(self, parts: Parts, device: torch.device) -> None:
        """Update masters and moments, which lie on ``device``."""
        step = self.steps.setdefault(device, torch.tensor(float(self.update), device=device))
        for number, rows in parts:
            fused_adamw(self.groups[number], rows, step)


def fused_adamw(group: dict[str, Any], rows: Sequence[list[Tensor]], step: Tensor) -> None:
    """PyTorch's kernel on lists of masters, gradients and two moments; ``step`` [] counts updates from 1."""
    masters, gradients, first, second = rows
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        masters,
        gradients,
        first,
        second,
        [],
        [step] * len(masters),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


class Engine(Protocol):
    """Updates chunks whose state lies in host memory."""

    name: str
    mastered: bool  # fp32 weights have masters in host memory too
    device_bytes: int  # that it holds on the device
    host_bytes: int  # and in host memory

    def start(self, chunks: Sequence[Chunk]) -> None:
        """Begin with what the first chunks need; gradients must be final."""

    def step(self, chunks: Sequence[Chunk], rates: Rates) -> dict[str, float]:
        """Update all chunks; seconds by what they were for. Weights are on the device when it returns."""


def resident(chunk: Chunk, rates: Rates) -> None:
    """Update a chunk whose state lies on the device."""
    rates.adamw(chunk.parts(RESIDENT, chunk.gradient, chunk.memory), chunk.memory.device)
    if chunk.has_master:
        for view, start, stop in chunk.targets:
            view.copy_(chunk.row("master")[start:stop])


def finish(copy: Copy) -> None:
    """Have the host wait for a copy."""
    while not copy.done():
        time.sleep(POLL_S)


class CpuEngine:
    """Gradients come to the host, its processors run Adam, weights go back: 4 and 2 (bf16) bytes a parameter."""

    name, mastered, device_bytes = "cpu", True, 0

    def __init__(self, down: Lane, up: Lane, largest: int, width: int, host: Callable[[int], Tensor]) -> None:
        """``largest`` chunk in elements, with weights of ``width`` bytes; ``host`` gives memory of so many bytes."""
        self.down, self.up = down, up
        memory = host(self.staged_bytes(largest, width))
        self.host_bytes = memory.nbytes
        gradients, casts = memory.split([AHEAD * largest * FLOAT_BYTES, memory.numel() - AHEAD * largest * FLOAT_BYTES])
        self.gradients = gradients.view(torch.float32).chunk(AHEAD)
        self.casts = casts.chunk(CASTS) if casts.numel() else ()
        self.sent: list[list[Copy]] = [[] for _ in range(CASTS)]  # from each of the casts
        self.coming: deque[Copy] = deque()

    @staticmethod
    def staged_bytes(largest: int, width: int) -> int:
        """Host memory for gradients and weights on their way."""
        return largest * (AHEAD * FLOAT_BYTES + (CASTS * width if width != FLOAT_BYTES else 0))

    def start(self, chunks: Sequence[Chunk]) -> None:
        for at in range(min(AHEAD, len(chunks))):
            self._fetch(chunks[at], at)

    def _fetch(self, chunk: Chunk, at: int) -> None:
        self.coming.append(self.down.copy(self.gradients[at % AHEAD][: chunk.numel], chunk.gradient))

    def step(self, chunks: Sequence[Chunk], rates: Rates) -> dict[str, float]:
        watch = Stopwatch()
        sent: list[Copy] = []
        for at, chunk in enumerate(chunks):
            copy = self.coming.popleft()
            finish(copy)
            self.down.wait(copy)
            watch.lap("d2h_wait_s")
            parts = chunk.parts(at % AHEAD, self.gradients[at % AHEAD][: chunk.numel], chunk.memory)
            rates.adamw(parts, chunk.memory.device)
            watch.lap("adam_s")
            if at + AHEAD < len(chunks):
                self._fetch(chunks[at + AHEAD], at + AHEAD)
            for copy in self.sent[at % CASTS]:
                finish(copy)
            watch.lap("h2d_wait_s")
            self.sent[at % CASTS] = self._send(chunk, at)
            sent += self.sent[at % CASTS]
            watch.lap("cast_s")
        for copy in sent:
            finish(copy)
            self.up.wait(copy)
        watch.lap("h2d_wait_s")
        return watch.laps

    def _send(self, chunk: Chunk, at: int) -> list[Copy]:
        """Start to bring a chunk's weights to the device."""
        master = chunk.row("master")
        if chunk.native:
            return [self.up.copy(view, master[start:stop]) for view, start, stop in chunk.targets]
        cast = self.casts[at % CASTS].view(chunk.views[0].dtype)[: chunk.numel].copy_(master)
        return [self.up.copy(view, cast[start:stop]) for view, start, stop in chunk.targets]


class StreamEngine:
    """State comes to the device chunk by chunk and goes back: 12 bytes a parameter each way, 8 of fp32 weights."""

    name, mastered, host_bytes = "stream", False, 0

    def __init__(self, down: Lane, up: Lane, largest: int, device: torch.device) -> None:
        """``largest`` chunk in elements."""
        self.down, self.up = down, up
        self.slots = [torch.empty(stride(largest) * len(ROWS), device=device) for _ in range(AHEAD)]
        self.device_bytes = sum(slot.nbytes for slot in self.slots)
        self.leaving: list[Copy | None] = [None] * AHEAD  # from each of the slots
        self.coming: deque[Copy] = deque()

    def start(self, chunks: Sequence[Chunk]) -> None:
        for at in range(min(AHEAD - 1, len(chunks))):
            self._fetch(chunks[at], at)

    def _fetch(self, chunk: Chunk, at: int) -> None:
        slot = self.slots[at % AHEAD][: chunk.memory.numel()]
        self.coming.append(self.up.copy(slot, chunk.memory, after=self.leaving[at % AHEAD]))

    def step(self, chunks: Sequence[Chunk], rates: Rates) -> dict[str, float]:
        watch = Stopwatch()
        for at, chunk in enumerate(chunks):
            if at + AHEAD - 1 < len(chunks):
                self._fetch(chunks[at + AHEAD - 1], at + AHEAD - 1)
            self.up.wait(self.coming.popleft())
            watch.lap("h2d_wait_s")
            slot = self.slots[at % AHEAD][: chunk.memory.numel()]
            rates.adamw(chunk.parts(at % AHEAD, chunk.gradient, slot), slot.device)
            if chunk.has_master:
                for view, start, stop in chunk.targets:
                    view.copy_(chunk.row("master", slot)[start:stop])
            watch.lap("adam_s")
            self.leaving[at % AHEAD] = self.down.copy(chunk.memory, slot)
        for copy in self.leaving:
            if copy is not None:
                finish(copy)
                self.down.wait(copy)
        self.leaving = [None] * AHEAD
        watch.lap("d2h_wait_s")
        return watch.laps


class Stopwatch:
    """Seconds between calls, summed by name."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Count the seconds since the last call for ``name``."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now
