"""What code holds, computes, moves and sends, by operator: a dispatch mode over tensors with content or without."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, DEVICE = torch.ops.aten, torch.ops.prim.device.default
EMPTY = ("aten.empty", "aten.new_empty", "aten.detach")  # reads and writes nothing itself


@dataclass(frozen=True)
class Sent:
    """One collective: ``size`` ranks that lie within ``span`` neighbours; ``moved``: bytes this rank sends."""

    size: int
    span: int
    moved: float


@dataclass(eq=False)
class Work:
    """Operators of one piece and pass: (FLOPs, bytes read and written) of each; what is sent between ranks."""

    operators: list[tuple[float, float]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Of matrix products and attention."""
        return sum(flops for flops, _ in self.operators)


@dataclass
class Segment:
    """Between two marks: bytes alive at the begin and end, the most in between, and the work; ``handed`` of the bytes
    at the begin go from one segment to the next."""

    name: str
    begin: int
    peak: int
    handed: int = 0
    stays: bool = False  # what is handed over outlives the pass
    end: int = 0
    work: Work = field(default_factory=Work)


def _matrix(a: Tensor, b: Tensor) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _attention(products: int) -> Callable[..., float]:
    """``products`` of two matrices [s, t] x d for each head; causal ones are half of it."""

    def flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> float:
        causal = any(flag is True for flag in rest) or named.get("is_causal", False)
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return products * scores * (q.shape[3] + v.shape[3]) / (2 if causal else 1)

    return flops


FLOPS: dict[Any, Callable[..., float]] = {  # a multiply-add is two
    aten.mm.default: lambda a, b: _matrix(a, b),
    aten.bmm.default: lambda a, b: _matrix(a, b),
    aten.addmm.default: lambda c, a, b, **_: _matrix(a, b),
    aten.baddbmm.default: lambda c, a, b, **_: _matrix(a, b),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda g, *rest, **named: _attention(5)(
        *rest, **named
    ),
}


class Meter(TorchDispatchMode):
    """Counts bytes of storages that are alive, from the first operator that shows them to their release.

    ``chosen``: how many numbers a masked selection finds, for tensors without content, whose own answer is not known;
    ``times``: how often an operator counts; ``workspace``: bytes that operators hold only while they run.
    """

    def __init__(self, workspace: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self._seen: dict[int, Any] = {}
        self._bytes: dict[int, int] = {}
        self.live = self.highest = self.shared = 0
        self.segments: list[Segment] = []
        self._handed: list[tuple[Segment, Any]] = []
        self.chosen: int | None = None
        self.times = 1.0
        self.workspace = workspace or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # asked for most often, and there is nothing to count
            return func(*args)
        if func is aten.masked_select.default and self.chosen is not None:
            out = args[0].new_empty(self.chosen)
        else:
            out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in made:
            self._keep(tensor, tensor.untyped_storage().nbytes())
        if self.segments:
            self._count(func, args, kwargs or {}, made)
        return out

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These are not counted."""
        for tensor in tensors:
            self._keep(tensor, 0)

    def mark(self, name: str, handed: Tensor | None = None) -> None:
        """A new segment begins."""
        if self.segments:
            self.segments[-1].end = self.live
        self.segments.append(Segment(name, self.live, self.live, 0 if handed is None else _nbytes(handed)))
        if handed is not None:
            self._handed.append((self.segments[-1], weakref.ref(handed.untyped_storage())))

    def end(self) -> None:
        """The last segment ends."""
        self.mark("end")
        for segment, storage in self._handed:
            segment.stays = storage() is not None
        self._handed.clear()

    def share(self, tensor: Tensor) -> None:
        """Not counted from now on: all layers use it."""
        key = tensor.untyped_storage()._cdata
        self.live -= self._bytes[key]
        self._bytes[key] = 0

    def __enter__(self) -> "Meter":
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized()  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _resized(self) -> Callable[..., Any]:
        """What empties a storage and fills it again, as megatron-core does with outputs that it computes again."""

        def resize_(storage: Any, size: int) -> Any:
            if storage._cdata in self._bytes:
                self.live += size - self._bytes[storage._cdata]
                self._bytes[storage._cdata] = size
                self._peak(0)
            return self._resize(storage, size)

        return resize_

    def _keep(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key))
        self._bytes[key] = nbytes
        self.live += nbytes
        self._peak(0)

    def _drop(self, key: int) -> None:
        del self._seen[key]
        self.live -= self._bytes.pop(key)

    def _peak(self, further: int) -> None:
        self.highest = max(self.highest, self.live + further)
        if self.segments:
            self.segments[-1].peak = max(self.segments[-1].peak, self.live + further)

    def _count(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        if func in self.workspace:
            self._peak(self.workspace[func](*args, **kwargs))
        work = self.segments[-1].work
        if func.namespace == "c10d":
            work.sent += list(_sent(func, args))
        if func.namespace != "aten" or func.is_view or str(func).startswith(EMPTY):
            return
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moved = sum(_nbytes(x) for x in (*read, *made))
        flops = FLOPS[func](*args, **kwargs) if func in FLOPS else 0.0
        work.operators.append((flops * self.times, moved * self.times))


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


SHARES = {  # collective -> bytes that each rank sends, in shares of (size - 1) / size of its larger tensor
    "allgather": 1.0,
    "_allgather_base": 1.0,
    "reduce_scatter": 1.0,
    "_reduce_scatter_base": 1.0,
    "alltoall": 1.0,
    "alltoall_base": 1.0,
    "allreduce": 2.0,
    "broadcast": 1.0,
}


def _sent(func: Any, args: Any) -> Iterator[Sent]:
    name = func._schema.name.removeprefix("c10d::").rstrip("_")
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    groups = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
    if name not in SHARES or not groups or not tensors:
        return
    ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(groups[0]))
    size, span = len(ranks), max(ranks) - min(ranks) + 1
    if size > 1:
        yield Sent(size, span, SHARES[name] * (size - 1) / size * max(_nbytes(x) for x in tensors))


@contextmanager
def replaced(names: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Attributes (owner, name) with other values for a while."""
    before = {(owner, name): getattr(owner, name) for owner, name in names}
    for (owner, name), value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
