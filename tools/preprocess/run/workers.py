"""Worker processes that turn chunks into bytes of files, in input order however many there are.

A worker reports what a chunk holds; the parent settles the reports in input order and answers at which offsets the
bytes belong; the worker writes them there itself and says when it has. A worker that dies ends the run at once.
"""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.run.job import Job, Redo, Write
from megapatch.tools.preprocess.run.stopping import SIGNALS, Stopping
from megapatch.tools.preprocess.run.worker_process import Order, Target, serve


@dataclass(frozen=True)
class Settled:
    """The chunk after all those settled before it; its bytes are not written yet."""

    chunk: Chunk
    write: Write


@dataclass(frozen=True)
class Durable:
    """So many chunks from the beginning of this iteration have been written (to the page cache)."""

    num_chunks: int


def in_order(
    chunks: Iterator[Chunk],
    job: Job[Any],
    targets: Sequence[Target],
    num_workers: int,
    stopping: Stopping,
    close: Sequence[int] = (),
) -> Generator[Settled | Durable, None, None]:
    """Do ``job`` on every chunk in forked processes; all is written when the iteration ends.

    Workers close the descriptors ``close``: a lock ends with the parent.
    """
    crew: list[_Worker] = []
    stopping.watch(lambda: _look(crew))
    try:
        for chunk in _stoppable(chunks, stopping):
            with _undisturbed():
                crew.append(_Worker(job, targets, crew, close))
            crew[-1].give(len(crew) - 1, chunk)
            if len(crew) == num_workers:
                break
        yield from _Foreman(job, crew, _stoppable(chunks, stopping), targets, stopping).events()
    finally:
        for worker in crew:
            worker.stop()


def _stoppable(chunks: Iterator[Chunk], stopping: Stopping) -> Iterator[Chunk]:
    """The chunks; a signal or a death ends the wait for the next one, which may come from a slow pipe."""
    while True:
        with stopping.at_rest():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _look(crew: list["_Worker"]) -> None:
    """Raise the error of a worker that has ended."""
    for worker in crew:
        while worker.process.exitcode is not None:
            worker.receive()  # at last its error, or the end of the pipe


class _Foreman:
    """Hands out chunks, settles reports in input order, and follows what is written."""

    def __init__(
        self,
        job: Job[Any],
        crew: list["_Worker"],
        chunks: Iterator[Chunk],
        targets: Sequence[Target],
        stopping: Stopping,
    ) -> None:
        self.job, self.chunks, self.stopping = job, chunks, stopping
        self.itemsizes = [target.itemsize for target in targets]
        self.offsets = [target.offset for target in targets]
        self.busy, self.given = list(crew), len(crew)
        self.reported: dict[int, tuple[_Worker, Any]] = {}
        self.settled = self.durable = 0
        self.written: set[int] = set()
        self.ended = False  # the job wants no more

    def events(self) -> Iterator[Settled | Durable]:
        while self.busy and not (self.ended and self.durable == self.settled):
            by_connection = {worker.connection: worker for worker in self.busy}
            with self.stopping.at_rest():
                ready = wait(list(by_connection))
            for connection in ready:
                worker = by_connection[connection]  # type: ignore[index]
                kind, message = worker.receive()
                if kind == "report":
                    self.reported[worker.number] = (worker, message)
                else:
                    yield from self._note_written(worker)
            while self.settled in self.reported and not self.ended:
                yield from self._settle()

    def _note_written(self, worker: "_Worker") -> Iterator[Durable]:
        self.written.add(worker.number)
        before = self.durable
        while self.durable in self.written:
            self.written.remove(self.durable)
            self.durable += 1
        if self.durable > before:
            yield Durable(self.durable)
        chunk = None if self.ended else next(self.chunks, None)
        if chunk is None:
            self.busy.remove(worker)
        else:
            worker.give(self.given, chunk)
            self.given += 1

    def _settle(self) -> Iterator[Settled]:
        worker, report = self.reported.pop(self.settled)
        answer = self.job.settle(report)
        if isinstance(answer, Redo):
            worker.send(answer)
            return
        sizes = [
            int(lengths.sum(dtype="i8")) * size for lengths, size in zip(answer.lengths, self.itemsizes, strict=True)
        ]
        worker.send(Order(answer.verdict, list(self.offsets), sizes))
        self.offsets = [offset + size for offset, size in zip(self.offsets, sizes, strict=True)]
        self.settled += 1
        self.ended = answer.last
        yield Settled(worker.chunk, answer)


class _Worker:
    """One process, as its parent sees it; ``number`` is the chunk it has."""

    def __init__(self, job: Job[Any], targets: Sequence[Target], crew: list["_Worker"], close: Sequence[int]) -> None:
        context = multiprocessing.get_context("fork")  # shares the loaded tokenizer, starts in milliseconds
        self.connection, theirs = context.Pipe()
        inherited = [self.connection, *(worker.connection for worker in crew)]

        def close_all() -> None:
            for other in inherited:
                other.close()  # else this process would keep them open, and a dead parent would not be noticed
            for descriptor in close:
                os.close(descriptor)

        self.process: BaseProcess = context.Process(target=serve, args=(theirs, close_all, job, targets), daemon=True)
        self.process.start()
        theirs.close()
        self.chunk: Chunk
        self.number = -1

    def give(self, number: int, chunk: Chunk) -> None:
        """Send the next chunk."""
        self.number = number
        self.send(chunk)
        self.chunk = replace(chunk, pieces=tuple(replace(piece, data=None) for piece in chunk.pieces))

    def send(self, message: Any) -> None:
        """Send to the process; a dead one is a UserError."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._death() from None

    def receive(self) -> tuple[str, Any]:
        """('report', what ``begin`` says) or ('written', None); an error of the process is raised here."""
        try:
            kind, message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "error":
            raise message
        return kind, message

    def _death(self) -> UserError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        return UserError(
            f"worker process {self.process.pid} {how} at or after {self.chunk.place}; "
            "if memory ran out, use fewer --workers or a smaller --chunk-bytes"
        )

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.process.kill()
        self.process.join()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back: Python drops an exception raised while it forks, and the run would go on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def quiet_engine() -> Iterator[None]:
    """Keep `tokenizers` from starting threads in forked workers, and from warning about them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
