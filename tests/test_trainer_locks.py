"""Runs that share a folder: one writes checkpoints, one builds indices, and a killed one is in nobody's way."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_runs import ROOT

from megapatch.models.cli import UserError
from megapatch.trainer import signals
from megapatch.trainer.data import made_data
from megapatch.trainer.data.built_once import built_once
from megapatch.trainer.saving import locks

WORKER = [sys.executable, str(ROOT / "tests" / "lock_worker.py")]


def start(*words: str | Path, before: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*before, *WORKER, *map(str, words)]
    found = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": found}  # the worker stands for mp-preprocess too
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_S", 0.3)
    first = start("hold", tmp_path / "run")
    assert first.stdout and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf'run: another run \(.*"process": {first.pid}.*\) writes here; wait for it'):
        locks.hold(tmp_path / "run")
    first.kill()
    first.wait()
    locks.hold(tmp_path / "run")
    locks.hold(tmp_path / "run")  # this process has it
    second = start("hold", tmp_path / "run")
    assert "another run (" in second.communicate(timeout=60)[0]
    locks.release(tmp_path / "run")
    third = start("hold", tmp_path / "run")
    assert third.stdout and third.stdout.readline() == "held\n"
    third.kill()
    third.wait()


def test_a_run_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    first = start("hold", tmp_path)
    assert first.stdout and first.stdout.readline() == "held\n"
    ending = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {first.pid}"])
    locks.hold(tmp_path)
    locks.release(tmp_path)
    assert (first.wait(), ending.wait()) == (-9, 0)


def race(tmp_path: Path) -> None:
    """Eight processes want the same folder at the same time: one builds it, and all read the same."""
    final = tmp_path / "cache" / "indices"
    runs = [start("build", final) for _ in range(8)]
    said = [run.communicate(timeout=60) for run in runs]
    assert [out for out, _ in said] == ["of all\n"] * 8, said
    assert (tmp_path / "builds").read_text() == "x"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["indices"]


def test_eight_processes_that_race_build_once(tmp_path: Path) -> None:
    race(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(20))
def test_eight_processes_that_race_build_once_each_of_20_times(tmp_path: Path, repeat: int) -> None:
    race(tmp_path)


def test_files_are_made_into_data_once_whoever_races_or_is_killed(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some")
    first = start("make", tmp_path)
    while not (tmp_path / "builds").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.kill()  # what it started goes on
    first.wait()
    runs = [start("make", tmp_path) for _ in range(4)]
    said = {run.communicate(timeout=60) for run in runs}
    ((prefix, _),) = {(out, "") for out, _ in said}
    assert prefix.startswith(f"{tmp_path}/cache/text-") and (tmp_path / "builds").read_text() == "x"
    (tmp_path / "text").write_text("other")
    assert start("make", tmp_path).communicate(timeout=60)[0] not in ("", prefix)
    assert (tmp_path / "builds").read_text() == "xx"


def test_a_signal_ends_the_wait_for_another_run_and_asks_for_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "text").write_text("some")
    options: Any = SimpleNamespace(data_cache=tmp_path / "cache", requeue_file=tmp_path / "requeue")
    monkeypatch.setattr(signals, "_asked", [10])
    message = f"signal 10: left while another run builds in {tmp_path}/cache; run again to go on"
    with locks.alone_in(tmp_path / "cache"), pytest.raises(UserError, match=message):
        made_data.make(options, made_data.Maker("none", "none", "text", ()), [str(tmp_path / "text")], tmp_path)
    assert (tmp_path / "requeue").exists()


def test_an_error_of_the_disk_is_not_taken_for_another_run_that_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"), built_once(tmp_path / "cache" / "indices") as folder:
        (folder / "index").touch()
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_builder_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {who: tmp_path / f"other.tmp-{platform.node()}-{who}" for who in (ended.pid, os.getppid())}
    for folder in names.values():
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt), built_once(tmp_path / "mine") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [names[os.getppid()]]


def test_a_complete_folder_on_a_disk_that_is_read_only_is_used(tmp_path: Path) -> None:
    final = tmp_path / "cache" / "indices"
    final.mkdir(parents=True)
    (final / "index").write_text("of all")
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a disk that is read-only")
    run = start("build", final, before=("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "-"))
    assert run.communicate(timeout=60)[0] == "of all\n"


def test_a_file_system_without_locks_is_told_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    locks.hold(tmp_path)
    locks.release(tmp_path)
    assert f"{tmp_path}/run.lock: the file system has no locks (No locks available)" in caplog.text
