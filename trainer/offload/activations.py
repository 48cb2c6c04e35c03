"""Activations of chosen layers wait for the backward pass in host memory; results are the same to the bit.

What autograd saves inside a layer is collected. When the layer is done, each storage among it starts on its way out, in
one piece however many views of it were saved. Two layers at most are on their way: then the computation waits. In the
backward pass a layer's first use of what it saved sends for what the layer before it needs. Whoever still needs the
memory of a device or of the host holds it, and it is free when the last saved tensor is: pipeline schedules,
interleaved chunks and recomputation need nothing more.
"""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megapatch.models.cli import UserError
from megapatch.models.device import Device
from megapatch.models.link import Pool, lanes
from megapatch.models.load import unwrapped
from megapatch.models.planning.stages import UNDER_WAY
from megapatch.models.space import DoesNotFit, free_bytes, short
from megapatch.trainer.offload.activation_options import PARTS
from megapatch.trainer.offload.activation_storage import Group, Link, Saved, Stored
from megapatch.trainer.options import TrainOptions

log = logging.getLogger(__name__)


class Offload:
    """Sends what layers save to host memory and brings it back; one for all chunks of a process."""

    def __init__(self, link: Link, resident: Iterable[Tensor], min_bytes: int) -> None:
        """``resident`` tensors, parameters above all, and views of them stay."""
        self.link, self.min_bytes = link, max(min_bytes, 1)
        self.resident = {tensor.untyped_storage().data_ptr() for tensor in resident}
        self.under_way: deque[Group] = deque()
        self.group: Group | None = None
        self.inside, self.passing = False, False
        self.shared: set[int] = set()  # storages that a block's caller holds
        self.told = False
        self.fetched: Callable[[], None] = lambda: None  # called when a layer's activations were sent for

    def attach(self, block: Any, chosen: Iterable[int], modules: Sequence[str]) -> None:
        """Watch a TransformerBlock; ``chosen`` of its layers send what they, or these modules of theirs, save."""
        send = set(chosen)
        _around(block, lambda *args, **words: self._pass(block, args, words))
        for at, layer in enumerate(block.layers):
            parts = [layer.get_submodule(name) for name in modules]
            _around(layer, partial(self._layer, at in send and not parts))
            for part in parts if at in send else ():
                _around(part, self._part)

    @contextmanager
    def _pass(self, block: Any, args: Sequence[Any], words: Mapping[str, Any]) -> Iterator[None]:
        """A forward pass through a block; its caller holds what it gives to all layers, and what came from a stage."""
        given = [*args, *(value for name, value in words.items() if name != "hidden_states"), block.input_tensor]
        self.shared = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        self.passing, self.group, self.inside = True, None, False
        try:
            with saved_tensors_hooks(self._pack, Saved.get):
                yield
            self._send()
        finally:
            self.passing, self.group, self.inside = False, None, False

    @contextmanager
    def _layer(self, whole: bool, *_: Any, **__: Any) -> Iterator[None]:
        """A layer's forward pass; what is saved after it, as by a function that computes it again, is its too."""
        if self.passing:  # not when it is computed again
            self._send()
            self.group, self.inside = Group(self.group, self.fetched), whole
        yield

    @contextmanager
    def _part(self, *_: Any, **__: Any) -> Iterator[None]:
        self.inside, before = self.passing, self.inside
        try:
            yield
        finally:
            self.inside = before

    def _pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor, self.group)
        if self.inside and self.group is not None and self._worth(tensor):
            self.group.collected.append(saved)
        return saved

    def _worth(self, tensor: Tensor) -> bool:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
        if not plain or (storage := tensor.untyped_storage()).nbytes() < self.min_bytes:
            return False
        return storage.data_ptr() not in self.resident and storage.data_ptr() not in self.shared

    def _send(self) -> None:
        """Start to copy what the last layer collected; wait where too much is under way."""
        if self.group is None:
            return
        collected, self.group.collected = self.group.collected, []
        for members in _by_storage(collected):
            for stored in self._moved(members):
                self.group.stored.append(weakref.ref(stored))
        if self.group.stored:
            self.under_way.append(self.group)
        while self.under_way and (len(self.under_way) > UNDER_WAY or _ended(self.under_way[0])):
            for stored in self.under_way.popleft().alive():
                stored.leave()

    def _moved(self, members: Sequence[Saved]) -> list[Stored]:
        """Move tensors that share a storage: all of it, or each view alone where they are the lesser part of it."""
        storage, views = members[0].tensor.untyped_storage(), {saved.place: saved.tensor for saved in members}
        if storage.nbytes() <= 2 * sum(view.nbytes for view in views.values()):
            whole = Stored(self.link, storage)
            for saved in members:
                saved.move(whole)
            return [whole]
        pieces = {
            place: Stored(self.link, view.clone(memory_format=torch.contiguous_format).untyped_storage())
            for place, view in views.items()
            if view.nbytes >= self.min_bytes
        }
        for saved in members:
            if saved.place in pieces:
                saved.move(pieces[saved.place], storage.nbytes())
        return list(pieces.values())

    def measures(self) -> dict[str, int | float]:
        """For the log: bytes moved and seconds waited since this was asked last, and the most host memory in use."""
        found = {
            "activations_out_bytes": self.link.out.copied_bytes,
            "activations_back_bytes": self.link.back.copied_bytes,
            "activations_pool_bytes": self.link.pool.peak_bytes,
            "activations_wait_s": self.link.out.waited_s() + self.link.back.waited_s(),
        }
        self.link.out.copied_bytes = self.link.back.copied_bytes = 0
        return found

    def most(self, device: torch.device) -> dict[str, float]:
        """The same, of the rank where each is largest (all ranks call)."""
        mine = self.measures()
        largest = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        self._tell(largest[0].item())
        return {
            name: value if name.endswith("_s") else int(value)
            for name, value in zip(mine, largest.tolist(), strict=True)
        }

    def _tell(self, out_bytes: float) -> None:
        """After the first step say whether all of it was for nothing."""
        if not self.told and not out_bytes:
            least = f"{short(self.min_bytes)}B (--offload-activation-min-kib)"
            log.info("--offload-activations: no tensor left the device: all that these layers keep is under %s", least)
        self.told = True


