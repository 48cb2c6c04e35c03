"""What the layers of a block save for their backward pass, by storage, as far as it could wait in host memory."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megapatch.models.planning.meter import replaced


@dataclass(frozen=True)
class Saved:
    """Bytes of one storage; of what is copied, all of it or the lesser parts that are needed; of the smallest of these;
    and of what stays all the same, because somebody else holds it."""

    size: int
    host: int
    least: int
    held: int


class Watch:
    """Sees what layers save; ``resident`` tensors, parameters above all, never leave."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        self.alive = [tensor.detach() for tensor in resident]  # or others take a place that is known
        self.resident = {_key(tensor) for tensor in self.alive}
        self.given: set[int] = set()  # storages that the block's caller holds for longer than the pass
        self.entered = 0  # what the first layer gets, which the caller holds until the pass ends
        self.passing = False
        self.collected: list[tuple[weakref.ref[Tensor], int]] = []
        self.layers: list[tuple[Saved, ...]] = []  # of each layer of the last pass, and of the norm after them

    @contextmanager
    def watching(self, block: Any) -> Iterator[None]:
        """Forward passes of a TransformerBlock are seen."""
        parts = [*block.layers, *([] if block.final_layernorm is None else [block.final_layernorm])]
        hooks = [part.register_forward_pre_hook(lambda *_: self._begin()) for part in parts]
        try:
            with replaced({(block, "forward"): self._around(block, block.forward)}):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _around(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **words: Any) -> Any:
            given = [*args, *(value for name, value in words.items() if name != "hidden_states"), block.input_tensor]
            self.given = {_key(x) for x in given if isinstance(x, Tensor)}
            entered = words["hidden_states"]  # None where they come from another stage
            self.entered = 0 if entered is None else _key(entered)
            self.layers, self.collected, self.passing = [], [], True
            with saved_tensors_hooks(self._pack, lambda tensor: tensor):
                out = forward(*args, **words)
            self._end()
            self.passing = False
            return out

        return within

    def _begin(self) -> None:
        """A layer's forward pass; what is saved before the first layer is nobody's."""
        if not self.passing:
            return  # computed again
        if self.layers:
            self._end()
        self.layers.append(())
        self.collected = []

    def _pack(self, tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # or what a function saves of its own output would never be freed
        if _key(tensor) not in self.resident | self.given:
            self.collected.append((weakref.ref(alone), tensor._version))
        return alone

    def _end(self) -> None:
        """When the layer is done: not what was freed to be computed again, or changed since."""
        found: dict[int, list[Tensor]] = {}
        changed = set()
        for reference, version in self.collected:
            if (tensor := reference()) is not None:
                found.setdefault(_key(tensor), []).append(tensor)
                changed |= {_key(tensor)} if tensor._version != version else set()
        self.layers[-1] = tuple(
            _saved(members, key == self.entered)
            for key, members in found.items()
            if key not in changed and members[0].untyped_storage().nbytes()
        )


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _saved(members: list[Tensor], entered: bool) -> Saved:
    """Of all that was saved of a storage: it is used by each of them, by this function, and by nobody else."""
    storage = members[0].untyped_storage()
    whole, uses = storage.nbytes(), torch._C._storage_Use_Count(storage._cdata)
    held = whole if uses > len(members) + 1 + entered else 0
    views = {(x.storage_offset(), x.shape, x.stride()): x.nbytes for x in members}
    copied = sum(views.values())
    every = whole <= 2 * copied
    return Saved(whole, whole if every else copied, whole if every else min(views.values()), held)
