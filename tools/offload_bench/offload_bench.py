"""mp-offload-bench: what offloading costs here: link, memory, CPU Adam, overlap; and the trainer, point by point."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.space import DoesNotFit, count, free_bytes, short

log = logging.getLogger(__name__)
MEASURES = ("bandwidth", "adam", "overlap", "sweep")
LINK_SIZES = tuple(2**power for power in range(16, 31, 2))  # 64 KiB to 1 GiB
EMULATED_SIZES = (2**20, 2**24)  # of a link between two parts of the same memory
MEMORY_SIZES = (256 << 20,)
CHUNKS = tuple(2**power for power in range(14, 25, 2))  # 16 Ki to 16 Mi elements
NUMEL, QUICK_NUMEL = 32 << 20, 16 << 20
RESERVE_BYTES = 64 << 20  # left free for everything but the arrays
ARRAYS_BYTES = 16  # per parameter: p, g, m, v in fp32
CACHES = 8  # times the last-level cache is large enough to measure memory
EXAMPLES = """examples:
  mp-offload-bench
  mp-offload-bench --measure adam --numel 256Mi --threads 1 8 16 --ranks 8 > adam.jsonl
  mp-offload-bench --measure sweep --output sweep --recompute full --activations 4 8 -- @train.args --model qwen3

