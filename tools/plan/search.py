"""All ways to cut a training run, those that fit a GPU's memory, and how fast each can be at best."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from megapatch.models.build import ModelOptions
from megapatch.models.planning.scaling import scaled
from megapatch.models.planning.stages import WIDTH, Hosted, Layout, Need, Stage, stage_of
from megapatch.models.planning.trace import Batch, Traced, trace
from megapatch.tools.plan.roofline import Speed, in_time, speed
from megapatch.tools.plan.ways import Again, Asked, divisors, parallel, ways_again

LARGEST_VPP = 8
MOST_TOKENS = 16384  # of a pass of several samples on a rank: more only take memory
FRACTIONS = 20  # --offload-optimizer in steps of a twentieth


@dataclass(frozen=True)
class Choice:
    """A way to run: ``first`` layers of each chunk are computed again, if not all; the activations of the first
    ``hosted`` of each chunk, and a share of the optimizer's state, are in host memory."""

    layout: Layout
    samples: int
    again: Again = Again()
    first: int | None = None
    hosted: int = 0
    offloaded: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A choice, what it needs on each stage, and its speed."""

    choice: Choice
    needs: list[Need] = field(compare=False)
    speed: Speed
    total_bytes: int  # of the stage that needs most, with slack
    stage: int  # that one
    copied: int  # to host memory by a micro-batch on the stage that sends most


class Search:
    """Traces, each made once, and the plans that follow from them."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.traces: dict[tuple, Traced] = {}
        self.least: Plan | None = None  # that needs the least memory
        self.seen = 0

    def traced(self, layout: Layout, samples: int, again: Again) -> Traced:
        """Pieces; for more than four samples in a straight line from those of two and four."""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, samples, again)
        if key not in self.traces:
            self.traces[key] = self._trace(layout, samples, again)
        return self.traces[key]

    def _trace(self, layout: Layout, samples: int, again: Again) -> Traced:
        if samples > 4:
            line = scaled(self.traced(layout, 2, again), self.traced(layout, 4, again), (samples - 2) / 2)
            if line is not None:
                return line
        asked = self.asked
        cut = parallel(layout.tp, layout.cp, layout.ep, layout.etp)
        made = ModelOptions(cut, asked.device, asked.precision, asked.seq_length, again.fields)
        return trace(asked.hf, made, Batch(asked.seq_length, samples, asked.load), alone=not asked.pipelines)

    def stages(self, choice: Choice) -> list[Stage]:
        """Of the pipeline."""
        traced = [self.traced(choice.layout, choice.samples, choice.again)]
        first = 0
        if choice.first is not None:
            first = choice.first
            traced = [self.traced(choice.layout, choice.samples, Again()), *traced]
        asked, layout = self.asked, choice.layout
        layers = [each.pieces[kind] for each in traced for kind in set(asked.kinds)]
        hosted = Hosted(choice.hosted, in_time=all(in_time(layer, asked.machine, asked.node) for layer in layers))
        return [
            stage_of(layout, n, asked.kinds, traced, asked.precision, first=first, hosted=hosted)
            for n in range(layout.pp)
        ]

    def plan(self, choice: Choice) -> Plan:
        """What a choice needs, and how fast it is."""
        asked, parts = self.asked, self.stages(choice)
        count = asked.batch // choice.layout.copies // choice.samples
        needs = [part.need(count, offloaded=choice.offloaded) for part in parts]
        totals = [self.with_slack(need) for need in needs]
        layout, tokens = choice.layout, asked.seq_length // choice.layout.cp * choice.samples
        boundary = tokens // layout.tp * asked.config["hidden_size"] * WIDTH[asked.precision]
        timed = speed(parts, count, asked.machine, asked.node, boundary, offloaded=choice.offloaded)
        most = max(totals)
        copied = max(sum(chunk.host for chunk in part.chunks) for part in parts)
        found = Plan(choice, needs, timed, most, totals.index(most), copied)
        self.seen += 1
        if self.least is None or found.total_bytes < self.least.total_bytes:
            self.least = found
        return found

    def with_slack(self, need: Need) -> int:
        """Bytes, with what the allocator cannot use of what comes and goes."""
        return round(need.total + max(need.activations, need.step) * self.asked.slack)

    def fits(self, plan: Plan) -> bool:
        """On the GPU, and in host memory."""
        host = max(need.host for need in plan.needs)
        return plan.total_bytes <= self.asked.budget_bytes and host <= self.asked.host_bytes

    def plans(self, layout: Layout) -> Iterator[Plan]:
        """Those of a layout that fit; of each kind the one that computes or moves least."""
        for samples in self.samples(layout):
            found = [
                plan
                for vpp in self.interleaved(layout, samples)
                for plan in self._fitting(replace(layout, vpp=vpp), samples)
            ]
            yield from found
            if not found:
                return  # nor do more samples fit

    def _fitting(self, layout: Layout, samples: int) -> Iterator[Plan]:
        layers = len(self.asked.kinds) // layout.pp // layout.vpp
        nothing, *ways = ways_again(self.asked)
        for again in (nothing, *reversed(ways)):
            choice = Choice(layout, samples, again)
            found = self.plan(choice)
            if self.fits(found):
                yield found
                if again == nothing:
                    return  # nothing is faster
                if again.full and (fewer := self.fewest(choice, "first", layers - 1)):
                    yield fewer
            elif self.asked.offload:
                yield from self.away(found, layers - 1)
            elif again.full:
                return  # nothing needs less

    def fewest(self, choice: Choice, name: str, most: int) -> Plan | None:
        """With ``name`` of the choice 1 to ``most``, each of which needs less of the GPU: the first that fits."""
        low, high, best = 0, most + 1, None
        while low + 1 < high:
            middle = (low + high) // 2
            tried = self.plan(replace(choice, **{name: middle}))  # type: ignore[arg-type]
            if tried.total_bytes <= self.asked.budget_bytes:
                high, best = middle, tried
            else:
                low = middle
        return best if best and self.fits(best) else None

    def away(self, found: Plan, most: int) -> Iterator[Plan]:
        """With as little in host memory as fits: of the optimizer's state, of activations, or of both."""
        state = self.offloaded(found)
        layers = self.fewest(found.choice, "hosted", most)
        yield from (plan for plan in (state, layers) if plan)
        if layers is None and most and (both := self.offloaded(self.plan(replace(found.choice, hosted=most)))):
            yield both

    def offloaded(self, found: Plan) -> Plan | None:
        """With as little of the optimizer's state in host memory as fits, if all of it is enough."""
        stages, budget = self.stages(found.choice), self.asked.budget_bytes
        short = [
            self.with_slack(need) - budget + stage.streamed for need, stage in zip(found.needs, stages, strict=True)
        ]
        share = max(each / stage.state_bytes for each, stage in zip(short, stages, strict=True))
        fraction = math.ceil(share * FRACTIONS) / FRACTIONS
        moved = self.plan(replace(found.choice, offloaded=min(fraction, 1.0)))
        return moved if self.fits(moved) else None

    def samples(self, layout: Layout) -> list[int]:
        """Micro-batch sizes."""
        each, tokens = self.asked.batch // layout.copies, self.asked.seq_length // layout.cp
        return [n for n in (1, 2, 4, 8) if n == 1 or (each % n == 0 and n * tokens <= MOST_TOKENS)]

    def interleaved(self, layout: Layout, samples: int) -> list[int]:
        """Chunks per stage."""
        count, layers = self.asked.batch // layout.copies // samples, len(self.asked.kinds) // layout.pp
        if layout.pp == 1 or count % layout.pp:
            return [1]
        return [n for n in divisors(layers) if n <= LARGEST_VPP]


@dataclass(frozen=True)
class Found:
    """Plans that fit of some layouts; of all that were tried the one that needs least, their number, and of traces."""

    plans: list[Plan]
    least: Plan
    seen: int
    traces: int


def search(asked: Asked, cut: list[Layout]) -> Found:
    """Plans of layouts that share their traces: they differ in --pp only."""
    here = Search(asked)
    plans = [plan for layout in cut for plan in here.plans(layout)]
    assert here.least is not None
    return Found(plans, here.least, here.seen, len(here.traces))


def best(plans: Iterable[Plan], top: int) -> list[Plan]:
    """The fastest, one for each layout; of equals the one that needs less memory."""
    order = sorted(plans, key=lambda plan: (plan.speed.step, plan.total_bytes))
    by_layout: dict[Layout, Plan] = {}
    for plan in order:
        by_layout.setdefault(replace(plan.choice.layout, vpp=1), plan)
    return list(by_layout.values())[:top]
