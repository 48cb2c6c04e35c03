"""How many bytes autograd keeps from the forward pass for the backward pass, parameters left out."""

import gc
import weakref
from collections.abc import Iterator
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
        self.most = 0

    def _pack(self, tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        self.held.add(held)
        return held

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def measure(self) -> None:
        """Count what is held now, each storage once."""
        gc.collect()
        storages = {(s := held.tensor.untyped_storage()).data_ptr(): s.nbytes() for held in self.held}
        self.most = max(self.most, sum(n for place, n in storages.items() if place not in self.parameters))
