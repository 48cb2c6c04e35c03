"""Ranks that are killed, stopped or stuck, and disks that fail, on real processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loopback_slurm
import pytest
from trainer_runs import ENVIRONMENT, arguments, corpus, log_of, model, train

from megapatch.models import core_files
from megapatch.trainer.pretrain import main
from megapatch.trainer.saving import locks

SCRIPT = [sys.executable, "-m", "megapatch.trainer.pretrain"]
LONG = "--train-iters 100000 --log-interval 100000 --watchdog-s 12 --async-save --save-interval 20 --keep 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    corpus(made)
    model(made, "dense")
    return made


class Runs:
    """Two processes of one run, started without a launcher."""

    def __init__(self, words: list[str], save: Path) -> None:
        port = str(loopback_slurm.free_ports(1)[0])
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        self.save, self.ranks = save, []
        save.mkdir(parents=True)
        for rank in range(2):
            own = ENVIRONMENT | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (save / f"said{rank}").open("w") as said:
                self.ranks.append(subprocess.Popen([*SCRIPT, *words], env=own, stderr=said))

    def at_step(self, step: int, limit_s: float = 200) -> None:
        end = time.monotonic() + limit_s
        while not any(f'"step": {step},' in text for text in self._log()):
            assert all(rank.poll() is None for rank in self.ranks), self.said(0) + self.said(1)
            assert time.monotonic() < end, "it did not come so far"
            time.sleep(0.05)

    def _log(self) -> Iterator[str]:
        path = self.save / "log.jsonl"
        yield path.read_text() if path.exists() else ""

    def said(self, rank: int) -> str:
        return (self.save / f"said{rank}").read_text()

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


HIT = {"killed": (signal.SIGKILL, 1, "is gone"), "stopped": (signal.SIGSTOP, 0, "is stopped")}  # signal, rank, word


@pytest.mark.parametrize("how", HIT)
def test_a_rank_that_is_lost_ends_the_other_in_30_s_which_names_it(folder: Path, tmp_path: Path, how: str) -> None:
    number, lost, word = HIT[how]
    runs = Runs(arguments(folder, "dense", str(tmp_path / how), LONG), tmp_path / how)
    try:
        runs.at_step(30)
        runs.ranks[lost].send_signal(number)
        start = time.monotonic()
        assert runs.ranks[1 - lost].wait(timeout=60) == 1
        print(f"{how}: the other ended after {time.monotonic() - start:.1f} s")
        assert time.monotonic() - start < 30
        *before, last = runs.said(1 - lost).splitlines()
        assert f"mp-pretrain[{1 - lost}]: error: " in last
        assert f"rank {lost} (process {runs.ranks[lost].pid} on " in last and word in last
        assert "Traceback" not in "\n".join(before)
        assert core_files.resolve(runs.save).name >= "iter_0000020"
        if how == "stopped":
            stacks = (runs.save / "stacks" / "rank-1.txt").read_text()
            assert "most recent call first" in stacks and "loop.py" in stacks and "pretrain.py" in stacks
    finally:
        runs.end()


def test_two_runs_with_one_save_are_refused_and_a_killed_one_is_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WAIT_S", 0.2)
    save = tmp_path / "run"
    words = arguments(folder, "dense", str(save), "--train-iters 3 --save-interval 1")
    assert main(words) == 0
    (save / "iter_0000009.tmp").mkdir()  # as a killed run leaves it
    more = arguments(folder, "dense", str(save), "--train-iters 4")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(save)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    assert main(more) == 1
    assert f'{save}: another run ({{"host": ' in capfd.readouterr().err.splitlines()[-1]
    assert (save / "iter_0000009.tmp").exists()
    holder.kill()
    holder.wait()
    assert main(more) == 0
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_{n:07d}" for n in (1, 2, 3, 4)]


HOLD = """
import sys, time, pathlib
from megapatch.trainer.saving import locks
locks.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


SMALL_DISK = 'mount -t tmpfs -o size=$1 none "$2" && shift 2 && exec "$@"'


def test_a_disk_that_is_really_full_exits_73_and_keeps_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("no right to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "after.sh").write_text(f'"$@"; echo $?; cd {disk}/run; ls -d iter_*; cat {core_files.TRACKER}')
    words = arguments(folder, "dense", str(disk / "run"), "--save-interval 1 --async-save")
    command = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "-", "2200k", str(disk), "sh", str(tmp_path / "after.sh")]
    ran = subprocess.run([*command, *SCRIPT, *words], env=ENVIRONMENT, capture_output=True, text=True)
    status, *left = ran.stdout.split()
    assert status == "73", ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"mp-pretrain: error: {disk}/run") and "disk full: 791,040 bytes needed, " in last
    assert left == ["iter_0000001", "1"] or left == ["iter_0000001", "iter_0000002", "2"]


def test_data_and_cache_on_a_disk_that_is_read_only_are_trained_on(folder: Path, tmp_path: Path) -> None:
    expected = train(folder, str(tmp_path / "first"))  # makes the indices
    mount = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a disk that is read-only")
    words = arguments(folder, "dense", str(tmp_path / "second"))
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "-", *SCRIPT, *words]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert losses(log_of(tmp_path / "second")) == losses(expected)


def losses(records: list[dict[str, Any]]) -> list[Any]:
    return [(record["step"], record["loss"]) for record in records if record["event"] == "train"]
