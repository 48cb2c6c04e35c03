"""AdamW over chunks, in the place of PyTorch's inside an optimizer of megatron-core."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megapatch.models.device import Device
from megapatch.trainer.offload.chunks import FLOAT_BYTES, ROWS, Chunk, needed_bytes
from megapatch.trainer.offload.engines import Engine, Rates, resident


class ChunkedAdam:
    """What megatron-core asks of an optimizer, and the state of parameters; of its chunks the first lie on the host."""

    def __init__(self, groups: list[dict[str, Any]], chunks: Sequence[Chunk], engine: Engine, device: Device) -> None:
        self.param_groups, self.chunks, self.engine, self.device = groups, chunks, engine, device
        self.state: dict[Any, Any] = {}  # where PyTorch's has it: nothing
        self.updates = 0
        self.count = 0  # of chunks on the host
        self.spent: dict[str, float] = {}  # seconds of the last step
        self.places: dict[Any, list[tuple[Chunk, int]]] = {}  # of each parameter: chunks, and which of their spans
        for chunk in chunks:
            for number, span in enumerate(chunk.spans):
                self.places.setdefault(span.parameter, []).append((chunk, number))

    @property
    def offloaded(self) -> Sequence[Chunk]:
        """Chunks whose state lies on the host."""
        return self.chunks[: self.count]

    def place(self, count: int) -> int:
        """Have the state of the first ``count`` chunks on the host, all others on the device; bytes moved."""
        moved = self.chunks[min(count, self.count) : max(count, self.count)]
        new = [chunk for chunk in self.chunks[self.count :] if not chunk.memory.numel() and chunk not in moved]
        self._settle(moved, on_host=count > self.count)
        self._settle(new, on_host=False)
        self.count = count
        return needed_bytes(moved, mastered=self.engine.mastered)

    def _settle(self, chunks: Sequence[Chunk], *, on_host: bool) -> None:
        sizes = [chunk.size(mastered=on_host and self.engine.mastered) for chunk in chunks]
        if not on_host:
            for chunk, size in zip(chunks, sizes, strict=True):
                chunk.settle(torch.empty(size, device=self.device.torch), on_host=False)
            return
        new = {chunk: size for chunk, size in zip(chunks, sizes, strict=True) if chunk.slot is None}
        slab = self.device.host_memory(sum(new.values()) * FLOAT_BYTES).view(torch.float32)
        for chunk, slot in zip(new, slab.split(list(new.values())), strict=True):
            chunk.slot = slot
        for chunk in chunks:
            assert chunk.slot is not None
            chunk.settle(chunk.slot, on_host=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights from the gradients in megatron-core's buffers."""
        start = time.perf_counter()
        self.updates += 1
        rates = Rates(self.param_groups, self.updates)
        self.engine.start(self.offloaded)
        for chunk in self.chunks[self.count :]:
            resident(chunk, rates)
        begun = time.perf_counter()
        self.spent = self.engine.step(self.offloaded, rates) if self.count else {}
        self.device.synchronize()
        now = time.perf_counter()
        self.spent |= {"exposed_s": now - begun if self.count else 0.0, "optimizer_s": now - start}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients belong to megatron-core's buffers."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def take_weights(self, *, native: bool = False) -> None:
        """Set masters to the weights, which were changed from outside; ``native``: only those of fp32 weights."""
        for chunk in self.chunks:
            if chunk.native or not native:
                chunk.take_weights()

    def tensors(self, parameter: Any) -> dict[str, Tensor]:
        """This rank's part [n] of a parameter's master and moments, in fp32: views, or copies where it was cut."""
        places = self.places[parameter]
        found = {"param": [chunk.masters()[number] for chunk, number in places]}
        for name in ROWS[:2]:
            found[name] = [chunk.pieces(chunk.row(name))[number] for chunk, number in places]
        return {
            name: pieces[0] if len(pieces) == 1 else torch.cat([piece.cpu() for piece in pieces])
            for name, pieces in found.items()
        }

    @torch.no_grad()
    def set_tensors(self, parameter: Any, given: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, of any shape; native weights may be left out, as they are loaded themselves.

        What megatron-core says beside it, such as that it is no padding, is not for Adam.
        """
        names = [name for name in ("param", *ROWS[:2]) if name != "param" or name in given]
        for chunk, number in self.places[parameter]:
            span = chunk.spans[number]
            mine = slice(
                span.first - self._begin(parameter), span.first - self._begin(parameter) + span.stop - span.start
            )
            for name in names:
                piece = chunk.masters()[number] if name == "param" else chunk.pieces(chunk.row(name))[number]
                piece.copy_(given[name].reshape(-1)[mine])

    def _begin(self, parameter: Any) -> int:
        chunk, number = self.places[parameter][0]
        return chunk.spans[number].first


def host_bytes(adams: Iterable[ChunkedAdam]) -> int:
    """Bytes of state in host memory."""
    return sum(chunk.memory.nbytes for adam in adams for chunk in adam.offloaded)


def device_bytes(adams: Iterable[ChunkedAdam]) -> int:
    """Bytes of state on the device."""
    return sum(chunk.memory.nbytes for adam in adams for chunk in adam.chunks[adam.count :])
