"""Runs that are killed at any time, saving beside the training, or resumed at any step: nothing is lost, to the bit."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import ENVIRONMENT, ROOT, arguments, corpus, events, log_of, model

from megapatch.models import commit, core_files

STEPS = 40
EVERY = f"--train-iters {STEPS} --save-interval 1 --eval-interval 9 --eval-iters 1 --split 60,40 --log-interval 100"
CI_STEPS = (1, 20, 39)  # steps after which a run is resumed in the default suite
CI_KILLS, ALL_KILLS = 3, (20, 10)  # the latter: runs, and kills of each
NAMING = (core_files.METADATA, "options.args")
IN_SAVE = [  # n-th calls of a start at which the thread that saves is killed; "rename" and "rmtree" also remove
    *(("digest", 1), ("digest", 2), ("seal", 1), ("fsync", 1), ("fsync", 6), ("fsync", 14), ("rename", 1)),
    *(("write_tracker", 1), ("rename", 2), ("rename", 3), ("rename", 4), ("rmtree", 1), ("rmtree", 2)),
]
CI_SAVE = [("digest", 1), ("seal", 1), ("fsync", 6), ("write_tracker", 1), ("rename", 3), ("rmtree", 1)]


def resumed(folder: Path, cases: list[dict]) -> list[dict]:
    """Run the cases one after the other (tests/kill_worker.py)."""
    given, results = folder / "kills.json", folder / "killed.json"
    given.write_text(json.dumps(cases))
    command = [sys.executable, str(ROOT / "tests" / "kill_worker.py"), str(given), str(results)]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1700)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model with dropout, and an uninterrupted run with a checkpoint of each step."""
    made = tmp_path_factory.mktemp("killed")
    corpus(made)
    model(made, "dropout", attention_dropout=0.2)
    (run,) = resumed(made, [{"arguments": arguments(made, "dropout", "whole", EVERY)}])
    assert run["status"] == 0, run["said"]
    (made / "cpu_s").write_text(str(run["cpu_s"]))
    return made


def losses(save: Path) -> dict[int, Any]:
    """Loss and norm of each step; one that was made more than once must have come out the same."""
    found: dict[int, Any] = {}
    for record in events(log_of(save), "train"):
        numbers = (record["loss"], record["grad_norm"], record["lr"])
        assert found.setdefault(record["step"], numbers) == numbers, record
    return found


def refuse_lost(save: Path) -> None:
    """Each start goes on from the last checkpoint that the log says is complete, or from a newer one."""
    saved = 0
    for record in log_of(save):
        if record["event"] == "save":
            saved = record["step"]
        elif record["event"] == "start":
            assert (record["resumed_from"] or 0) >= saved, record


def at_step(folder: Path, step: int) -> Path:
    """A run's folder as it was after the step: with this checkpoint alone."""
    save = folder / f"from{step}"
    name = core_files.iteration_folder(Path(), step).name
    shutil.copytree(folder / "whole" / name, save / name, copy_function=os.link)
    core_files.write_tracker(save, step)
    return save


def files(checkpoint: Path) -> dict[str, dict]:
    """Size and digest of each file, but for those that name the run's folder: torch's .metadata, and the options."""
    manifest = commit.read_manifest(checkpoint)
    assert manifest is not None
    return {name: said for name, said in manifest["files"].items() if name not in NAMING}


def resume_at(folder: Path, steps: Any) -> None:
    """Resume after each of the steps, make one step, and compare all of the checkpoint with the uninterrupted run's."""
    saves = {step: at_step(folder, step) for step in steps}
    cases = [{"arguments": arguments(folder, "dropout", f"from{n}", EVERY), "one_step": True} for n in steps]
    for (step, save), ran in zip(saves.items(), resumed(folder, cases), strict=True):
        assert ran["status"] == 0, ran["said"]
        name = core_files.iteration_folder(Path(), step + 1).name
        expected, found = (files(root / name) for root in (folder / "whole", save))
        assert found == expected, f"step {step + 1}"
        shutil.rmtree(save)


