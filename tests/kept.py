"""How many bytes autograd keeps from the forward pass for the backward pass, parameters left out."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Held:
    """A tensor kept for the backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Sees each tensor that autograd keeps while ``watching``."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.held: weakref.WeakSet[_Held] = weakref.WeakSet()
        self.most, self.total = 0, 0
        self.settle: Callable[[], Any] = lambda: None

    def _pack(self, tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        self.held.add(held)
        return held

    def watch_offload(self, offload: Any) -> None:
        """See what --offload-activations (trainer/offload/activations.py) holds: what it has on the device counts."""
        pack = offload._pack

        def packed(tensor: torch.Tensor) -> Any:
            saved = pack(tensor)
            self.held.add(saved)
            return saved

        offload._pack = packed
        self.settle = lambda: [stored.leave() for group in offload.under_way for stored in group.alive()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def measure(self) -> None:
        """Count what is held now, each storage once, and not what is on its way out."""
        self.settle()
        gc.collect()
        storages = {s.data_ptr(): s.nbytes() for held in self.held if (s := _storage(held)) is not None}
        now = sum(n for place, n in storages.items() if place not in self.parameters)
        self.most, self.total = max(self.most, now), self.total + now


def _storage(held: Any) -> torch.UntypedStorage | None:
    """Where on the device a saved tensor is; None: it is in host memory."""
    stored = getattr(held, "stored", None)
    return stored.storage if stored is not None else held.tensor.untyped_storage()
