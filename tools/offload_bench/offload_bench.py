"""mp-offload-bench: what offloading costs here: link, memory, CPU Adam, overlap; and the trainer, point by point."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megapatch.models.cli import UserError, run
from megapatch.models.space import DoesNotFit, free_bytes, short
from megapatch.tools.offload_bench.options import (
    CHUNKS,
    EMULATED_SIZES,
    LINK_SIZES,
    MEASURES,
    MEMORY_SIZES,
    NUMEL,
    QUICK_NUMEL,
    Options,
)

log = logging.getLogger(__name__)
RESERVE_BYTES = 64 << 20  # left free for everything but the arrays
ARRAYS_BYTES = 16  # per parameter: p, g, m, v in fp32
OVERLAP_BYTES = 64 << 20  # of the copies beside matrix products
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
    threads = tuple(sorted(set(options.threads))) or _doubling(min(torch_threads, cpus))
    if threads[-1] > cpus:
        may = f"this process may use {cpus} CPU{'s' * (cpus > 1)}"
        raise UserError(f"--threads {threads[-1]}: {may}; choose at most {cpus}")
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


def refuse_what_does_not_fit(options: Options, wanted: Plan, free: int, gpu_free: int | None) -> None:
    """DoesNotFit when an option's arrays need more than ``free`` bytes of memory, or of the GPU's."""
    from megapatch.tools.offload_bench import adam_step, measure

    free = max(0, free - RESERVE_BYTES)
    ranks = options.ranks if "adam" in options.measure and options.ranks > 1 else 0
    ends = measure.HOST_BUFFERS * (1 if gpu_free is not None else 2)  # the emulated device's are of the same memory
    fixed = {
        "bandwidth": max(measure.ODD_BYTES),
        "overlap": ends * OVERLAP_BYTES + ARRAYS_BYTES * min(wanted.numel, QUICK_NUMEL),
    }
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
    for name in options.measure:
        if (needed := fixed.get(name, 0)) > free:
            raise DoesNotFit(
                f"--measure {name}: needs {short(needed)}B of memory, {short(free)}B are free (cgroup limits counted); "
                "leave it away or free some"
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
    yield from overlap_rows(min(wanted.numel, QUICK_NUMEL), OVERLAP_BYTES, wanted.rounds, options.rate)


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
    refuse_what_does_not_fit(options, wanted, free_bytes(), gpu_free_bytes() if gpu else None)
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