def start(options: TrainOptions, device: Device, models: Sequence[Any]) -> Offload | None:
    """Have the chunks of this process's stage do what --offload-activations says."""
    if options.offload_activations is None:
        return None
    rate, where = options.offload_link_gb_per_s, device.torch
    if rate and device.kind != "cpu":
        raise UserError("--offload-link-gb-per-s: a GPU has a link of its own; leave it away")
    resident = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    parts = [PARTS[name] for name in options.offload_activation_modules]
    out, back = lanes(where, rate and rate * 1e9)
    link = Link(out, back, Pool(partial(_host_memory, device)))
    offload = Offload(link, resident, options.offload_activation_min_kib << 10)
    for block in (unwrapped(model).decoder for model in models):
        layers = [layer.layer_number - 1 for layer in block.layers]
        offload.attach(block, [layers.index(number) for number in options.offloaded(layers)], parts)
    return offload


def _host_memory(device: Device, nbytes: int) -> Tensor:
    """Host memory [nbytes]; DoesNotFit where there is not so much."""
    if nbytes > (free := free_bytes()):
        raise DoesNotFit(
            f"--offload-activations: {short(nbytes)}B more of host memory are needed, {short(free)}B are free (cgroup "
            "limits counted); name fewer layers, or --offload-activation-modules"
        )
    return device.host_memory(nbytes)


def _around(module: Any, context: Callable[[], Any]) -> None:
    """Let a module's forward pass run in a context."""
    forward = module.forward

    @wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs):
            return forward(*args, **kwargs)

    module.forward = within


def _by_storage(collected: Iterable[Saved]) -> list[list[Saved]]:
    """Those that can go, by storage: not what was freed to be computed again, or changed since."""
    found: dict[int, list[Saved]] = {}
    for saved in collected:
        found.setdefault(saved.tensor.untyped_storage().data_ptr(), []).append(saved)
    return [members for members in found.values() if _can_go(members)]


def _can_go(members: Sequence[Saved]) -> bool:
    unchanged = all(saved.version == saved.tensor._version for saved in members)
    return unchanged and members[0].tensor.untyped_storage().nbytes() > 0


def _ended(group: Group) -> bool:
    return all(stored.out.done() for stored in group.alive())
