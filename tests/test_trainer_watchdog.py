"""What a rank's watchdog concludes from what the other ranks tell: gone, stopped, stuck, or nothing wrong."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megapatch.trainer.watching import watchdog
from megapatch.trainer.watching.watchdog import Watchdog


class Store(dict[str, bytes]):
    """The processes' store, in memory."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """A process that lives."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def pair(tmp_path: Path, other: subprocess.Popen, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """The watchdog of rank 0, which has heard of rank 1, the other process; its threads do not run."""
    store = Store()
    dogs = [Watchdog(store, rank, 2, limit_s=20, folder=tmp_path, prog="mp-pretrain") for rank in range(2)]
    dogs[1].mine = dataclasses.replace(dogs[1].mine, pid=other.pid, doing="in step 3")
    dogs[1]._tell()
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    dogs[0].start()
    dogs[0].note("in step 3")
    return dogs[0]


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.monotonic() + seconds
    monkeypatch.setattr(time, "monotonic", lambda: now)


def test_nothing_is_wrong_at_first(pair: Watchdog) -> None:
    assert pair._find({}) == ""


def test_a_process_that_is_gone_is_named_after_a_grace(
    pair: Watchdog, other: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.kill()
    other.wait()
    suspects: dict[int, float] = {}
    assert pair._find(suspects) == ""
    assert pair.gone() == f"rank 1 (process {other.pid} on {pair.mine.host}) is gone"
    later(monkeypatch, watchdog.GRACE_S + 0.1)
    assert pair._find(suspects) == f"rank 1 (process {other.pid} on {pair.mine.host}) is gone"


def test_a_rank_that_said_it_leaves_is_not_missed(pair: Watchdog, other: subprocess.Popen) -> None:
    other.kill()
    other.wait()
    sign, when = pair.heard[1]
    pair.heard[1] = (dataclasses.replace(sign, left=True), when)
    assert pair._find({1: -100.0}) == "" and pair.gone(0) == ""


@pytest.mark.parametrize("stopped", [True, False])
def test_a_silent_rank_is_named_and_whether_it_is_stopped(
    pair: Watchdog, other: subprocess.Popen, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    if stopped:
        other.send_signal(signal.SIGSTOP)
        while watchdog.process_state(other.pid) != "T":
            time.sleep(0.01)
    later(monkeypatch, 21)
    pair.round = pair.moved = time.monotonic()
    word = " is stopped" if stopped else ""
    name = f"rank 1 (process {other.pid} on {pair.mine.host}){word}"
    assert pair._find({}) == f"{name}: no sign of life for 20 s; it was last in step 3"


def test_a_store_that_is_silent_is_told(pair: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, 21)
    assert pair._find({}) == "the processes' store, of rank 0 or the launcher, is silent for 20 s"


def test_a_step_that_does_not_end_is_told_with_what_each_rank_does(
    pair: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 21)
    sign, _ = pair.heard[1]
    pair.round, pair.heard[1] = time.monotonic(), (dataclasses.replace(sign, doing="in step 2"), time.monotonic())
    assert pair._find({}) == "no progress for 20 s (rank 0 in step 3; rank 1 in step 2)"
    for doing in watchdog.UNTIMED:
        pair.mine = dataclasses.replace(pair.mine, doing=doing)
        assert pair._find({}) == ""


def test_a_verdict_reaches_the_other_ranks_which_leave_stacks(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", VERDICT, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last == f"mp-sft[0]: error: watchdog: rank 7 is gone; stacks are in {tmp_path}/rank-0.txt"
    for said in (ran.stderr, (tmp_path / "rank-0.txt").read_text()):
        assert "most recent call first" in said and "in stuck" in said


VERDICT = """
import pathlib, sys, time
from megapatch.trainer.watching.watchdog import Watchdog

class Store(dict):
    set = lambda self, key, value: self.update({key: value.encode()})
    check = lambda self, keys: all(key in self for key in keys)

def stuck():
    time.sleep(60)

store = Store()
dog = Watchdog(store, 0, 1, limit_s=1, folder=pathlib.Path(sys.argv[1]), prog="mp-sft")
dog.start()
store.set("verdict", "rank 7 is gone")
stuck()
"""
