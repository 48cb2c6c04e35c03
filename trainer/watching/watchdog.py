"""Notices ranks that are gone, stopped, or stuck, and ends the run with their names and everyone's stacks.

Every rank has two threads. One tells the processes' store that it lives and how far it is, and reads what its
neighbours say; the other judges, so that a store whose owner is stopped cannot silence it. Ranks of a node watch
each other, which needs no waiting: the system knows the state of their processes. Rank 0 watches all, all watch rank 0.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapatch.models.cli import FAILED, UserError, tell_torchrun
from megapatch.trainer.ranks import let_the_first_tell

log = logging.getLogger(__name__)
PAUSE_S = 1.0  # between signs of life
GRACE_S = 3.0  # a process that is gone may have ended the run itself; its neighbours then end by themselves
NEAREST = 16  # ranks before and after, of which those of this node are watched
UNTIMED = ("starting", "saving")  # may take as long as they do
STACKS = "stacks"
ENDED = ("Z", "X")  # states of processes
_active: "list[Watchdog]" = []


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself."""

    rank: int
    host: str
    processes: str  # the namespace of their numbers: containers of one host may each count from 1
    pid: int
    beat: int
    doing: str
    left: bool = False  # it ends by itself, and says why

    def near(self, other: "Sign") -> bool:
        """Can one see the other's process?"""
        return (self.host, self.processes) == (other.host, other.processes)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def process_state(pid: int) -> str:
    """State letter of a process of this machine, as in /proc: T stopped, Z or X ended; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


class Watchdog:
    """The two threads of one rank."""

    def __init__(self, store: Any, rank: int, size: int, *, limit_s: float, folder: Path, prog: str) -> None:
        """``store``: a connection of its own; ``folder``: where stacks go. All ranks must make one, then meet."""
        self.store, self.limit_s, self.folder, self.prog = store, limit_s, folder, prog
        self.pause_s = min(PAUSE_S, limit_s / 10)
        space = os.readlink("/proc/self/ns/pid")
        self.mine = Sign(rank, socket.gethostname(), space, os.getpid(), 0, "starting")
        self.size, self.moved = size, time.monotonic()
        self.heard: dict[int, tuple[Sign, float]] = {}  # of the ranks it watches: last sign, and when it was new
        self.round = time.monotonic()  # when the store last answered
        self.verdict, self.told = "", False
        self.ended = threading.Event()
        self._tell()

    def start(self) -> None:
        """Begin to watch; every rank must have told its first sign."""
        signs = [self._read(rank) for rank in range(self.size)] if self.mine.rank == 0 else self._neighbours()
        now = time.monotonic()
        self.heard = {sign.rank: (sign, now) for sign in signs if sign.rank != self.mine.rank}
        self.round = now
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def note(self, doing: str) -> None:
        """The main thread goes on: with this, from now on."""
        self.mine, self.moved = replace(self.mine, doing=doing), time.monotonic()

    def stop(self) -> None:
        """Watch no more; this rank ends by itself."""
        self.ended.set()
        self.mine = replace(self.mine, left=True)
        leaving = threading.Thread(target=self._tell_quietly, daemon=True)
        leaving.start()
        leaving.join(2)  # the store may be gone, or its owner stopped

    def gone(self, wait_s: float = 2.0) -> str:
        """The ranks that ended without a word or are stopped, '' when none is known; waits a little to hear of them."""
        end = time.monotonic() + wait_s
        while not (found := self._gone()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def speaks(self) -> bool:
        """Is this the first living rank of its node?"""
        before = [sign for sign, _ in self.heard.values() if sign.near(self.mine) and sign.rank < self.mine.rank]
        return all(process_state(sign.pid) in ENDED for sign in before)

    def _gone(self) -> str:
        said = dict.fromkeys(ENDED, "is gone") | {"T": "is stopped"}
        near = [sign for sign, _ in self.heard.values() if sign.near(self.mine) and not sign.left]
        return ", ".join(f"{sign} {said[state]}" for sign in near if (state := process_state(sign.pid)) in said)

    def _neighbours(self) -> list[Sign]:
        """Ranks of this machine, and rank 0."""
        rank = self.mine.rank
        signs = [self._read(other) for other in {0, *range(max(0, rank - NEAREST), min(self.size, rank + NEAREST + 1))}]
        return [sign for sign in signs if sign.near(self.mine) or sign.rank == 0]

    def _tell(self) -> None:
        self.mine = replace(self.mine, beat=self.mine.beat + 1)
        self.store.set(f"sign/{self.mine.rank}", json.dumps(vars(self.mine)))

    def _tell_quietly(self) -> None:
        try:
            self._tell()
        except RuntimeError:  # the store left before us
            return

    def _read(self, rank: int) -> Sign:
        return Sign(**json.loads(self.store.get(f"sign/{rank}")))

    def _talk(self) -> None:
        """Tell and hear, until the end, or until the store is gone."""
        try:
            while not self.ended.wait(self.pause_s):
                self._tell()
                for rank, (before, _) in list(self.heard.items()):
                    sign = self._read(rank)
                    if sign != before:
                        self.heard[rank] = (sign, time.monotonic())
                if self.verdict and not self.told:
                    self.store.set("verdict", self.verdict)
                    self.told = True
                elif self.store.check(["verdict"]):
                    self.verdict, self.told = self.store.get("verdict").decode(), True
                self.round = time.monotonic()
        except RuntimeError as error:
            log.debug("watchdog: the store does not answer: %s", error)

    def _judge(self) -> None:
        suspects: dict[int, float] = {}
        while not self.ended.wait(self.pause_s / 2):
            if self.verdict or (found := self._find(suspects)):
                self.verdict = self.verdict or found
                if self.told or self.ended.wait(3 * self.pause_s) is False:  # time for the others to hear of it
                    self._end()

    def _find(self, suspects: dict[int, float]) -> str:
        """What is wrong, '' for nothing; ``suspects``: since when processes of this machine are gone."""
        now = time.monotonic()
        for rank, (sign, since) in self.heard.items():
            near = sign.near(self.mine)
            if sign.left:
                continue
            if near and process_state(sign.pid) in ENDED:
                if now - suspects.setdefault(rank, now) > GRACE_S:
                    return f"{sign} is gone"
            elif now - since > self.limit_s and now - self.round < self.limit_s:
                stopped = " is stopped:" if near and process_state(sign.pid) == "T" else ":"
                return f"{sign}{stopped} no sign of life for {self.limit_s:g} s; it was last {sign.doing}"
        if now - self.round > self.limit_s:
            return self._gone() or f"the processes' store, of rank 0 or the launcher, is silent for {self.limit_s:g} s"
        if now - self.moved > self.limit_s and self.mine.doing not in UNTIMED:
            signs = [self.mine, *(sign for sign, _ in self.heard.values())]
            doing = "; ".join(f"rank {sign.rank} {sign.doing}" for sign in sorted(signs, key=lambda sign: sign.rank))
            return f"no progress for {self.limit_s:g} s ({doing})"
        return ""

    def _end(self) -> None:
        """Write where every thread is, say why, and leave."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.mine.rank}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(2, all_threads=True)
        line = f"{self.prog}[{self.mine.rank}]: error: watchdog: {self.verdict}; stacks are in {path}"
        print(line, file=sys.__stderr__, flush=True)
        tell_torchrun(line)
        os._exit(FAILED)


def note(doing: str) -> None:
    """The main thread goes on, with this; nothing without a watchdog."""
    for dog in _active:
        dog.note(doing)


@contextmanager
def watching(options: Any) -> Iterator[None]:
    """A block in which ranks watch each other (every rank must enter); a lost one is named."""
    import torch.distributed as dist

    if not options.watchdog_s or dist.get_world_size() == 1:
        yield
        return
    default: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("watchdog", default.clone())
    place = {"limit_s": options.watchdog_s, "folder": options.save / STACKS, "prog": options.tool}
    dog = Watchdog(store, dist.get_rank(), dist.get_world_size(), **place)
    dist.barrier()  # all have told of themselves
    dog.start()
    _active.append(dog)
    try:
        yield
    except RuntimeError as error:
        if (isinstance(error, dist.DistError) or "gloo" in str(error)) and (gone := dog.gone()):
            if not dog.speaks():
                let_the_first_tell()
                raise SystemExit(FAILED) from None
            raise UserError(
                f"another process of this run ended: {gone}; look for its message, or for the system's"
            ) from error
        raise
    finally:
        _active.remove(dog)
        dog.stop()
