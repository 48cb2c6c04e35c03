"""Parts of a rank's gradient buffers, whose optimizer state lies in one piece: on the device or in host memory.

A chunk is a range of the shard that this rank updates of a bucket of megatron-core's gradient buffers. What lies
together there lies together in the chunk's state too, so that one copy brings its gradients, and one its weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GRAIN = 64  # a parameter is cut at multiples of so many elements: vectorised Adam then rounds each as in one piece
ROWS = ("exp_avg", "exp_avg_sq", "master")  # of a chunk's state, one after the other
FLOAT_BYTES = 4
STAGGER, STAGGERED_FROM = 65 * 2**10 // FLOAT_BYTES, 2**20  # elements: rows that begin at the same place of large
# powers of two contend for the same sets of a cache
Parts = list[tuple[int, list[list[Tensor]]]]  # by parameter group: pieces of masters, gradients and both moments


@dataclass(frozen=True)
class Span:
    """Elements ``start`` to ``stop`` of a shard or chunk: those of a parameter from its element ``first`` on."""

    parameter: Any
    group: int  # its parameter group, which has its learning rate and weight decay
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Shard:
    """What this rank updates of a bucket: gradients [n]; weights [n], or None where parameters lie apart."""

    spans: Sequence[Span]  # in order
    gradient: Tensor
    weights: Tensor | None

    @property
    def numel(self) -> int:
        """Elements of parameters, padding not counted."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def length(self) -> int:
        """Elements from the first parameter to the last, padding between them counted."""
        return self.spans[-1].stop - self.spans[0].start


def cut(spans: Sequence[Span], most: int, mark: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``most`` elements that hold the spans, none across ``mark``; parameters are cut at GRAIN."""
    start, end = spans[0].start, spans[-1].stop
    mark = None if mark is None else _aligned(spans, mark)
    while start < end:
        stop = _aligned(spans, min(start + max(most, GRAIN), end))
        if mark is not None and start < mark < stop:
            stop = mark
        yield start, stop
        start = stop


def _aligned(spans: Sequence[Span], place: int) -> int:
    inside = next((span for span in spans if span.start < place < span.stop), None)
    return place if inside is None else inside.start + (place - inside.start) // GRAIN * GRAIN


def marks(shards: Sequence[Shard], fraction: float) -> list[int | None]:
    """Where in each shard, taken in order, the first ``fraction`` of all elements ends; None: not in this one."""
    wanted = round(fraction * sum(shard.numel for shard in shards))
    found: list[int | None] = []
    for shard in shards:
        place: int | None = None
        for span in shard.spans:
            size = span.stop - span.start
            if 0 < wanted <= size:
                place = span.start + wanted
            wanted -= size
        found.append(place)
    return found


class Chunk:
    """Adam's moments of a range of a shard, and fp32 masters where weights are not fp32 or are updated elsewhere."""

    def __init__(self, shard: Shard, start: int, stop: int) -> None:
        self.numel = stop - start  # padding between parameters counted
        self.gradient = shard.gradient[start:stop]
        met = [span for span in shard.spans if span.start < stop and span.stop > start]
        self.spans = [
            replace(s, start=max(s.start, start) - start, stop=min(s.stop, stop) - start, first=_first(s, start))
            for s in met
        ]
        whole = None if shard.weights is None else shard.weights[start:stop]
        self.views = [
            _flat(s.parameter)[s.first : s.first + s.stop - s.start] if whole is None else whole[s.start : s.stop]
            for s in self.spans
        ]
        self.targets = [(view, s.start, s.stop) for view, s in zip(self.views, self.spans, strict=True)]
        if whole is not None:
            self.targets = [(whole, 0, self.numel)]  # one copy
        self.native = self.views[0].dtype == torch.float32  # weights are their own masters
        self.on_host = False
        self.slot: Tensor | None = None  # its place in host memory, which is kept while it is on the device
        self.memory: Tensor = torch.empty(0)  # rows of state [2 or 3, stride], flat
        self.made: dict[int, Parts] = {}

    @property
    def parameters(self) -> int:
        """Elements, padding not counted."""
        return sum(span.stop - span.start for span in self.spans)

    def size(self, *, mastered: bool) -> int:
        """Elements of its state; ``mastered``: masters are wanted even of fp32 weights."""
        return stride(self.numel) * (len(ROWS) if mastered or not self.native else len(ROWS) - 1)

    def row(self, name: str, memory: Tensor | None = None) -> Tensor:
        """A row of the state [numel]; of a copy of it in ``memory``."""
        at = ROWS.index(name) * stride(self.numel)
        return (self.memory if memory is None else memory)[at : at + self.numel]

    @property
    def has_master(self) -> bool:
        """Whether masters lie beside the moments."""
        return self.memory.numel() == len(ROWS) * stride(self.numel)

    def settle(self, memory: Tensor, *, on_host: bool) -> None:
        """Move the state, as far as there is one, to ``memory`` [rows * stride]; masters begin as the weights."""
        old, mastered = self.memory, self.has_master
        self.memory, self.on_host, self.made = memory, on_host, {}
        kept = min(old.numel(), memory.numel())
        memory[:kept].copy_(old[:kept])
        memory[kept:].zero_()
        if self.has_master and not mastered:
            self.take_weights()

    def take_weights(self) -> None:
        """Set masters to the weights."""
        if self.has_master:
            for view, start, stop in self.targets:
                self.row("master")[start:stop].copy_(view)

    def masters(self, memory: Tensor | None = None) -> list[Tensor]:
        """What Adam updates of each span: masters, or weights that are their own."""
        if not self.has_master:
            return self.views
        return self.pieces(self.row("master", memory))

    def pieces(self, row: Tensor) -> list[Tensor]:
        """The part of each span in [numel]."""
        return [row[span.start : span.stop] for span in self.spans]

    def parts(self, key: int, gradient: Tensor, memory: Tensor) -> Parts:
        """What Adam updates, from a gradient [numel] and ``memory``; made once for each ``key`` of the two."""
        if key not in self.made:
            rows = [self.masters(memory), self.pieces(gradient)]
            rows += [self.pieces(self.row(name, memory)) for name in ROWS[:2]]
            groups = [span.group for span in self.spans]
            self.made[key] = [
                (number, [[piece for piece, group in zip(row, groups, strict=True) if group == number] for row in rows])
                for number in sorted(set(groups))
            ]
        return self.made[key]


def stride(numel: int) -> int:
    """Elements from one row of a chunk's state to the next."""
    return numel + (STAGGER if numel >= STAGGERED_FROM else 0)


def _first(span: Span, start: int) -> int:
    return span.first + max(0, start - span.start)


def _flat(parameter: Tensor) -> Tensor:
    return parameter.detach().view(-1)


def make(shards: Sequence[Shard], most: int, fraction: float) -> tuple[list[Chunk], int]:
    """All chunks in order, and how many of them hold the first ``fraction`` of the elements."""
    found: list[Chunk] = []
    count = 0
    wanted = round(fraction * sum(shard.numel for shard in shards))
    for shard, mark in zip(shards, marks(shards, fraction), strict=True):
        found += [Chunk(shard, start, stop) for start, stop in cut(shard.spans, most, mark)]
    reached = 0
    while count < len(found) and reached + found[count].parameters // 2 < wanted:
        reached += found[count].parameters
        count += 1
    return found, count


def needed_bytes(chunks: Iterable[Chunk], *, mastered: bool) -> int:
    """Bytes of the state of chunks."""
    return sum(chunk.size(mastered=mastered) for chunk in chunks) * FLOAT_BYTES
