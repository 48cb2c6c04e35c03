"""Worker processes that turn chunks into bytes of one file, in input order however many there are.

A worker says how many bytes it made; the parent answers, in input order, at which offset they belong; the worker
writes them there itself. A worker that dies ends the run at once.
"""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import numpy as np

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.inputs import Chunk

R = TypeVar("R")
_ENDS = (signal.SIGINT, signal.SIGTERM)
Work = Callable[[Chunk], tuple[np.ndarray, R]]


@dataclass
class Done(Generic[R]):
    """A finished chunk: what the work reported, the bytes it wrote, and the bytes it read."""

    report: R
    num_bytes: int
    input_bytes: int


def in_order(
    chunks: Iterator[Chunk], work: Work[R], descriptor: int, num_workers: int
) -> Generator[Done[R], None, None]:
    """Do ``work`` on every chunk in forked processes, write its arrays one after another into the file
    ``descriptor``, and yield the reports in input order; all is written when the iteration ends."""
    crew: list[_Worker] = []
    try:
        for chunk in chunks:
            with _undisturbed():
                crew.append(_Worker(work, descriptor, crew))
            crew[-1].give(len(crew) - 1, chunk)
            if len(crew) == num_workers:
                break
        yield from _collect(crew, chunks)
    finally:
        for worker in crew:
            worker.stop()


def _collect(crew: list["_Worker"], chunks: Iterator[Chunk]) -> Iterator[Done[Any]]:
    finished: dict[int, tuple[_Worker, Any, int]] = {}
    following, offset, given = 0, 0, len(crew)
    busy = list(crew)
    while busy:
        by_connection = {worker.connection: worker for worker in busy}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index]
            message = worker.receive()
            if message is None:
                busy.remove(worker)
            else:
                finished[worker.number] = (worker, *message)
        while following in finished:
            worker, report, num_bytes = finished.pop(following)
            yield Done(report, num_bytes, worker.input_bytes)
            worker.send(offset)
            offset += num_bytes
            following += 1
            chunk = next(chunks, None)
            worker.give(given, chunk)
            given += chunk is not None


class _Worker:
    """One process, as its parent sees it; ``number`` is the chunk it has."""

    def __init__(self, work: Work[Any], descriptor: int, crew: list["_Worker"]) -> None:
        context = multiprocessing.get_context("fork")  # shares the loaded tokenizer, starts in milliseconds
        self.connection, theirs = context.Pipe()
        inherited = [self.connection, *(worker.connection for worker in crew)]
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, inherited, work, descriptor), daemon=True
        )
        self.process.start()
        theirs.close()
        self.number, self.input_bytes, self._place = -1, 0, "its first input"

    def give(self, number: int, chunk: Chunk | None) -> None:
        """Send the next chunk; None when there is none left."""
        self.number = number
        if chunk:
            self.input_bytes = sum(piece.size for piece in chunk)
            self._place = f"{chunk[0].path} (byte {chunk[0].start})"
        self.send(chunk)

    def send(self, message: Any) -> None:
        """Send to the process; a dead one is a UserError."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """(report, number of bytes) of the chunk, or None when all is written; its error is raised here."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, BaseException):
            raise message
        return message

    def _death(self) -> UserError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        return UserError(
            f"worker process {self.process.pid} {how} at or after {self._place}; nothing was kept; "
            "if memory ran out, use fewer --workers or a smaller --chunk-bytes"
        )

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, inherited: list[Connection], work: Work[Any], descriptor: int) -> None:
    gc.freeze()  # what the parent made is never collected here: destructors may wait for threads that were not forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
    for other in inherited:
        other.close()  # else this process would keep them open, and a dead parent would not be noticed
    try:
        while (chunk := connection.recv()) is not None:
            array, report = work(chunk)
            connection.send((report, array.nbytes))
            _write_all(descriptor, array, connection.recv())
        connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        error.add_note(traceback.format_exc())
        connection.send(error)


def _write_all(descriptor: int, array: np.ndarray, offset: int) -> None:
    data = array.view(np.uint8).data
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back: Python drops an exception raised while it forks, and the run would go on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)


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


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM (a batch system's 'time is up') end the run as Ctrl-C does, with everything removed; status 143."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
