"""--profile-steps: a trace of torch's profiler, and a table of operators and of communication that nothing hides."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megapatch.models.device import Device
from megapatch.trainer.options import TrainOptions

log = logging.getLogger(__name__)
Interval = tuple[float, float]  # begin and end, microseconds
GPU_KERNEL = re.compile(r"nccl(?:Dev)?Kernel_([A-Za-z]+)")
CPU_CALL = re.compile(r"gloo:(\w+)")
TOP = 25


class Profiler:
    """Profiles the steps that are asked for, on the ranks that are asked for."""

    def __init__(self, options: TrainOptions, device: Device) -> None:
        self.steps, self.device = options.profiled(), device
        self.folder = options.save / "profile"
        self.rank = torch.distributed.get_rank()
        self.wanted = self.rank in options.profile_ranks
        self.running: Any = None
        self.done: Any = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around one step, counted from 1."""
        if self.wanted and step in self.steps and self.running is None:
            self.running = torch.profiler.profile(record_shapes=False, acc_events=True)
            self.running.start()
        yield
        if self.running is not None and step == self.steps[-1]:
            self._stop()

    def _stop(self) -> None:
        self.device.synchronize()
        self.running.stop()
        self.done, self.running = self.running, None

    def write(self, *, last: bool = False) -> None:
        """Write what a profile found that has ended, or that ends now with the ``last`` step of the run."""
        if last and self.running is not None:
            self._stop()
        if self.done is None:
            return
        running, self.done = self.done, None
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank{self.rank}.json"
        stage = trace.with_name(trace.name + ".tmp")
        running.export_chrome_trace(str(stage))
        events = json.loads(stage.read_text())["traceEvents"]
        os.replace(stage, trace)
        own = "self_cpu_time_total" if self.device.kind == "cpu" else "self_device_time_total"
        operators = running.key_averages().table(sort_by=own, row_limit=TOP, max_name_column_width=60)
        table = trace.with_suffix(".txt")
        table.write_text(f"{communication_table(communication(events))}\n\nOperators by self time\n{operators}\n")
        log.info("profile: %s and %s", trace, table.name)


def communication(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per kind of communication in a trace: how often, how long in all, how long while nothing was computed (us).

    On a GPU from its kernels, on a CPU from gloo's calls and torch's operators.
    """
    found: dict[str, list[Interval]] = {}
    compute: list[Interval] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        name, begin = event["name"], float(event["ts"])
        span = (begin, begin + float(event["dur"]))
        kernel = event.get("cat") == "kernel"
        if kind := GPU_KERNEL.match(name) if kernel else CPU_CALL.match(name):
            found.setdefault(kind[1], []).append(span)
        elif kernel or (event.get("cat") == "cpu_op" and name.startswith("aten::")):
            compute.append(span)
    busy = union(compute)
    return {
        kind: {"calls": len(spans), "total_us": length(union(spans)), "exposed_us": length(minus(union(spans), busy))}
        for kind, spans in sorted(found.items())
    }


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that do not touch, in order."""
    made: list[Interval] = []
    for begin, end in sorted(spans):
        if made and begin <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((begin, end))
    return made


def minus(spans: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of ``spans`` no other covers; both as ``union`` gives them."""
    left, at = [], 0
    for begin, end in spans:
        while at < len(others) and others[at][1] <= begin:
            at += 1
        place = at
        while begin < end:
            if place == len(others) or others[place][0] >= end:
                left.append((begin, end))
                break
            if others[place][0] > begin:
                left.append((begin, others[place][0]))
            begin = max(begin, others[place][1])
            place += 1
    return left


def length(spans: Iterable[Interval]) -> float:
    """Time in intervals that do not touch."""
    return sum(end - begin for begin, end in spans)


def communication_table(found: dict[str, dict[str, float]]) -> str:
    """For people: milliseconds, and the share that no computation hides."""
    if not found:
        return "Communication: none"
    rows = [f"{'Communication':<20} {'calls':>8} {'total ms':>12} {'exposed ms':>12} {'exposed':>8}"]
    for kind, each in found.items():
        total, exposed = each["total_us"] / 1e3, each["exposed_us"] / 1e3
        share = exposed / total if total else 0.0
        rows.append(f"{kind:<20} {each['calls']:>8.0f} {total:>12.3f} {exposed:>12.3f} {share:>8.1%}")
    return "\n".join(rows)
