"""Writing a checkpoint, beside the training or at once: either old or new, whenever the run is killed.

A save goes through two stages, each in a thread of its own, never in a fork: every rank writes its share, then rank 0
seals the folder, renames it, and moves the tracker. Between them, and nowhere else, the ranks speak to each other, in
their main threads: ``latest`` moves only when all is durable on all ranks.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megapatch.models import commit, core_files
from megapatch.models.cli import UserError
from megapatch.models.patches.checkpoint import ONE_FILE, REQUEST
from megapatch.trainer.ranks import first, together
from megapatch.trainer.saving import disk
from megapatch.trainer.saving.checkpoint import CONTENT, STAGED, Source, layout, state
from megapatch.trainer.session import Session
from megapatch.trainer.sizes.describe import as_file
from megapatch.trainer.tuning import adapters

OPTIONS = "options.args"  # what the run was started with, for mp-pretrain @CHECKPOINT/options.args
BYTES_PER_PARAMETER = {"fp32": 4 + 4 + 4, "bf16": 2 + 4 + 4 + 4}  # weight, master, moments
T = TypeVar("T")


class Task(Generic[T]):
    """Work in a thread that does not outlive the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work, self.found, self.problem = work, None, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    work: Callable[[], T]
    found: T | None
    problem: Exception | None

    def _run(self) -> None:
        try:
            self.found = self.work()
        except Exception as error:  # raised where the main thread asks for the result
            self.problem = error

    def result(self) -> T:
        """What the work gave, or raised; waits for it."""
        self.thread.join()
        if self.problem:
            raise self.problem
        return self.found  # type: ignore[return-value]