JSON lines go to stdout, a table and what it means to stderr. The memory floor is a measurement of the same run: sweeps
over the same arrays that move the same 28 bytes per parameter (read p, g, m, v; write p, m, v) and compute next to
nothing, taking turns with the kernels. All times are the smallest of --rounds. The sweep runs mp-pretrain with the
options after -- for each point, resumes where it was stopped, and draws OUTPUT/sweep.svg. exit status: 0 measured; 1 a
point of the sweep failed, or has other losses than the first; 2 wrong usage; 3 it does not fit in memory."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Measure what offloading costs on this machine: link, host memory, CPU Adam, what runs beside what; and, with the
    trainer itself, what each way to save memory saves and costs."""

    measure: list[str] = opt(
        f"what to measure, of {', '.join(MEASURES)}", ["bandwidth", "adam", "overlap"], nargs="+", choices=MEASURES
    )
    numel: Optional[int] = opt(
        f"parameters in the Adam step, such as 64Mi (default: {short(NUMEL)}, with --quick {short(QUICK_NUMEL)})",
        None,
        type=count,
    )
    chunks: list[int] = opt(
        "elements in one chunk of the Adam step, such as 4Mi (default: 16Ki to 16Mi)", [], nargs="+", type=count
    )
    sizes: list[int] = opt(
        "bytes of one buffer, such as 64KiB (default: transfers of 64KiB to 1GiB, without a GPU of 1MiB and "
        "16MiB; memory arrays of 256MiB)",
        [],
        nargs="+",
        type=count,
    )
    threads: list[int] = opt(
        "CPU threads (default: 1, 2, 4, ... up to what torch would use, which OMP_NUM_THREADS limits)",
        [],
        nargs="+",
        type=count,
    )
    rounds: Optional[int] = opt(
        "rounds; the smallest time counts (default: 7, with --quick 3, fewer once the Adam steps took 40 or 5 seconds)",
        None,
        type=count,
    )
    ranks: int = opt("processes: Adam is also measured with so many at once; the sweep trains with them", 1)
    link_gb_per_s: Optional[float] = opt("without a GPU: emulate a link of this many GB/s in each direction", None)
    quick: bool = opt("smaller defaults: under 10 seconds, rougher figures", False)

    output: Optional[Path] = opt("for the sweep: folder for results, logs and the plot; a sweep goes on in it", None)
    steps: int = opt("for the sweep: optimizer steps of each point; the first two are not timed", 6)
    fractions: list[str] = opt(
        "for the sweep: values of --offload-optimizer, beside 0",
        ["0.25", "0.5", "0.75", "1", "auto"],
        nargs="*",
        metavar="FRACTION",
    )
    device_memory_gib: Optional[float] = opt(
        "for the sweep's point auto: memory of the device to fit, in GiB; without a GPU there is no such point "
        "unless this is given",
        None,
    )
    recompute: list[str] = opt(
        "for the sweep: values of --recompute, points of their own", ["full"], nargs="*", metavar="KIND"
    )
    activations: list[str] = opt(
        "for the sweep: values of --offload-activations, points of their own", [], nargs="*", metavar="LAYERS"
    )
    timeout_s: float = opt("for the sweep: seconds that a point may take", 3600.0)

    def __post_init__(self) -> None:
        """Check what argparse cannot."""
        for flag, values, part in (("--sizes", self.sizes, "bandwidth"), ("--chunks", self.chunks, "adam")):
            if values and part not in self.measure:
                raise ValueError(f"{flag} has no effect without {part} in --measure")
        if self.numel and not {"adam", "overlap"} & set(self.measure):
            raise ValueError("--numel has no effect without adam or overlap in --measure")
        if ("sweep" in self.measure) != (self.output is not None):
            raise ValueError("--measure sweep and --output need each other")
        if self.steps < 1 or self.ranks < 1:
            raise ValueError("--steps and --ranks must be at least 1")
        if self.link_gb_per_s is not None and not self.link_gb_per_s > 0:
            raise ValueError(f"--link-gb-per-s {self.link_gb_per_s}: must be above 0")

    @property
    def rate(self) -> float | None:
        """Bytes a second of the link to emulate."""
        return self.link_gb_per_s and self.link_gb_per_s * 1e9


@dataclass(frozen=True)
class Plan:
    """What will be measured, all defaults filled in; sizes in bytes, chunks and numel in elements."""

    numel: int
    chunks: tuple[int, ...]
    memory_sizes: tuple[int, ...]
    link_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int
    limit_s: float


def plan(options: Options, torch_threads: int, gpu: bool) -> Plan:
    """Fill in the defaults, and refuse more threads than there are CPUs."""
    cpus = len(os.sched_getaffinity(0))
    threads = tuple(sorted(set(options.threads))) or _doubling(torch_threads)
    if threads[-1] > cpus:
        raise UserError(f"--threads {threads[-1]}: this process may use {cpus} CPUs; choose at most {cpus}")
    quick = options.quick
    sizes = tuple(sorted(set(options.sizes)))
    arrays, bandwidth = {"adam", "overlap"} & set(options.measure), "bandwidth" in options.measure
    links = (LINK_SIZES[::2] if quick else LINK_SIZES) if gpu else EMULATED_SIZES
    return Plan(
        numel=(options.numel or (QUICK_NUMEL if quick else NUMEL)) if arrays else 0,
        chunks=tuple(options.chunks) or (CHUNKS[::2] if quick else CHUNKS),
        memory_sizes=(sizes or (tuple(n // 4 for n in MEMORY_SIZES) if quick else MEMORY_SIZES)) if bandwidth else (),
        link_sizes=(sizes or links) if bandwidth else (),
        threads=threads,
        rounds=options.rounds or (3 if quick else 7),
        limit_s=math.inf if options.rounds else (5.0 if quick else 40.0),
    )


def _doubling(most: int) -> tuple[int, ...]:
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def l3_bytes() -> int:
    """Size of the last-level cache, 0 where the system does not tell."""
    name = "SC_LEVEL3_CACHE_SIZE"
    return os.sysconf(name) if name in os.sysconf_names else 0


def refuse_what_does_not_fit(wanted: Plan, free: int, gpu_free: int | None, ranks: int = 0) -> None:
    """DoesNotFit when an option's arrays need more than ``free`` bytes of memory, or of the GPU's."""
    from megapatch.tools.offload_bench import adam_step, measure

    free = max(0, free - RESERVE_BYTES)
    largest = max((*wanted.memory_sizes, *wanted.link_sizes), default=0)
    buffers = measure.ARRAYS if gpu_free is not None else 2 * measure.HOST_BUFFERS
    link = max(wanted.link_sizes, default=0)
    for flag, size, each, room, where in (
        ("--numel", wanted.numel, adam_step.NEEDED_BYTES + ARRAYS_BYTES * ranks, free, "memory"),
        ("--sizes", largest, buffers, free, "memory"),
        *([("--sizes", link, 2, gpu_free, "GPU memory")] if gpu_free is not None else []),
    ):
        if size * each > room:
            raise DoesNotFit(
                f"{flag} {short(size)}: needs {short(size * each)}B of {where} ({each} x), {short(room)}B are free "
                f"(cgroup limits counted); choose at most {room // each} or free some"
            )


def measurements(options: Options, wanted: Plan, given: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows as they are measured; torch's thread count is put back at the end. ``given`` are mp-pretrain's options."""
    import torch

    parts = {"bandwidth": _bandwidth, "adam": _adam, "overlap": _overlap}
    before = torch.get_num_threads()
    try:
        for name in MEASURES:
            if name in options.measure and name in parts:
                yield from parts[name](options, wanted)
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
    if "sweep" in options.measure:
        yield from _sweep(options, given)


def _bandwidth(options: Options, wanted: Plan) -> Iterator[dict[str, Any]]:
    from megapatch.tools.offload_bench.measure import link_rows, memory_rows, resident_rows

    log.info("memory bandwidth: arrays of %s", " ".join(f"{short(n)}B" for n in wanted.memory_sizes))
    yield from memory_rows(wanted.memory_sizes, wanted.threads, wanted.rounds)
    log.info("link: transfers of %sB to %sB", *map(short, (wanted.link_sizes[0], wanted.link_sizes[-1])))
    yield from link_rows(wanted.link_sizes, wanted.rounds, options.rate)
    yield from resident_rows()


