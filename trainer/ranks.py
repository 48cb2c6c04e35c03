"""Processes that act as one: a user's mistake that any of them finds ends all of them, and is told once."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megapatch.models.cli import FAILED, USER_ERRNOS, UserError, tell_torchrun
from megapatch.trainer import signals
from megapatch.trainer.saving import disk


def first() -> bool:
    """True in the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def warn(log: logging.Logger, message: str, *args: Any) -> None:
    """Warn once, of something that every process sees."""
    if first():
        log.warning(message, *args)


def as_the_first(found: bool) -> bool:
    """What the first process has found, for all of them (every rank must call)."""
    import torch.distributed as dist

    agreed = [found]
    dist.broadcast_object_list(agreed)
    return agreed[0]


@contextmanager
def told_once_per_node() -> Iterator[None]:
    """For checks before the process groups exist: processes of one node find the same mistake, the first one tells."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
            let_the_first_tell()
            raise SystemExit(error.status) from None
        raise


def let_the_first_tell(limit_s: float = 10) -> None:
    """Wait to be asked to leave: torchrun ends all processes, whatever they are about to say, when one ends."""
    end = time.monotonic() + limit_s
    while not signals.asked() and time.monotonic() < end:
        time.sleep(0.05)


@contextmanager
def together() -> Iterator[None]:
    """A block without collectives that fails on every rank when it fails on one; rank 0 tells why.

    Every rank must enter. Without it the others would wait for the one that left.
    """
    import torch.distributed as dist

    problem, status = None, FAILED  # of this rank
    try:
        yield
    except UserError as error:
        problem, status = str(error), error.status
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        problem = f"{error.filename or 'output'}: {error.strerror}"
        status = disk.EXIT_STATUS if error.errno in disk.ERRNOS else FAILED
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (problem, status))
    for rank, (text, status) in enumerate(found):
        if text:
            told = text if rank == 0 else f"rank {rank}: {text}"
            if dist.get_rank() != 0:
                tell_torchrun(told)
                raise SystemExit(status)
            told_here = UserError(told)
            told_here.status = status
            raise told_here


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn a backend's report that another process is gone, or hangs, into one line; that process told its own."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        with told_once_per_node():
            raise UserError(
                f"another process of this run ended, or did not answer within --timeout-s; look for its message "
                f"({str(error).splitlines()[0][:200]})"
            ) from error
