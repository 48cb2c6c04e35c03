"""What autograd holds of a layer when it may lie in host memory: storages, places in them, and whose they are."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapatch.models.link import Buffer, Copy, Lane, Pool

Place = tuple[Any, torch.Size, tuple[int, ...]]  # offset, shape, strides


@dataclass(frozen=True)
class Link:
    """Ways out and back, and the host memory between."""

    out: Lane
    back: Lane
    pool: Pool


class Stored:
    """One storage: on the device, in host memory, or on its way."""

    def __init__(self, link: Link, storage: torch.UntypedStorage) -> None:
        self.link, self.device = link, storage.device
        self.storage: torch.UntypedStorage | None = storage
        self.nbytes = storage.nbytes()
        self.buffer: Buffer = link.pool.take(self.nbytes)
        self.out: Copy = link.out.copy(self.host, _bytes(storage), self.buffer.last)
        self.back: Copy | None = None
        self.arrived = False

    @property
    def host(self) -> Tensor:
        """Its place in host memory [nbytes]."""
        return self.buffer.memory[: self.nbytes]

    def leave(self) -> None:
        """Free it on the device: what is computed from now on comes after the copy."""
        self.link.out.wait(self.out)
        self.storage = None

    def fetch(self) -> None:
        """Start to bring it back, unless it is there or on its way."""
        if self.storage is None:
            target = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            self.storage = target.untyped_storage()
            self.back = self.link.back.copy(target, self.host, self.out)

    def here(self) -> torch.UntypedStorage:
        """The storage on the device, whose content is there for what is computed from now on."""
        self.fetch()
        assert self.storage is not None
        if self.back is not None and not self.arrived:
            self.link.back.wait(self.back)
            self.arrived = True
        return self.storage

    def __del__(self) -> None:
        last = self.back or self.out
        last.drop()
        self.buffer.last = last
        self.link.pool.give(self.buffer)


class Saved:
    """What autograd holds in the place of a tensor."""

    def __init__(self, tensor: Tensor, group: "Group | None") -> None:
        self.tensor = tensor.detach()  # another name for it, or what a function saves of its own output is never freed
        self.version = tensor._version
        self.group = group
        self.stored: Stored | None = None

    @property
    def place(self) -> Place:
        """Where the tensor lies in its storage."""
        return self.tensor.storage_offset(), self.tensor.shape, self.tensor.stride()

    def move(self, stored: Stored, spread: int = 0) -> None:
        """Hold a place in a storage instead of a tensor; or its elements alone, of a storage of ``spread`` bytes."""
        self.moved_from, self.spread = self.place, spread
        self.tensor, self.stored = self.tensor.new_empty(0), stored

    def get(self) -> Tensor:
        """The tensor, on the device."""
        if self.group is not None:
            self.group.used()
        if self.stored is None:
            return self.tensor
        storage = self.stored.here()
        if not self.spread:
            return self.tensor.new_empty(0).set_(storage, *self.moved_from)
        whole = torch.empty(self.spread, dtype=torch.uint8, device=self.tensor.device).untyped_storage()
        found = self.tensor.new_empty(0).set_(whole, *self.moved_from)  # strides as they were: kernels depend on them
        alone = torch.empty(0, dtype=torch.uint8, device=found.device).set_(storage)
        return found.copy_(alone.view(found.dtype).view(found.shape))


class Group:
    """What one layer saved in one forward pass; ``before``: the layer whose backward pass comes next."""

    def __init__(self, before: "Group | None", fetched: Callable[[], None]) -> None:
        self.before, self.fetched = before, fetched
        self.collected: list[Saved] = []
        self.stored: list[weakref.ref[Stored]] = []
        self.first_use = True

    def alive(self) -> list[Stored]:
        """What somebody still needs."""
        return [stored for reference in self.stored if (stored := reference())]

    def used(self) -> None:
        """At the first use of anything: send for all, and for what the next layer will need."""
        if self.first_use:
            self.first_use = False
            for group in (self, self.before):
                for stored in group.alive() if group else ():
                    stored.fetch()
            self.before = None
            self.fetched()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as bytes [n]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
