"""The worker's side of a run: begin a chunk, report, and write where the parent says."""

import gc
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.commit import naming
from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.run.job import Job, Redo
from megapatch.tools.preprocess.run.stopping import SIGNALS


@dataclass(frozen=True)
class Target:
    """An open file that grows: its next free byte is ``offset``."""

    path: Path
    descriptor: int
    itemsize: int
    offset: int


@dataclass(frozen=True)
class Order:
    """Finish the chunk: ``verdict`` of the job, and for each target the offset and the bytes there, counted."""

    verdict: Any
    offsets: list[int]
    sizes: list[int]


def serve(connection: Connection, close_all: Callable[[], None], job: Job[Any], targets: Sequence[Target]) -> None:
    """Do what comes through ``connection`` until it closes; ``close_all`` closes what only the parent needs."""
    gc.freeze()  # what the parent made is never collected here: destructors may wait for threads that were not forked
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process of a step
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    close_all()
    try:
        while True:
            _do(connection, connection.recv(), job, targets)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, or needs no more
    except Exception as error:
        error.add_note(traceback.format_exc())
        connection.send(("error", _picklable(error)))


def _do(connection: Connection, chunk: Chunk, job: Job[Any], targets: Sequence[Target]) -> None:
    report, state = job.begin(chunk)
    connection.send(("report", report))
    while isinstance(answer := connection.recv(), Redo):
        job.obey(answer.order)
        report, state = job.begin(chunk)
        connection.send(("report", report))
    arrays = job.finish(state, answer.verdict)
    for array, target, offset, size in zip(arrays, targets, answer.offsets, answer.sizes, strict=True):
        assert array.nbytes == size, f"{target.path}: {array.nbytes} bytes made, {size} announced"
        with naming(target.path):
            _write_all(target.descriptor, array, offset)
    connection.send(("written", None))


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error class of a library may have a constructor of its own
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error


def _write_all(descriptor: int, array: np.ndarray, offset: int) -> None:
    data = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
