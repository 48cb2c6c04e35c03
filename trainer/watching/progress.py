"""What is told of a run while it goes: a line a step, a bar on a terminal, memory of every rank, MFU, the page."""

import logging
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megapatch.models.device import Device
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import first
from megapatch.trainer.sizes.flops import known_peak
from megapatch.trainer.watching.profiling import Profiler

log = logging.getLogger(__name__)
GIB = 2**30


class Progress:
    """Tells of the steps of a run; every rank has one, the first talks."""

    def __init__(self, options: TrainOptions, device: Device, step: int) -> None:
        self.options, self.device = options, device
        self.peak = peak_flops(options, device)
        self.profiler = Profiler(options, device)
        self.page = Page(options) if options.report_interval and first() else None
        self.pace = Pace()
        self.open = ExitStack()
        self.bar: Any = None
        if first() and sys.stderr.isatty():
            self.open.enter_context(logging_redirect_tqdm(loggers=[logging.root]))
            self.bar = self.open.enter_context(tqdm(total=options.train_iters, initial=step, unit="step"))

    def due(self, step: int) -> bool:
        """Whether this step gets a line."""
        return step % self.options.log_interval == 0 or step == self.options.train_iters

    def measures(self, step: int, tflops: float) -> dict[str, Any]:
        """Fields for the log: MFU, memory of this rank, and of all ranks at steps that get a line (all ranks call)."""
        now, peak = memory_bytes(self.device), self.device.peak_memory_bytes()
        fields: dict[str, Any] = {"memory_bytes": now, "peak_memory_bytes": peak}
        if self.peak:
            fields["mfu"] = tflops * 1e12 / (self.peak * torch.distributed.get_world_size())
        if self.due(step) and torch.distributed.get_world_size() > 1:
            everyone = of_all_ranks(self.device, [now, peak])
            fields |= {"memory_bytes_by_rank": [a for a, _ in everyone]}
            fields |= {"peak_memory_bytes_by_rank": [b for _, b in everyone]}
        return fields

    def tell(self, fields: dict[str, Any]) -> None:
        """One line of a step's record, where one is due; the bar moves."""
        self.profiler.write()
        self.pace.step()
        if self.due(fields["step"]):
            left = self.options.train_iters - fields["step"]
            log.info(line(fields, self.options.train_iters, left * (self.pace.step_s or fields["step_s"])))
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {fields['loss']:.4f}", refresh=False)
            self.bar.update(fields["step"] - self.bar.n)
        if self.page:
            self.page.update()

    def close(self, *, failed: bool = False) -> None:
        """The bar is left as it is; the page is brought up to date, after a failure without waiting for it."""
        self.open.close()
        if not failed:
            self.profiler.write(last=True)
        if self.page and failed:
            self.page.leave()
        elif self.page:
            self.page.finish()


class Pace:
    """Seconds from step to step of late: with evaluations and checkpoints between, without the first, slow step."""

    def __init__(self, steps: int = 50) -> None:
        self.ends: deque[float] = deque(maxlen=steps + 1)

    def step(self) -> None:
        """A step has ended."""
        self.ends.append(time.monotonic())

    @property
    def step_s(self) -> float:
        """The mean; 0 before the second step."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else 0.0


def line(fields: dict[str, Any], total: int, left: float) -> str:
    """A step's record for people; ``left`` seconds to the end."""
    norm = "-" if fields["grad_norm"] is None else f"{fields['grad_norm']:.3f}"
    mfu = f"  MFU {fields['mfu']:.1%}" if "mfu" in fields else ""
    now = max(fields.get("memory_bytes_by_rank", [fields["memory_bytes"]]))
    peak = max(fields.get("peak_memory_bytes_by_rank", [fields["peak_memory_bytes"]]))
    return (
        f"step {fields['step']}/{total}  loss {fields['loss']:.4f}  lr {fields['lr']:.3g}  norm {norm}  "
        f"{fields['tokens_per_s']:,.0f} tokens/s  {fields['tflops']:.3g} TFLOP/s{mfu}  "
        f"memory {now / GIB:.2f} peak {peak / GIB:.2f} GiB  "
        f"left {int(left // 3600)}:{int(left // 60 % 60):02d}:{int(left % 60):02d}"
    )


def memory_bytes(device: Device) -> int:
    """What this process holds now: allocated on the GPU, or resident on a CPU."""
    if device.kind == "cpu":
        return psutil.Process().memory_info().rss
    return torch.get_device_module(device.torch).memory_allocated()


def peak_flops(options: TrainOptions, device: Device) -> float | None:
    """FLOP/s that one device can do at best: as --peak-tflops says, or known of it; None on a CPU."""
    known = None
    if device.kind != "cpu":
        known = known_peak(torch.get_device_module(device.torch).get_device_name(), options.precision)
    stated = options.peak_tflops or known
    return stated and stated * 1e12


def of_all_ranks(device: Device, numbers: list[int]) -> list[list[int]]:
    """These numbers of every rank, by rank (all ranks call)."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device.torch)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return [each.tolist() for each in everyone]


class Page:
    """SAVE/report.html, written by mp-report in a process of its own, which never holds training up."""

    def __init__(self, options: TrainOptions) -> None:
        self.log, self.target, self.interval_s = options.log_path, options.save / "report.html", options.report_interval
        self.child: subprocess.Popen[bytes] | None = None
        self.said: IO[bytes] | None = None
        self.next = time.monotonic() + self.interval_s

    def update(self) -> None:
        """Start an update where one is due and the last one has ended."""
        if time.monotonic() < self.next or not self._ended():
            return
        self.next = time.monotonic() + self.interval_s
        self._start(["--refresh", f"{max(1, round(self.interval_s))}"])

    def leave(self) -> None:
        """Have the page written of what there is, and do not wait: the run has failed, and others shall hear of it."""
        self._start([])

    def finish(self, limit_s: float = 60) -> None:
        """Write the page of the whole run."""
        try:
            if self.child:
                self.child.wait(limit_s)
            self._ended()
            self._start([])
            assert self.child
            self.child.wait(limit_s)
        except subprocess.TimeoutExpired:
            assert self.child
            self.child.kill()
            log.warning("%s: mp-report took more than %d s; run it by hand", self.target, limit_s)
        self._ended()

    def _start(self, more: list[str]) -> None:
        self.said = tempfile.TemporaryFile()
        words = [sys.executable, "-m", f"{__package__.partition('.')[0]}.tools.report.report", str(self.log)]
        words += ["--output", str(self.target), "--title", Path(self.target).parent.name, *more]
        self.child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.said)

    def _ended(self) -> bool:
        """Whether no update is under way; one that failed is told of."""
        if self.child is None:
            return True
        status = self.child.poll()
        if status is None:
            return False
        assert self.said
        if status:
            self.said.seek(0)
            log.warning("%s: not updated: %s", self.target, self.said.read().decode(errors="replace").strip()[-300:])
        self.said.close()
        self.child = None
        return True
