"""Bandwidth: host memory by threads, and host <-> GPU by size. The one file here that talks to the GPU."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from megapatch.tools.offload_bench.adam_step import Runs, take_turns

BATCH_BYTES = 64 << 20  # small transfers are timed in batches of about this many bytes
TOUCHED = {"copy": 2, "triad": 3, "read": 1, "update": 2}  # arrays read or written
ARRAYS = 3  # of memory_rows
HOST_BUFFERS = 2  # of link_rows


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


def link_rows(sizes: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Host to device, device to host and both at once, pageable and pinned host memory."""
    for pinned in (True, False):
        for size in sizes:
            times = transfer_times(size, pinned, rounds)
            for name, seconds in times.items():
                moved = size * (2 if name == "both" else 1)
                yield _row("link", name, moved, seconds) | {"bytes": size, "pinned": pinned}


def transfer_times(size: int, pinned: bool, rounds: int) -> dict[str, float]:
    """Seconds of one transfer of ``size`` bytes each way ('h2d', 'd2h') and of one pair at once ('both').

    Small ones are issued back to back, as chunks are. Two host threads with a stream each: a pageable copy blocks
    the thread that asks for it.
    """
    sent, fetched = (torch.empty(size, dtype=torch.uint8, pin_memory=pinned).fill_(1) for _ in range(HOST_BUFFERS))
    target, source = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    repeat = max(1, min(256, BATCH_BYTES // size))
    h2d = _batch(target, sent, repeat)
    d2h = _batch(fetched, source, repeat)
    with ThreadPoolExecutor(2) as pool:

        def both() -> None:
            for done in [pool.submit(h2d), pool.submit(d2h)]:
                done.result()

        times = take_turns(rounds, {"h2d": h2d, "d2h": d2h, "both": both})
    return {name: min(seconds) / repeat for name, seconds in times.items()}


def _batch(target: torch.Tensor, source: torch.Tensor, repeat: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()

    def run() -> None:
        with torch.cuda.stream(stream):
            for _ in range(repeat):
                target.copy_(source, non_blocking=True)
        stream.synchronize()

    return run


def _row(part: str, operation: str, moved: int, seconds: float) -> dict[str, Any]:
    return {"part": part, "operation": operation, "seconds": seconds, "bytes_per_s": moved / seconds}