def _adam(options: Options, wanted: Plan) -> Iterator[dict[str, Any]]:
    from megapatch.tools.offload_bench.adam_step import adam_rows, contention_rows

    log.info("adam: %s parameters, threads %s", short(wanted.numel), " ".join(map(str, wanted.threads)))
    yield from adam_rows(wanted.numel, wanted.threads, wanted.chunks, wanted.rounds, wanted.limit_s, options.rate)
    if options.ranks > 1:
        log.info("adam: %d processes at once", options.ranks)
        chunk = max(wanted.chunks)
        yield from contention_rows(wanted.numel, wanted.threads[0], chunk, wanted.rounds, (1, options.ranks))


def _overlap(options: Options, wanted: Plan) -> Iterator[dict[str, Any]]:
    from megapatch.tools.offload_bench.measure import overlap_rows

    log.info("overlap: copies and Adam beside matrix products")
    yield from overlap_rows(min(wanted.numel, QUICK_NUMEL), 64 << 20, wanted.rounds, options.rate)


def _sweep(options: Options, given: Sequence[str]) -> Iterator[dict[str, Any]]:
    from megapatch.tools.offload_bench.measure import gpu_name
    from megapatch.tools.offload_bench.pareto import judged, plot
    from megapatch.tools.offload_bench.sweep import Sweep, points

    assert options.output is not None
    link = ["--offload-link-gb-per-s", f"{options.link_gb_per_s:g}"] if options.link_gb_per_s else []
    sweep = Sweep(options.output, (*given, *link), options.steps, options.ranks, options.timeout_s)
    memory, fractions = options.device_memory_gib, options.fractions
    if memory is None and not gpu_name() and "auto" in fractions:
        log.info("no point auto: on a CPU nothing says what is to fit (--device-memory-gib)")
        fractions = [fraction for fraction in fractions if fraction != "auto"]
    fit = [] if memory is None else ["--device-memory-gib", f"{memory:g}"]
    rows = judged(list(sweep.rows(points(fractions, options.recompute, options.activations, fit))))
    title = "Each way to save memory" + (f", link of {options.link_gb_per_s:g} GB/s emulated on a CPU" if link else "")
    (options.output / "sweep.svg").write_text(plot(rows, title))
    log.info("%s", options.output / "sweep.svg")
    yield from rows


def bench(options: Options, given: Sequence[str] = ()) -> int:
    """Measure; rows to stdout, a table and what it means to stderr. 1 where a point of a sweep failed."""
    import torch

    from megapatch.tools.offload_bench.measure import gpu_free_bytes, gpu_name
    from megapatch.tools.offload_bench.tell import meaning, tables

    if ("sweep" in options.measure) != bool(given):
        raise UserError("--measure sweep needs mp-pretrain's options after --, and nothing else does")
    gpu = gpu_name()
    wanted = plan(options, torch.get_num_threads(), bool(gpu))
    adam_ranks = options.ranks if "adam" in options.measure and options.ranks > 1 else 0
    refuse_what_does_not_fit(wanted, free_bytes(), gpu_free_bytes() if gpu else None, adam_ranks)
    if options.link_gb_per_s and gpu:
        raise UserError("--link-gb-per-s: a GPU has a link of its own; leave it away")
    rows: list[dict[str, Any]] = []
    print(json.dumps(machine(wanted, gpu, torch.__version__)), flush=True)
    for row in measurements(options, wanted, given):
        rows.append(row)
        print(json.dumps(row), flush=True)
    sentences = meaning(rows)
    for text in sentences:
        print(json.dumps({"part": "meaning", "text": text}))
    log.info("\n%s", "\n".join([tables(rows), "", *sentences]))
    return int(any("error" in row or row.get("same_loss") is False for row in rows))


def machine(wanted: Plan, gpu: str, torch_version: str) -> dict[str, Any]:
    """A row about where this runs; warns of what makes figures rough."""
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if 0 < wanted.numel * ARRAYS_BYTES < CACHES * l3_bytes():
        log.warning(
            "--numel %s: the arrays are less than %d x the L3 cache, which will help", short(wanted.numel), CACHES
        )
    if load > cpus / 4:
        log.warning("the machine is busy (load %.1f on %d CPUs): what it can do alone will not show", load, cpus)
    return {"part": "machine", "cpus": cpus, "gpu": gpu, "torch": torch_version, "load": load}


def main(argv: Sequence[str] | None = None) -> int:
    """mp-offload-bench; what comes after -- is for mp-pretrain."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    work = partial(bench, given=words[end + 1 :])
    return run(Options, work, prog="mp-offload-bench", epilog=EXAMPLES, argv=words[:end])


if __name__ == "__main__":
    raise SystemExit(main())
