"""A run: chunks through a job into outputs, with a state to go on from, signals heeded and nothing half done."""

import errno
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import xxhash

from megapatch.models.cli import UserError, opt
from megapatch.models.commit import naming_full_disks
from megapatch.tools.preprocess.reading.inputs import Chunk, InputDigests, Source, SourceOptions, chunks, total_bytes
from megapatch.tools.preprocess.reading.pieces import Changed
from megapatch.tools.preprocess.run.job import Job, Written
from megapatch.tools.preprocess.run.ledger import BadLine
from megapatch.tools.preprocess.run.outputs import complete, publish, refuse_clashes, refuse_existing
from megapatch.tools.preprocess.run.progress import Progress
from megapatch.tools.preprocess.run.run_state import RunState
from megapatch.tools.preprocess.run.stopping import Stopped, Stopping, listening
from megapatch.tools.preprocess.run.workers import Settled, in_order, quiet_engine

_LOG = logging.getLogger("megapatch.tools.preprocess")


@dataclass(frozen=True, kw_only=True)
class RunOptions(SourceOptions):
    """What every run has."""

    output_prefix: Path = opt("path of the files written, without .bin, .idx and .manifest.json", metavar="PREFIX")
    workers: Optional[int] = opt("worker processes (default: the cores this process may use)", None)
    chunk_bytes: int = opt("bytes of input that a worker takes at a time; memory grows with it", 2 << 20)
    resume: bool = opt("go on with an interrupted run, which left PREFIX.partial; start one where there is none", False)
    force: bool = opt("replace files that exist, and what an interrupted run left", False)

    def __post_init__(self) -> None:
        for name in ("workers", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if str(self.output_prefix) != os.path.normpath(self.output_prefix) or self.output_prefix.name in ("", ".."):
            raise ValueError(
                f"--output-prefix {self.output_prefix}: expected a path that ends in a name, such as data/train"
            )
        if self.resume and self.force:
            raise ValueError(
                "--resume goes on with what an interrupted run left, --force replaces it; give one of them"
            )
        super().__post_init__()


def run_job(job: Job[Any], sources: Sequence[Source], options: RunOptions) -> list[Written] | None:
    """Do the job on all inputs and put its outputs in place; None when an interrupted run had only that left to do."""
    if options.output_prefix.is_dir():
        raise UserError(f"--output-prefix {options.output_prefix}: is a folder; add a name, such as train, to it")
    refuse_clashes(job, [source.path for source in sources])
    if not options.resume:
        refuse_existing(job, options.force)
    state = RunState(options.output_prefix)
    try:
        return _Run(job, list(sources), options, state).go()
    finally:
        state.close()


class _Run:
    """``num_chunks`` settled, which held ``num_bytes`` of the inputs; ``last`` when the job wants no more."""

    def __init__(self, job: Job[Any], sources: list[Source], options: RunOptions, state: RunState) -> None:
        self.job, self.sources, self.options, self.state = job, sources, options, state
        self.num_chunks = self.num_bytes = 0
        self.last = False
        self.mark = ""
        self.inputs: list[dict[str, Any]] = []

    def go(self) -> list[Written] | None:
        self.identity = self._identity()
        found = self._found()
        if self.options.resume and not found:
            if complete(self.job, self.options.output_prefix, self._digest()):
                self.state.remove()
                _LOG.info("%s: complete already, by the same options and inputs", self.options.output_prefix)
                return None
            self._refuse_others()
        if found and "renames" in found:
            self.state.finish(found)
            _LOG.info("%s: put in place what an interrupted run had finished", self.options.output_prefix)
            return None
        if found:
            _check_identity(self.state.folder, found["identity"], self.identity)
            self.job.ledger.restore(found["ledger"])
        with self._keeping(), listening() as stopping:
            self._start(found)
            if not self.last:
                self._work(stopping)
            self.job.ledger.close()
            self._refuse_nothing()
            return publish(self.state, self.job, self.inputs, self._digest(), stopping)

    def _found(self) -> dict[str, Any] | None:
        """The state to go on from, if that is wanted."""
        options, found = self.options, self.state.found
        if found and not options.force and not options.resume:
            raise UserError(
                f"{self.state.folder}: of an interrupted run; go on with it by --resume, or start anew with --force"
            )
        return found if options.resume else None

    def _refuse_others(self) -> None:
        """Under --resume without anything to go on with."""
        try:
            refuse_existing(self.job, False)
        except UserError:
            self.state.remove()
            raise
        _LOG.info("%s: no interrupted run to go on with; starting anew", self.state.folder)

    def _digest(self) -> str:
        """xxh3-128 of all that decides the bytes."""
        return xxhash.xxh3_128_hexdigest(repr(sorted(self.identity.items())).encode(errors="surrogateescape"))

    def _start(self, found: dict[str, Any] | None) -> None:
        if not found:
            self.state.start(self.job.outputs, None)
            self.job.restore(None, self.state.folder)
            return
        self.num_chunks, self.num_bytes, self.last = found["chunks"], found["input_bytes"], found["last"]
        self.mark, self.inputs = found["mark"], found["inputs"]
        self.state.start(self.job.outputs, found["sizes"])
        self.job.restore(found["job"], self.state.folder)
        _LOG.info("%s: going on after %s", self.state.folder, self.job.ledger.line())

    def _identity(self) -> dict[str, Any]:
        """All that decides the bytes."""
        inputs = repr([(source.label, source.kind, source.size) for source in self.sources])
        cut = {
            "inputs": xxhash.xxh3_128_hexdigest(inputs.encode(errors="surrogateescape")),
            "chunk_bytes": self.options.chunk_bytes,
        }
        return {**cut, "shard": list(self.options.part), **self.job.identity()}

    def _refuse_nothing(self) -> None:
        """A run without documents is a mistake, but for one shard of many."""
        if not self.job.ledger.documents and self.options.shards == 1:
            self.state.forget()
            raise UserError(f"no documents in --input ({self.job.ledger.line()}); nothing was written")

    def _work(self, stopping: Stopping) -> None:
        first, ledger, options = self.num_chunks, self.job.ledger, self.options
        digests = InputDigests(self.mark)
        read = _Read(digests)
        tasks = read.through(chunks(self.sources, options.chunk_bytes, shard=options.part, skip=first, hashes=digests))
        workers, lock = options.workers or num_cores(), self.state.lock
        with (
            quiet_engine(),
            Progress(total_bytes(self.sources), self.num_bytes, ledger.tokens) as progress,
            closing(in_order(tasks, self.job, self.state.targets, workers, stopping, [lock])) as events,
        ):
            for event in events:
                if isinstance(event, Settled):
                    self._settled(event, read)
                    progress.add(event.chunk.input_bytes, ledger.tokens - progress.num_tokens)
                else:
                    self.state.written(first + event.num_chunks)
                stopping.check()
            _LOG.info("%s documents, %s", f"{ledger.documents:,}", progress.line())
        if not self.last:
            self.inputs = digests.report()

    def _settled(self, event: Settled, read: "_Read") -> None:
        """Note what a chunk adds; the state after it counts once its bytes are written."""
        write, number = event.write, event.chunk.number
        for name, data in write.notes.items():
            self.state.append(name, data)
        self.num_bytes += event.chunk.input_bytes
        self.last = write.last
        if write.last:
            self.inputs = read.inputs(self.sources, number)
        said = {
            "identity": self.identity,
            "ledger": self.job.ledger.state(),
            "job": self.job.state(),
            "input_bytes": self.num_bytes,
            "mark": event.chunk.mark,
            "last": write.last,
            "inputs": self.inputs,
        }
        self.state.settled(number, write.lengths, said)
        read.forget(number)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """On failure keep what can be gone on with, and say so; else leave nothing."""
        try:
            with naming_full_disks(self.state.folder):
                yield
        except Stopped as stopped:
            kept = self._keep()
            _LOG.warning("ended by %s; %s", signal.Signals(stopped.number).name, kept or "nothing was done yet")
            if stopped.number == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stopped.number) from None
        except UserError as error:
            soon = isinstance(error, BadLine) and not self.state.has_saved  # sooner begun again than gone on with
            if soon or isinstance(error, Changed):
                self.state.forget()
            kept = self._keep()
            raise UserError(f"{error}; {kept}" if kept else str(error)) from error
        except BaseException:
            self._keep()
            raise

    def _keep(self) -> str:
        try:
            self.state.cut_back()
            self.state.save()
        except OSError as error:  # the state before is still there
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if not self.state.has_saved:
            self.state.remove()
            return ""
        return f"what is done is kept in {self.state.folder}: go on with --resume"


class _Read:
    """How many inputs had been read to their end when a chunk was cut."""

    def __init__(self, digests: InputDigests) -> None:
        self._digests = digests
        self._num_ended: dict[int, int] = {}

    def through(self, made: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks, noted."""
        for chunk in made:
            self._num_ended[chunk.number] = self._digests.num_ended
            yield chunk

    def inputs(self, sources: list[Source], number: int) -> list[dict[str, Any]]:
        """All inputs as far as they are needed when the run ends with a chunk: those read to their end have digests."""
        ended = self._digests.report()[: self._num_ended[number]]
        return ended + [{"path": source.label, "bytes": source.size} for source in sources[len(ended) :]]

    def forget(self, number: int) -> None:
        """The chunk is settled."""
        del self._num_ended[number]


def _check_identity(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            then, now = _short(old.get(name)), _short(new.get(name))
            what = (
                "other inputs (names, kinds or sizes)"
                if name == "inputs"
                else f"another {name}: {then} then, {now} now"
            )
            raise UserError(f"{folder}: of a run with {what}; go on with what it had, or start anew with --force")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
