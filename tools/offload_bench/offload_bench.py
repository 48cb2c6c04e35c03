"""mp-offload-bench: what this machine gives an offloaded optimizer: link, memory, CPU Adam."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.space import count, free_bytes, short

log = logging.getLogger(__name__)
PARTS = ("bandwidth", "adam")
LINK_SIZES = tuple(2**power for power in range(16, 31, 2))  # 64 KiB to 1 GiB
MEMORY_SIZES = (256 << 20,)
CHUNKS = tuple(2**power for power in range(14, 25, 2))  # 16 Ki to 16 Mi elements
NUMEL, QUICK_NUMEL = 32 << 20, 16 << 20
RESERVE_BYTES = 64 << 20  # left free for everything but the arrays
ARRAYS_BYTES = 16  # per parameter: p, g, m, v in fp32
CACHES = 8  # times the last-level cache is large enough to measure memory
EXAMPLES = """examples:
  mp-offload-bench
  mp-offload-bench --parts adam --numel 256Mi --threads 1 8 16 --json > adam.jsonl

The memory floor is a measurement of the same run: sweeps over the same arrays that move the same 28 bytes per
parameter (read p, g, m, v; write p, m, v) and compute next to nothing, taking turns with the kernels. All times are
the smallest of --rounds. exit status: 0 measured; 1 it does not fit in memory; 2 wrong usage."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Measure what this machine gives an offloaded optimizer: host-device link, memory bandwidth, CPU Adam step."""

    parts: list[str] = opt("what to measure: bandwidth, adam; separated by blanks or commas", list(PARTS), nargs="+")
    numel: Optional[int] = opt(
        f"parameters in the Adam step, such as 64Mi (default: {short(NUMEL)}, with --quick {short(QUICK_NUMEL)})",
        None,
        type=count,
    )
    chunks: list[int] = opt(
        "elements in one chunk of the Adam step, such as 4Mi (default: 16Ki to 16Mi)", [], nargs="+", type=count
    )
    sizes: list[int] = opt(
        "bytes of one buffer, such as 64KiB (default: transfers of 64KiB to 1GiB where there is a GPU, memory arrays "
        "of 256MiB)",
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
    quick: bool = opt("smaller defaults: under 10 seconds, rougher figures", False)
    json: bool = opt("JSON lines on stdout instead of tables, one as soon as it is measured", False)

    def __post_init__(self) -> None:
        """Check what argparse cannot."""
        for part in self.chosen():
            if part not in PARTS:
                raise ValueError(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
        for flag, values, part in (("--sizes", self.sizes, "bandwidth"), ("--chunks", self.chunks, "adam")):
            if values and part not in self.chosen():
                raise ValueError(f"{flag} has no effect without {part} in --parts")
        if self.numel and "adam" not in self.chosen():
            raise ValueError("--numel has no effect without adam in --parts")

    def chosen(self) -> list[str]:
        """The parts, with commas taken apart."""
        return [part for given in self.parts for part in given.split(",")]


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
    adam, bandwidth = ("adam" in options.chosen()), ("bandwidth" in options.chosen())
    return Plan(
        numel=(options.numel or (QUICK_NUMEL if quick else NUMEL)) if adam else 0,
        chunks=tuple(options.chunks) or (CHUNKS[::2] if quick else CHUNKS),
        memory_sizes=(sizes or (tuple(n // 4 for n in MEMORY_SIZES) if quick else MEMORY_SIZES)) if bandwidth else (),
        link_sizes=(sizes or (LINK_SIZES[::2] if quick else LINK_SIZES)) if bandwidth and gpu else (),
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


def refuse_what_does_not_fit(wanted: Plan, free: int, gpu_free: int) -> None:
    """A UserError when an option's arrays need more than ``free`` bytes of memory, or of the GPU's."""
    from megapatch.tools.offload_bench import adam_step, measure

    free = max(0, free - RESERVE_BYTES)
    largest = max((*wanted.memory_sizes, *wanted.link_sizes), default=0)
    buffers = measure.ARRAYS if wanted.memory_sizes else measure.HOST_BUFFERS
    for flag, size, each, room, where in (
        ("--numel", wanted.numel, adam_step.NEEDED_BYTES, free, "memory"),
        ("--sizes", largest, buffers, free, "memory"),
        ("--sizes", max(wanted.link_sizes, default=0), 2, gpu_free, "GPU memory"),
    ):
        if size * each > room:
            raise UserError(
                f"{flag} {short(size)}: needs {short(size * each)}B of {where} ({each} x), {short(room)}B are free "
                f"(cgroup limits counted); choose at most {room // each} or free some"
            )


def measurements(wanted: Plan) -> Iterator[dict[str, Any]]:
    """Rows as they are measured; torch's thread count is put back at the end."""
    import torch

    from megapatch.tools.offload_bench.adam_step import adam_rows
    from megapatch.tools.offload_bench.measure import link_rows, memory_rows

    before = torch.get_num_threads()
    try:
        if wanted.memory_sizes:
            log.info("memory bandwidth: arrays of %s", " ".join(f"{short(n)}B" for n in wanted.memory_sizes))
            yield from memory_rows(wanted.memory_sizes, wanted.threads, wanted.rounds)
        if wanted.link_sizes:
            torch.set_num_threads(before)
            log.info("link: transfers of %sB to %sB", *map(short, (wanted.link_sizes[0], wanted.link_sizes[-1])))
            yield from link_rows(wanted.link_sizes, wanted.rounds)
        if wanted.numel:
            log.info("adam: %s parameters, threads %s", short(wanted.numel), " ".join(map(str, wanted.threads)))
            yield from adam_rows(wanted.numel, wanted.threads, wanted.chunks, wanted.rounds, wanted.limit_s)
    finally:
        torch.set_num_threads(before)


def bench(options: Options) -> None:
    """Measure, then print rows (--json) or tables, and what they mean."""
    import torch

    from megapatch.tools.offload_bench.measure import gpu_free_bytes, gpu_name
    from megapatch.tools.offload_bench.tell import meaning, tables

    gpu = gpu_name()
    wanted = plan(options, torch.get_num_threads(), bool(gpu))
    refuse_what_does_not_fit(wanted, free_bytes(), gpu_free_bytes() if gpu else 0)
    cpus = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    machine = {"part": "machine", "cpus": cpus, "gpu": gpu, "torch": torch.__version__, "load": load}
    if 0 < wanted.numel * ARRAYS_BYTES < CACHES * l3_bytes():
        log.warning(
            "--numel %s: the arrays are less than %d x the L3 cache, which will help", short(wanted.numel), CACHES
        )
    if load > cpus / 4:
        log.warning("the machine is busy (load %.1f on %d CPUs): what it can do alone will not show", load, cpus)
    rows: list[dict[str, Any]] = []
    if options.json:
        print(json.dumps(machine), flush=True)
    for row in measurements(wanted):
        rows.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    sentences = meaning(rows)
    if options.json:
        for text in sentences:
            print(json.dumps({"part": "meaning", "text": text}))
    else:
        print(tables(rows), "", *sentences, sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """mp-offload-bench."""
    return run(Options, bench, prog="mp-offload-bench", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
