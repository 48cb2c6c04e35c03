"""What a rank of each pipeline stage holds: sums over traced pieces along the schedule of its micro-batches. No torch.

Weights, gradients and optimizer state follow from the number of parameters, for each of which there are

    weight          4 bytes in fp32, 2 in bf16
    gradient        4 (gradients are summed in fp32)
    AdamW           8 for two moments, 4 more for the master weight in bf16; divided by the data-parallel ranks (x --cp;
                    for experts by those that hold the same ones), and what is offloaded is on the host

(Rajbhandari et al. 2020, arXiv 1910.02054). Activations are the pieces' (trace.py), for as many micro-batches as
megatron-core's schedules have in flight: 1F1B and interleaved (Narayanan et al. 2021, arXiv 2104.04473). Adam is fused
and updates in place; while gradients are clipped, one tensor of them is there twice (megatron-core without Transformer
Engine). State that streams through the device has room for three chunks there (`--offload-engine stream`).

A layer whose activations go to host memory (`--offload-activations`) has them on the device while it computes and while
the next layer does, and from the backward pass of the next layer on. Where the link is slower than layers compute, the
last two that were sent are there, too, until their backward pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megapatch.models.planning.saved import Saved
    from megapatch.models.planning.trace import Piece, Traced

WIDTH = {"fp32": 4, "bf16": 2}  # bytes of a weight
GRADIENT, MOMENTS, MASTER = 4, 8, {"fp32": 0, "bf16": 4}
AHEAD = 3  # chunks of optimizer state that are on their way at once
DEPTH, LEAST_CHUNK = 16, 1 << 20  # chunks of a rank's state, of so many numbers at least, and at most, by engine:
CHUNKS = {"cpu": 16 << 20, "stream": 4 << 20}  # a call costs less than 1 % of a chunk's Adam; three are on a device
BUCKET = 128  # numbers: buckets of gradients end at multiples of it, and of the ranks that share them
LEAST = 1 << 20  # bytes of a storage that is worth the way to host memory (--offload-activation-min-kib)
UNDER_WAY = 2  # layers whose copies out may be under way while the next one computes
POOL = 1 / 8  # by how much buffers in host memory may be larger than what lies in them
LONGEST = 4  # of a schedule, in pipeline depths: what follows repeats


def default_chunk(engine: str, parameters: int) -> int:
    """Numbers of a chunk: as many as a call is worth, and so few that copies of one run beside another's Adam."""
    return max(LEAST_CHUNK, min(CHUNKS[engine], parameters // DEPTH))


@dataclass(frozen=True)
class Layout:
    """How a model is cut; ``world`` processes."""

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def copies(self) -> int:
        """Data-parallel ranks, which see different samples."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def dense_ranks(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.world // (self.tp * self.pp)

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.etp * self.ep * self.pp)

    def chunks(self, num_layers: int, stage: int) -> list[range]:
        """The layers of a stage, counted from 0: a range for each of its chunks."""
        count = self.pp * self.vpp
        length = num_layers // count
        return [range(n * length, (n + 1) * length) for n in range(stage, count, self.pp)]


@dataclass(frozen=True)
class Hosted:
    """How many of the first layers of each chunk have their activations in host memory, in storages of ``least`` bytes
    or more; ``in_time``: a layer's copy takes no longer than the next layer computes."""

    layers: int = 0
    least: int = LEAST
    in_time: bool = True

    def gone(self, at: int) -> int:
        """How many layers' copies have ended when piece ``at`` goes forward (before the layers: 0)."""
        return max(0, at - 2 if self.in_time else min(at - 1, self.layers) - UNDER_WAY)

    def moved(self, saved: Sequence["Saved"]) -> tuple[int, int, int]:
        """Bytes that leave the device, that are in host memory, and those of them that come back beside what is there:
        parts, to which the rest is made again, and what never left."""
        sent = [each for each in saved if each.least >= self.least]
        beside = sum(each.host for each in sent if each.host < each.size or each.held)
        return sum(each.size - each.held for each in sent), sum(each.host for each in sent), beside


class Chunk:
    """Pieces that run one after the other, layers between two ends: what a micro-batch holds in them.

    ``held`` bytes between its passes, and ``host`` bytes in host memory.
    """

    def __init__(self, pieces: Sequence["Piece"], hosted: Hosted = Hosted()) -> None:
        self.pieces, self.hosted = pieces, hosted
        self.kept, self.left = sum(p.kept for p in pieces), sum(p.left for p in pieces)
        gone, copied, beside = zip(*self._moved(), strict=True)
        self.held, self.host = self.kept - sum(gone), sum(copied)
        before, away = [0, *accumulate(p.kept for p in pieces)], [0, *accumulate(gone)]
        settled = hosted.gone(len(pieces) - 1)
        # what is there of the pieces before each
        ahead = [before[n] - away[hosted.gone(n) + 1] for n in range(len(pieces))]
        back = [before[n] - away[min(n - 1, settled) + 1] + beside[n] for n in range(len(pieces))]
        back = [b + (copied[n - 1] if 0 < n <= settled + 1 else 0) for n, b in enumerate(back)]  # on its way back
        forward = [b + p.forward for b, p in zip(ahead, pieces, strict=True)]
        backward = [b + p.backward for b, p in zip(back, pieces, strict=True)]
        # alone in the chunk: modules that did not run yet still have what the last micro-batch left
        after = [self.left - n for n in accumulate(p.left for p in pieces)]  # of later pieces
        rest = [n + p.left for n, p in zip(after, pieces, strict=True)]
        self.forward, self.backward = max(forward), max(backward)
        self.forward_alone = max(map(sum, zip(forward, rest, strict=True)))
        self.backward_alone = max(map(sum, zip(backward, after, strict=True)))

    def _moved(self) -> list[tuple[int, int, int]]:
        """Of each piece: not the last layer, nor what the caller of the first one holds."""
        last, none = len(self.pieces) - 2, (0, 0, 0)
        found = [
            self.hosted.moved(piece.saved) if 0 < n < last and n <= self.hosted.layers else none
            for n, piece in enumerate(self.pieces)
        ]
        given = self.hosted.moved(self.pieces[0].saved)
        if any(found[1]):
            found[1] = tuple(mine - theirs for mine, theirs in zip(found[1], given, strict=True))  # type: ignore[assignment]
        return found


def order(stage: int, pp: int, vpp: int, count: int) -> Iterator[tuple[bool, int]]:
    """Passes of a stage in megatron-core's order: whether it is a forward pass, and of which chunk."""
    total, group = count * vpp, pp * vpp
    ahead = (pp - stage - 1) * 2 + (vpp - 1) * pp if vpp > 1 else pp - stage - 1
    ahead = min(ahead, total)
    for n in range(total + ahead):
        if n < total:
            yield True, n % group // pp
        if n >= ahead:
            yield False, vpp - 1 - (n - ahead) % group // pp


def flights(stage: int, pp: int, vpp: int, count: int) -> Iterator[tuple[bool, int, list[int]]]:
    """The same of a step; and how many micro-batches each chunk holds for their backward pass, but for the one that
    passes."""
    held = [0] * vpp
    for forward, number in order(stage, pp, vpp, min(count, LONGEST * pp)):
        held[number] -= not forward
        yield forward, number, held
        held[number] += forward


def most_held(chunks: Sequence[Chunk], stage: int, pp: int, count: int) -> int:
    """The most bytes that a stage has of activations, over the passes of a step."""
    most = 0
    for forward, number, held in flights(stage, pp, len(chunks), count):
        chunk, others = chunks[number], held[number]
        live = sum(n * c.held if n else c.left for c, n in zip(chunks, held, strict=True) if c is not chunk)
        live += others * chunk.held
        if forward:
            live += chunk.forward if others else chunk.forward_alone
        else:
            live += chunk.backward if others else chunk.backward_alone
        most = max(most, live)
    return most


def most_hosted(chunks: Sequence[Chunk], stage: int, pp: int, count: int) -> int:
    """The most bytes of host memory that hold activations, over the passes of a step."""
    passes = flights(stage, pp, len(chunks), count)
    most = max(chunks[now].host + sum(n * c.host for c, n in zip(chunks, held, strict=True)) for _, now, held in passes)
    return math.ceil(most * (1 + POOL))


@dataclass(frozen=True)
class Need:
    """Bytes on a rank of one stage, at the most; ``step``: what the optimizer has besides while it steps."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    step: int
    host: int  # in host memory, of the optimizer and of activations

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step)


@dataclass(frozen=True)
class Stage:
    """Chunks of traced pieces on a rank, and what they need."""

    layout: Layout
    stage: int
    chunks: Sequence[Chunk]
    shared: int
    tied: int
    precision: str
    distributed: bool = True

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Dense ones and those of experts."""
        pieces = [piece for chunk in self.chunks for piece in chunk.pieces]
        experts = sum(piece.experts for piece in pieces)
        return sum(piece.parameters for piece in pieces) + self.tied - experts, experts

    @cached_property
    def optimized(self) -> int:
        """Parameters whose optimizer state is this rank's."""
        dense, experts = self.parameters
        if not self.distributed:
            return dense + experts
        return -(-dense // self.layout.dense_ranks) - (-experts // self.layout.expert_ranks)

    @cached_property
    def padding(self) -> int:
        """Numbers that no parameter has in the buffers of weights and gradients, which the ranks divide."""
        if not self.distributed:
            return 0
        starts = sum(piece.padding for chunk in self.chunks for piece in chunk.pieces)
        ranks = (self.layout.dense_ranks, self.layout.expert_ranks)
        return starts + sum(-n % math.lcm(each, BUCKET) for n, each in zip(self.parameters, ranks, strict=True))

    @property
    def clipped(self) -> int:
        """Bytes of the largest gradient of this rank."""
        return GRADIENT * min(self.optimized, max(p.largest for chunk in self.chunks for p in chunk.pieces))

    @property
    def streamed(self) -> int:
        """Bytes on the device for what is offloaded and comes there to be updated."""
        chunk = min(self.optimized, default_chunk("stream", self.optimized))
        return AHEAD * chunk * (MOMENTS + 4)  # and fp32 masters

    @property
    def state_bytes(self) -> int:
        """Optimizer state of this rank, wherever it is."""
        return self.optimized * (MOMENTS + MASTER[self.precision])

    def need(self, count: int, *, offloaded: float = 0.0) -> Need:
        """With ``count`` micro-batches a step."""
        numbers = sum(self.parameters) + self.padding
        away = round(self.state_bytes * offloaded)
        return Need(
            numbers * WIDTH[self.precision],
            numbers * GRADIENT,
            self.state_bytes - away + (self.streamed if away else 0),
            most_held(self.chunks, self.stage, self.layout.pp, count) + self.shared,
            self.clipped + sum(chunk.left for chunk in self.chunks),
            away + most_hosted(self.chunks, self.stage, self.layout.pp, count),
        )


def stage_of(
    layout: Layout,
    stage: int,
    kinds: Sequence[str],
    traced: Sequence["Traced"],
    precision: str,
    *,
    first: int = 0,
    hosted: Hosted = Hosted(),
) -> Stage:
    """A stage of pieces from a trace; of the ``first`` layers of each chunk from a second one."""
    main, chunks = traced[0], layout.chunks(len(kinds), stage)
    last = layout.pp - 1
    made = []
    for number, layers in enumerate(chunks):
        begin = main.pieces["before" if stage == 0 and number == 0 else "received"]
        end = main.pieces["after" if stage == last and number == len(chunks) - 1 else "sent"]
        middle = [traced[-1 if at < first else 0].pieces[kinds[n]] for at, n in enumerate(layers)]
        made.append(Chunk([begin, *middle, end], hosted))
    tied = main.tied if layout.pp > 1 and stage == last else 0
    return Stage(layout, stage, made, max(t.shared for t in traced), tied, precision)
