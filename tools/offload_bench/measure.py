"""Bandwidth of host memory and of the link, what host memory really takes, and what runs beside what.

The one file here that knows about GPUs. On a CPU the link is a thread that copies, at a rate if one is given.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import torch

from megapatch.models.device import Device
from megapatch.models.link import Lane, lanes
from megapatch.tools.offload_bench.adam_step import Arrays, Runs, fused_step, take_turns

BATCH_BYTES = 64 << 20  # small transfers are timed in batches of about this many bytes
TOUCHED = {"copy": 2, "triad": 3, "read": 1, "update": 2}  # arrays read or written
ARRAYS = 3  # of memory_rows
HOST_BUFFERS = 2  # of link_rows
ODD_BYTES = (33 << 20, 65 << 20, 129 << 20)  # a little above a power of two


def device() -> Device:
    """The GPU, or the CPU without one; megatron-core is not needed here."""
    return Device("cuda" if torch.cuda.is_available() else "cpu", False, False, "")


def gpu_name() -> str:
    """Name of the GPU, '' without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def gpu_free_bytes() -> int:
    """Free bytes of the GPU."""
    return int(torch.cuda.mem_get_info()[0])


def memory_rows(sizes: Sequence[int], threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """copy, triad, read and update (in place) of fp32 arrays of ``sizes`` bytes.

    Counted as STREAM does: copy 2 arrays, triad 3, read 1, update 2 (it reads and writes one). The lines that copy and
    triad fetch before overwriting them (write-allocate) are not counted, which is why update shows more bytes a second.
    """
    for size in sizes:
        a, b, c = (torch.ones(max(1, size // 4)) for _ in range(ARRAYS))
        runs: Runs = {
            "copy": partial(b.copy_, a),
            "triad": partial(torch.add, b, c, alpha=2.0, out=a),
            "read": partial(torch.sum, a),
            "update": partial(a.mul_, 1.0),
        }
        for number in threads:
            torch.set_num_threads(number)
            for name, seconds in take_turns(rounds, runs).items():
                moved = TOUCHED[name] * a.nbytes
                yield _row("memory", name, moved, min(seconds)) | {"bytes": a.nbytes, "threads": number}


def link_rows(sizes: Sequence[int], rounds: int, rate: float | None) -> Iterator[dict[str, Any]]:
    """Host to device, device to host and both at once, pageable and pinned; ``rate`` to emulate, in bytes/s."""
    on_gpu = device().kind != "cpu"
    for pinned in (True, False) if on_gpu else (False,):
        for size in sizes:
            for name, seconds in transfer_times(size, pinned, rounds, rate).items():
                moved = size * (2 if name == "both" else 1)
                about = {"bytes": size, "pinned": pinned, "emulated": not on_gpu}
                yield _row("link", name, moved, seconds) | about


def transfer_times(size: int, pinned: bool, rounds: int, rate: float | None = None) -> dict[str, float]:
    """Seconds of one transfer of ``size`` bytes each way ('h2d', 'd2h') and of one pair at once ('both').

    Small ones are issued back to back, as chunks are. Two host threads: a pageable copy blocks the one that asks.
    """
    here = device()
    down, up = lanes(here.torch, rate)
    host: Callable[[int], torch.Tensor] = here.host_memory if pinned else partial(torch.empty, dtype=torch.uint8)
    sent, fetched = (host(size).fill_(1) for _ in range(HOST_BUFFERS))
    target, source = (torch.ones(size, dtype=torch.uint8, device=here.torch) for _ in range(2))
    here.synchronize()
    repeat = max(1, min(256, BATCH_BYTES // size))
    h2d, d2h = _batch(up, target, sent, repeat), _batch(down, fetched, source, repeat)
    with ThreadPoolExecutor(2) as pool:

        def both() -> None:
            for done in [pool.submit(h2d), pool.submit(d2h)]:
                done.result()

        times = take_turns(rounds, {"h2d": h2d, "d2h": d2h, "both": both})
    return {name: min(seconds) / repeat for name, seconds in times.items()}


def _batch(lane: Lane, target: torch.Tensor, source: torch.Tensor, repeat: int) -> Callable[[], None]:
    def run() -> None:
        copies = [lane.copy(target, source) for _ in range(repeat)]
        lane.wait(copies[-1])
        device().synchronize()

    return run


def resident_rows() -> Iterator[dict[str, Any]]:
    """Bytes that host memory takes for each byte asked for: torch's pinned memory, and ours."""
    kinds: dict[str, Callable[[int], torch.Tensor]] = {"exact": device().host_memory}
    if device().kind != "cpu":
        kinds["torch"] = partial(torch.empty, dtype=torch.uint8, pin_memory=True)
    for kind, allocate in kinds.items():
        for size in ODD_BYTES:
            before, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
            memory = allocate(size).fill_(1)
            grown = psutil.Process().memory_info().rss - before
            gone = (
                free - psutil.virtual_memory().available if kind == "torch" else 0
            )  # the driver's count in no process
            yield {"part": "resident", "kind": kind, "bytes": size, "resident_bytes": max(grown, gone)}
            del memory


def overlap_rows(numel: int, size: int, rounds: int, rate: float | None) -> Iterator[dict[str, Any]]:
    """How much of copies of ``size`` bytes, and of Adam on ``numel`` parameters, runs beside matrix products.

    efficiency = (alone + products alone - both at once) / the shorter: 1 all of it, 0 one after the other.
    """
    here = device()
    down, up = lanes(here.torch, rate)
    sent, fetched = (here.host_memory(size).fill_(1) for _ in range(HOST_BUFFERS))
    target, source = (torch.ones(size, dtype=torch.uint8, device=here.torch) for _ in range(2))
    arrays = Arrays(numel)
    width = 8192 if here.kind != "cpu" else 512
    a = torch.ones(width, width, device=here.torch)
    with ThreadPoolExecutor(1) as pool:
        jobs: dict[str, Callable[[], Callable[[], object]]] = {
            "d2h": lambda: partial(down.wait, down.copy(fetched, source)),
            "h2d": lambda: partial(up.wait, up.copy(target, sent)),
            "adam": lambda: pool.submit(fused_step, arrays, min(numel, 4 << 20)).result,
        }

        def products() -> None:
            for _ in range(8):
                torch.mm(a, a)
            here.synchronize()

        def alone(start: Callable[[], Callable[[], object]]) -> None:
            start()()
            here.synchronize()

        def beside(start: Callable[[], Callable[[], object]]) -> None:
            end = start()
            products()
            end()
            here.synchronize()

        runs: dict[str, Callable[[], Any]] = {"products": products}
        runs |= {f"{name} alone": partial(alone, start) for name, start in jobs.items()}
        runs |= {f"{name} beside": partial(beside, start) for name, start in jobs.items()}
        times = {name: min(seconds) for name, seconds in take_turns(rounds, runs).items()}
    for name in jobs:
        moved, computed, both = times[f"{name} alone"], times["products"], times[f"{name} beside"]
        found = {"part": "overlap", "operation": name, "alone_s": moved, "products_s": computed, "beside_s": both}
        yield found | {"efficiency": (moved + computed - both) / min(moved, computed), "emulated": here.kind == "cpu"}


def _row(part: str, operation: str, moved: int, seconds: float) -> dict[str, Any]:
    return {"part": part, "operation": operation, "seconds": seconds, "bytes_per_s": moved / seconds}
