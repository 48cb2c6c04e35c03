"""How fast a step can be at best: each operator as slow as its arithmetic or its memory traffic, whichever is slower.

Communication of --tp, --cp and --ep stands in the way of computation, as it does without Transformer Engine; gradients
are reduced and weights gathered beside the passes of a micro-batch; a pipeline is idle while it fills and empties.
Activations go to host memory and back beside the layers that compute meanwhile, which wait for the rest. Rates are
peaks: no run is as fast, and plans are compared by their ratio.
"""

from dataclasses import dataclass
from functools import cache

from megapatch.models.planning.meter import Work
from megapatch.models.planning.stages import GRADIENT, UNDER_WAY, WIDTH, Chunk, Layout, Stage
from megapatch.models.planning.trace import Piece
from megapatch.tools.plan.machines import ADAM_BYTES, Machine

STEP_BYTES = 30  # of device memory that Adam moves per parameter: 4 gradient, 12 + 12 state, 2 weight
STATE_BYTES = 12  # per parameter, to the device and back, where it is offloaded and updated on the device
LAUNCH_S = 5e-6  # a kernel is not shorter: the time to launch one


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, and what they are made of; ``step`` is all of them."""

    compute: float
    communication: float  # of --tp, --cp, --ep and between stages
    bubble: float
    reduction: float  # of gradients and weights, that no computation hides
    optimizer: float
    copies: float  # of activations to and from host memory, that no computation hides

    @property
    def step(self) -> float:
        """All together."""
        return self.compute + self.communication + self.bubble + self.reduction + self.optimizer + self.copies


def link(machine: Machine, span: int, node: int) -> float:
    """Bytes/s between ranks that lie within ``span`` neighbours; ``node`` GPUs share a node."""
    return machine.node_link if span <= node else machine.network


@cache
def work_time(work: Work, machine: Machine, node: int) -> tuple[float, float]:
    """Seconds of computation and of communication."""
    operators = sum(max(flops / machine.flops, moved / machine.memory, LAUNCH_S) for flops, moved in work.operators)
    return operators, sum(sent.moved / link(machine, sent.span, node) for sent in work.sent)


def pass_time(pieces: list[Piece], machine: Machine, node: int) -> tuple[float, float, float]:
    """Seconds of the forward and of the backward computation of one micro-batch, and of communication in both."""
    ahead = [work_time(piece.forward_work, machine, node) for piece in pieces]
    behind = [work_time(piece.backward_work, machine, node) for piece in pieces]
    return sum(t for t, _ in ahead), sum(t for t, _ in behind), sum(t for _, t in ahead + behind)


def speed(
    parts: list[Stage],
    count: int,
    machine: Machine,
    node: int,
    boundary_bytes: int,
    *,
    offloaded: float = 0.0,
) -> Speed:
    """Of a step with ``count`` micro-batches; ``boundary_bytes`` go from stage to stage."""
    layout = parts[0].layout
    times = [pass_time([p for chunk in part.chunks for p in chunk.pieces], machine, node) for part in parts]
    forward, backward, sent = max(times, key=sum)
    pipe = layout.pp > 1
    per_stage = layout.world // layout.pp
    between = 2 * layout.vpp * boundary_bytes / link(machine, per_stage + 1, node) if pipe else 0.0
    idle = (layout.pp - 1) / layout.vpp * (forward + backward + sent + between)
    return Speed(
        count * (forward + backward),
        count * (sent + between),
        idle,
        max(_reduction(part, machine, node, forward, backward) for part in parts),
        max(_step(part, machine, node, offloaded) for part in parts),
        count * max(sum(_waited(chunk, machine, node) for chunk in part.chunks) for part in parts),
    )


def in_time(piece: Piece, machine: Machine, node: int) -> bool:
    """Whether a layer's activations go to host memory no slower than such a layer goes forward."""
    copied = sum(each.host for each in piece.saved)
    return copied / machine.host_link <= sum(work_time(piece.forward_work, machine, node))


def _waited(chunk: Chunk, machine: Machine, node: int) -> float:
    """Seconds that a micro-batch waits for activations: the layers after the first that leaves hide the copies out, up
    to those under way at the end; each layer that goes backward hides what comes back for the one before it."""
    seconds, last = chunk.host / machine.host_link, chunk.hosted.layers + 1
    out, back = chunk.pieces[2 : last + UNDER_WAY], chunk.pieces[2 : last + 1]
    ahead = sum(sum(work_time(piece.forward_work, machine, node)) for piece in out)
    behind = sum(sum(work_time(piece.backward_work, machine, node)) for piece in back)
    return max(0.0, seconds - ahead) + max(0.0, seconds - behind)


def _reduction(part: Stage, machine: Machine, node: int, forward: float, backward: float) -> float:
    """Seconds of gradients that are reduced after the last backward pass, and of weights gathered, beside passes."""
    layout, exposed = part.layout, 0.0
    for each, hidden in ((GRADIENT, backward), (WIDTH[part.precision], forward)):
        seconds = 0.0
        for numbers, ranks, stride in _shared(part, layout):
            rate = link(machine, ranks * stride, node)
            seconds += each * numbers * (ranks - 1) / ranks / rate
        exposed += max(0.0, seconds - hidden)
    return exposed


def _shared(part: Stage, layout: Layout) -> list[tuple[int, int, int]]:
    """Parameters, ranks that hold the same, and how far from one to the next: dense, experts."""
    dense, experts = part.parameters
    return [(dense, layout.dense_ranks, layout.tp), (experts, layout.expert_ranks, layout.etp * layout.ep)]


def _step(part: Stage, machine: Machine, node: int, offloaded: float) -> float:
    """Seconds of Adam: on the device; of the offloaded share, the faster of host processors and through the device."""
    numbers = part.optimized
    here = numbers * (1 - offloaded) * STEP_BYTES / machine.memory
    away = numbers * offloaded
    host = away * max(GRADIENT / machine.host_link, ADAM_BYTES / machine.host_memory, 2 / machine.host_link)
    stream = away * max(STATE_BYTES / machine.host_link, 2 * STATE_BYTES / machine.host_memory)
    return here + min(host, stream)
