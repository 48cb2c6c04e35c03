"""The CPU AdamW step against its memory floor, in the same rounds, on the same arrays; alone, and with all ranks."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megapatch.models.link import Copy, lanes

BYTES_PER_PARAMETER = 28  # read p, g, m, v and write p, m, v, 4 bytes each
BF16_BYTES = 30  # write p in bf16, too
NEEDED_BYTES = 24  # the four arrays, and the temporaries of foreach
LR, BETA1, BETA2, WEIGHT_DECAY, EPS = 1e-4, 0.9, 0.95, 0.1, 1e-8

Runs = Mapping[str, Callable[[], Any]]


def take_turns(rounds: int, runs: Runs, limit_s: float = math.inf) -> dict[str, list[float]]:
    """Seconds of each run in each round; all take turns, so that a busy moment hits them alike.

    No round starts after ``limit_s`` seconds, but one always counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() - start > limit_s:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}  # the first round warmed up


class Arrays:
    """Parameters p, gradients g, first and second moments m and v: fp32 [numel] each.

    They start 65 KiB apart modulo 1 MiB. Four arrays of 2^25 elements that are allocated one by one start 4 KiB apart
    modulo 128 MiB, and there the same fused step ran at half the speed (22 against 45 GB/s, one thread of an EPYC):
    its streams contend for the same cache sets.
    """

    def __init__(self, numel: int) -> None:
        torch.manual_seed(0)
        block, stagger = 2**20 // 4, 65 * 2**10 // 4  # elements
        stride = -(-numel // block) * block + stagger
        buffer = torch.empty(4 * stride).uniform_(1e-4, 1e-3)
        self.p, self.g, self.m, self.v = (part[:numel] for part in buffer.split(stride))

    def chunk(self, number: int, size: int) -> "Arrays":
        """A chunk of ``size`` elements, counted from 0."""
        return self.part(slice(number * size, (number + 1) * size))

    def part(self, where: slice) -> "Arrays":
        """Views of a range."""
        found = object.__new__(Arrays)
        found.p, found.g, found.m, found.v = (x[where] for x in (self.p, self.g, self.m, self.v))
        return found

    def chunks(self, size: int) -> list[tuple[Tensor, ...]]:
        """Views (p, g, m, v) of ``size`` elements, the last one shorter."""
        return list(zip(*(x.split(size) for x in (self.p, self.g, self.m, self.v)), strict=True))


def floor_runs(arrays: Arrays) -> Runs:
    """Two ways to move an Adam step's 28 bytes per parameter while computing next to nothing; the faster counts.

    passes: p += g reads p and g and writes p (12 bytes); m *= 1 and v *= 1 read and write once more (8 bytes each).
    momentum: torch's fused SGD reads p, g, m and writes p, m in one sweep (20 bytes); v *= 1 (8 bytes).
    All writes are in place, as Adam's are, so no cache line is fetched only to be overwritten and the count is exact;
    arrays, threads and rounds are the kernel's. A compiled C++ loop over all seven streams reached 46.5, 49.8 and 47.8
    GB/s where the faster of these two reached 46.0, 50.6 and 47.9 (2^24, 2^25, 2^26 parameters, one thread of an EPYC).
    It is a measured floor, not a proven one: on a busy machine, or within its caches, ratios a little below 1 occur.
    """

    def passes() -> None:
        arrays.p.add_(arrays.g)
        arrays.m.mul_(1.0)
        arrays.v.mul_(1.0)

    def momentum() -> None:
        torch._fused_sgd_(
            [arrays.p],
            [arrays.g],
            [arrays.m],
            weight_decay=0.0,
            momentum=BETA1,
            lr=LR,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        arrays.v.mul_(1.0)

    return {"passes": passes, "momentum": momentum}


def fused_step(arrays: Arrays, size: int) -> None:
    """One torch._fused_adamw_ call per chunk, as an offloaded optimizer makes them."""
    steps = [torch.ones(())]
    for p, g, m, v in arrays.chunks(size):
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            steps,
            lr=LR,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=WEIGHT_DECAY,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )


def bf16_step(arrays: Arrays, size: int, weights: Tensor) -> None:
    """The same, and each chunk's new parameters as bf16 ``weights`` [chunk], which go to the device."""
    for i in range(len(arrays.chunks(size))):
        part = arrays.chunk(i, size)
        fused_step(part, size)
        weights[: part.p.numel()].copy_(part.p)


class Stream:
    """State p, m, v to the device and back chunk by chunk, in two lanes, and Adam there (here: between two arenas)."""

    def __init__(self, arrays: Arrays, size: int, rate: float | None) -> None:
        self.arrays, self.size, self.count = arrays, size, len(arrays.chunks(size))
        self.down, self.up = lanes(torch.device("cpu"), rate)
        self.rooms = [Arrays(min(size, arrays.p.numel())) for _ in range(2)]

    def __call__(self) -> None:
        back: list[Copy | None] = [None, None]
        arrived = self._fetch(0, None)
        for i in range(self.count):
            ready = arrived
            if i + 1 < self.count:
                arrived = self._fetch(i + 1, back[(i + 1) % 2])
            self.up.wait(ready)
            host = self.arrays.chunk(i, self.size)
            here = self.rooms[i % 2].part(slice(host.p.numel()))
            here.g.copy_(host.g)  # gradients are on the device already
            fused_step(here, self.size)
            back[i % 2] = _send(self.down, host, here, None)
        for copy in back:
            if copy is not None:
                self.down.wait(copy)

    def _fetch(self, number: int, after: Copy | None) -> Copy:
        return _send(self.up, self.rooms[number % 2], self.arrays.chunk(number, self.size), after)


def _send(lane: Any, target: Arrays, source: Arrays, after: Copy | None) -> Copy:
    n = min(target.p.numel(), source.p.numel())
    for to, of in ((target.p, source.p), (target.m, source.m), (target.v, source.v)):
        after = lane.copy(to[:n].view(torch.uint8), of[:n].view(torch.uint8), after)
    assert after is not None
    return after


def listed_step(arrays: Arrays, size: int, *, foreach: bool) -> None:
    """torch.optim.AdamW's step over a list of parameters of ``size`` elements, without its fused kernel."""
    p, g, m, v = map(list, zip(*arrays.chunks(size), strict=True))
    adamw(
        p,
        g,
        m,
        v,
        [],
        [torch.zeros(()) for _ in p],  # counted up by the call; the fused kernel is given the new count
        foreach=foreach,
        fused=False,
        lr=LR,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=WEIGHT_DECAY,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


def adam_rows(
    numel: int,
    threads: Sequence[int],
    chunks: Sequence[int],
    rounds: int,
    limit_s: float = math.inf,
    rate: float | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each thread count, kernel and chunk size; 'x_floor' is its seconds over the floor's."""
    arrays = Arrays(numel)
    sizes = sorted({min(size, numel) for size in chunks})
    weights = torch.empty(sizes[-1], dtype=torch.bfloat16)
    kernels: list[tuple[str, int, Callable[[], Any]]] = [
        ("fused", size, partial(fused_step, arrays, size)) for size in sizes
    ]
    kernels += [("fused bf16", size, partial(bf16_step, arrays, size, weights)) for size in sizes]
    kernels += [
        ("stream", sizes[-1], Stream(arrays, sizes[-1], rate)),
        ("foreach", sizes[-1], partial(listed_step, arrays, sizes[-1], foreach=True)),
        ("for-loop", sizes[-1], partial(listed_step, arrays, sizes[-1], foreach=False)),
    ]
    for number in threads:
        torch.set_num_threads(number)
        runs: Runs = {**floor_runs(arrays), **{f"{name} {size}": run for name, size, run in kernels}}
        times = take_turns(rounds, runs, limit_s / len(threads))
        floor = min(times["passes"], times["momentum"], key=min)
        floors = [min(pair) for pair in zip(times["passes"], times["momentum"], strict=True)]
        for name, size, seconds in [("floor", numel, floor), *((n, s, times[f"{n} {s}"]) for n, s, _ in kernels)]:
            moved = BF16_BYTES if name == "fused bf16" else BYTES_PER_PARAMETER
            ratios = [s / (f * moved / BYTES_PER_PARAMETER) for s, f in zip(seconds, floors, strict=True)]
            yield {
                "part": "adam",
                "kernel": name,
                "threads": number,
                "chunk": size,
                "numel": numel,
                "rounds": len(seconds),
                "seconds": min(seconds),
                "median_seconds": statistics.median(seconds),
                "bytes_per_s": moved * numel / min(seconds),
                "x_floor": min(seconds) / (min(floor) * moved / BYTES_PER_PARAMETER),
                "x_floor_of_round": statistics.median(ratios),  # on a busy machine
                "ms_per_billion": min(seconds) / numel * 1e12,
            }


def contention_rows(
    numel: int, threads: int, chunk: int, rounds: int, ranks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The fused step and its floor with so many processes at it at once, as the ranks of a machine are."""
    alone = math.nan
    for number in ranks:
        times = at_once(number, numel, threads, chunk, rounds)
        floor = min(times["passes"], times["momentum"])
        alone = times["fused"] if number == ranks[0] else alone
        yield {
            "part": "contention",
            "ranks": number,
            "threads": threads,
            "chunk": chunk,
            "numel": numel,
            "seconds": times["fused"],
            "x_floor": times["fused"] / floor,
            "x_alone": times["fused"] / alone,
            "bytes_per_s": BYTES_PER_PARAMETER * numel * number / times["fused"],
        }


def at_once(ranks: int, numel: int, threads: int, chunk: int, rounds: int) -> dict[str, float]:
    """Seconds until the slowest of ``ranks`` processes is done, each name's best round."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(ranks), context.Queue()
    workers = [
        context.Process(target=_rank, args=(barrier, queue, numel, threads, chunk, rounds)) for _ in range(ranks)
    ]
    for worker in workers:
        worker.start()
    try:
        found = [queue.get(timeout=600) for _ in workers]
    finally:
        for worker in workers:
            worker.join(60)
            worker.kill()
    return {name: min(max(rank[name][i] for rank in found) for i in range(rounds)) for name in found[0]}


def _rank(barrier: Any, queue: Any, numel: int, threads: int, chunk: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    arrays = Arrays(numel)
    runs: Runs = {**floor_runs(arrays), "fused": partial(fused_step, arrays, chunk)}
    together = {name: partial(_after, barrier, run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in together}
    for _ in range(rounds + 1):
        for name, run in together.items():
            times[name].append(run())
    queue.put({name: seconds[1:] for name, seconds in times.items()})


def _after(barrier: Any, run: Callable[[], Any]) -> float:
    barrier.wait(600)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