class Saving:
    """One checkpoint on its way to the disk (every rank must make one, and call ``advance`` at the same places)."""

    def __init__(self, session: Session, source: Source, *, beside: bool) -> None:
        """``beside``: the training goes on meanwhile, so that what is written is copied first."""
        self.session, self.source, self.step = session, source, session.step
        self.begun, self.held_s, self.complete = time.perf_counter(), 0.0, False
        self.target = core_files.iteration_folder(session.options.save, session.step)
        self.stage = self.target.with_name(self.target.name + STAGED)
        self.needed_bytes = session.num_saved * BYTES_PER_PARAMETER[session.options.precision]
        self.digests: dict[str, str] = {}
        self.about = {"step": session.step, "layout": layout(session.options)}
        self.about |= adapters.described(session.options, session.base)
        with together(), disk.naming(self.target, self.needed_bytes):
            if first():
                commit.remove(self.stage)  # of a save that failed
                self.stage.mkdir(parents=True)
                self._check_room()
        with self._cleaning(), self._naming_failures():
            self.request = _request(session, self.stage)
        request = snapshot(self.request) if beside else self.request
        self.writing: Task[dict[str, str]] | None = Task(lambda: write(request))
        self.finishing: Task[None] | None = None
        self.held_s = self.seconds()

    def busy(self) -> bool:
        """Is this rank still at its part?"""
        task = self.writing or self.finishing
        return task is not None and task.thread.is_alive()

    def advance(self) -> bool:
        """Go on to the next stage once no rank is busy (collective; waits); True when the checkpoint is complete."""
        start = time.perf_counter()
        if self.complete:
            return True
        with self._cleaning():
            if self.writing:
                self._gather(self.writing)
                self.writing = None
                self.finishing = Task(self._finish) if first() else None
            else:
                with together(), disk.naming(self.target, self.needed_bytes):
                    if self.finishing:
                        self.finishing.result()
                self.complete = True
        self.held_s += time.perf_counter() - start
        return self.complete

    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.begun

    def wait(self) -> Path:
        """Wait until the checkpoint is complete (collective); its folder."""
        while not self.advance():
            pass
        return self.target

    def _gather(self, writing: Task[dict[str, str]]) -> None:
        """Every rank's share is durable: have megatron-core write its own metadata."""
        with together(), disk.naming(self.stage, self.needed_bytes):
            mine = writing.result()
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, mine)
        self.digests = {name: digest for digests in everyones for name, digest in digests.items()}
        with self._naming_failures():
            for finalize in self.request.finalize_fns:
                finalize()

    def _check_room(self) -> None:
        """Refuse before the first byte what the disk cannot hold."""
        if shutil.disk_usage(self.stage).free < self.needed_bytes:
            self.stage.rmdir()
            raise disk.failed(self.stage.parent, "disk full", self.needed_bytes, self.stage.parent)

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Leave nothing of a save that failed, on a disk that may be full."""
        try:
            yield
        except UserError:  # on rank 0, when all have heard of it
            shutil.rmtree(self.stage, ignore_errors=True)
            raise

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Turn megatron-core's and torch's reports of files that could not be written into one line."""
        try:
            with disk.naming(self.stage, self.needed_bytes):
                yield
        except CheckpointException as error:  # on every rank
            if not first():
                raise SystemExit(disk.EXIT_STATUS) from error
            reasons = "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))
            raise disk.failed(self.stage, f"not written ({reasons})", self.needed_bytes, self.target) from error

    def _finish(self) -> None:
        """Seal the staged folder, move it into place, name it in the tracker, and remove what --keep does not keep."""
        options, target = self.session.options, self.target
        self.source.copy(self.stage / core_files.HF_SUBFOLDER)
        (self.stage / OPTIONS).write_text(as_file(options))
        commit.seal(self.stage, tool=options.tool, about=self.about, digests=self.digests)
        if target.exists():  # saved by a run that was killed before it named it in the tracker, or went back
            discard(target)
        with commit.staged_file(target.parent / OPTIONS) as stage:
            stage.write_text(as_file(options))
        os.rename(self.stage, target)
        commit.fsync(target.parent)
        core_files.write_tracker(target.parent, self.step)
        if options.keep:
            older = [path for path in sorted(target.parent.glob("iter_" + "[0-9]" * 7)) if path.name <= target.name]
            for old in older[: -options.keep]:
                discard(old)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; what is left where that is cut off has a name that says so."""
    aside = checkpoint.with_name(f"{checkpoint.name}.old{STAGED}")
    commit.remove(aside)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)


def _request(session: Session, stage: Path) -> AsyncRequest:
    """megatron-core's plan of what this rank writes (collective); common.pt is written."""
    gathering = session.chunks if session.options.overlap_param_gather else []
    for chunk in gathering:
        chunk.disable_forward_pre_hook()  # and bring every rank's parameters up to date
    parts = state(session, loading=False)
    request = dist_checkpointing.save(parts, str(stage), async_sharded_save=True, content_metadata=dict(CONTENT))
    for chunk in gathering:
        chunk.enable_forward_pre_hook()
    assert request is not None
    return request


def snapshot(request: AsyncRequest) -> AsyncRequest:
    """The same request on copies in the host's memory of the tensors, which training may then change."""
    if request.async_fn is None:
        return request
    rank, buckets, results = request.async_fn_args
    copies = [
        (path, name, (others, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
        for path, name, (others, tensors) in buckets
    ]
    return request._replace(async_fn_args=(rank, copies, results), preload_fn=None)


@cache
def one_file() -> Callable[..., None]:
    """megatron-core's writer of a file, as this module knows it and what it is given (UserError where either changed).

    To be asked for before the first step: what the files on the disk say later, after an upgrade, does not matter.
    """
    REQUEST.function()
    return ONE_FILE.function().__wrapped__  # type: ignore[no-any-return] # gc stays on


def write(request: AsyncRequest) -> dict[str, str]:
    """Write and fsync this rank's files, in this thread; the digest of each by name."""
    if request.async_fn is None:
        return {}
    _, buckets, results = request.async_fn_args
    if request.preload_fn is not None:
        buckets = request.preload_fn()  # to the host's memory
    transforms, _ = request.async_fn.args  # type: ignore[attr-defined]
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        told: queue.Queue[Any] = queue.Queue()
        begun: queue.Queue[int] = queue.Queue()
        begun.put(number)
        one_file()(transforms, number, bucket, told, begun, True)
        _, written[number] = told.get()
        if isinstance(written[number], Exception):
            raise written[number]
    results.put(written)
    return {name: commit.digest(Path(path)) for path, name, _ in buckets}