def test_one_step_after_a_resume_gives_the_same_checkpoint_to_the_bit(whole: Path) -> None:
    resume_at(whole, CI_STEPS)


@pytest.mark.slow
def test_one_step_after_a_resume_at_any_step_gives_the_same_checkpoint_to_the_bit(whole: Path) -> None:
    resume_at(whole, range(1, STEPS))


def kill_often(folder: Path, kills: int, how: str, seed: int) -> None:
    """Kill a run at random times; then it comes to its end, to the bit, and no start had lost a checkpoint."""
    chance, save = random.Random(seed), folder / f"kills{seed}"
    words = arguments(folder, "dropout", save.name, f"{EVERY} {how}")
    limit_s = float((folder / "cpu_s").read_text()) / 4
    cases: list[dict] = [{"arguments": words, "signal": [9, chance.uniform(0, limit_s)]} for _ in range(kills)]
    ran = resumed(folder, [*cases, {"arguments": words}])
    killed = [run["status"] for run in ran].count(-9)
    print(
        f"seed {seed}: killed {killed} times of {kills}, {len(events(log_of(save), 'start'))} came to their first step"
    )
    assert {run["status"] for run in ran[:-1]} <= {-9, 0} and killed > kills / 2
    assert ran[-1]["status"] == 0, ran[-1]["said"]
    refuse_lost(save)
    assert losses(save) == losses(folder / "whole")
    assert core_files.read_tracker(save) == STEPS
    assert [path.name for path in save.glob("iter_*.tmp")] == []
    for path in sorted(save.glob("iter_*")):
        assert commit.verify(path)
    shutil.rmtree(save)


def test_a_run_killed_at_random_times_loses_nothing(whole: Path) -> None:
    kill_often(whole, CI_KILLS, "--async-save --keep 2", 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + ALL_KILLS[0]))
def test_20_runs_killed_10_times_each_lose_nothing(whole: Path, seed: int) -> None:
    kill_often(whole, ALL_KILLS[1], ("--async-save --keep 2", "--keep 3")[seed % 2], seed)


def hit_in_saves(whole: Path, name: str, calls: Any, what: list[int | str]) -> list[dict]:
    """Start a run that is hit at each of the calls, by each of ``what`` in turn; at the end it has lost nothing."""
    words = arguments(whole, "dropout", name, f"{EVERY} --async-save --keep 2")
    hits = [[*call, what[n % len(what)]] for n, call in enumerate(calls)]
    *ran, last = resumed(whole, [{"arguments": words, "in_save": hit} for hit in hits] + [{"arguments": words}])
    assert last["status"] == 0, last["said"]
    assert losses(whole / name) == losses(whole / "whole")
    assert sorted(path.name for path in (whole / name).glob("iter_*")) == ["iter_0000039", "iter_0000040"]
    return ran


@pytest.mark.parametrize("calls", [CI_SAVE, pytest.param(IN_SAVE, marks=pytest.mark.slow)], ids=len)
def test_a_run_killed_anywhere_in_a_save_leaves_the_old_checkpoint_or_the_new(whole: Path, calls: list) -> None:
    assert [run["status"] for run in hit_in_saves(whole, f"saving{len(calls)}", calls, ["kill"])] == [-9] * len(calls)


@pytest.mark.slow  # tests/test_trainer_faults.py has a few
def test_an_error_of_the_disk_anywhere_in_a_save_exits_73_with_path_and_bytes(whole: Path) -> None:
    for run in hit_in_saves(whole, "failing", IN_SAVE[1::2], [errno.ENOSPC, errno.EIO]):
        last = run["said"].splitlines()[-1]
        assert run["status"] == 73 and f"{whole}/failing/" in last and " bytes needed, " in last, run["said"]
