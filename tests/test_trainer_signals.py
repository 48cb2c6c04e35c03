"""A signal at any moment, from the first import to the last line: the run saves, or leaves without a word."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_resume_killed import resumed
from trainer_runs import ENVIRONMENT, arguments, corpus, log_of, model

from megapatch.models import core_files

SCRIPT = [sys.executable, "-m", "megapatch.trainer.pretrain"]
EVERY = "--train-iters 60 --save-interval 3 --eval-interval 2 --eval-iters 1 --split 60,40 --log-interval 50 --keep 2"
FIRST_IMPORT_S, ALL_S = 5.0, 4.0  # seconds of a processor within which the signal comes: of all, of what follows them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("signals")
    corpus(made)
    model(made, "dense")
    return made


def chosen(folder: Path, save: Path, chance: random.Random) -> tuple[list[str], int]:
    """Arguments of a run, and the signal that comes."""
    words = arguments(folder, "dense", str(save), EVERY + chance.choice(["", " --async-save"]))
    return words, chance.choice([signal.SIGTERM, signal.SIGUSR1])


def left_cleanly(save: Path, number: int, status: int, said: str) -> str:
    """Check what a run left that was sent the signal; when it came."""
    assert "Traceback" not in said and "error" not in said, said
    if status == -number:  # before Python had read the first line
        assert not save.exists()
        return "before the first line"
    assert status == 0, said
    last = log_of(save)[-1]
    assert last["event"] == "end" and last["reason"] in (f"signal {number}", "done"), last
    assert core_files.read_tracker(save) == last["step"] >= 1
    assert not list(save.glob("iter_*.tmp"))
    return f"{last['reason']} at step {last['step']}"


def moment_of_a_process(folder: Path, save: Path, seed: int) -> None:
    """Send a signal to a run that has used a random share of the time that its imports take."""
    chance = random.Random(seed)
    words, number = chosen(folder, save, chance)
    limit_s = chance.uniform(0, FIRST_IMPORT_S)
    run = subprocess.Popen([*SCRIPT, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and sum(psutil.Process(run.pid).cpu_times()[:2]) < limit_s:
        time.sleep(0.01)
    run.send_signal(number)
    said = run.communicate(timeout=500)[1]
    print(f"{limit_s:.1f} s: {left_cleanly(save, number, run.returncode, said)}")


def moments_after_imports(folder: Path, root: Path, seed: int, count: int) -> None:
    """Send signals to so many runs that have imported everything: while they build, train, evaluate and save."""
    chance, cases, saves = random.Random(seed), [], []
    for moment in range(count):
        saves.append(root / f"run{moment}")
        words, number = chosen(folder, saves[-1], chance)
        cases.append({"arguments": words, "signal": [number, chance.uniform(0, ALL_S)]})
    for case, save, ran in zip(cases, saves, resumed(root, cases), strict=True):
        number, after_s = case["signal"]
        print(f"{after_s:.1f} s: {left_cleanly(save, number, ran['status'], ran['said'])}")


def test_a_signal_at_a_random_moment_of_the_imports_saves_or_leaves_cleanly(folder: Path, tmp_path: Path) -> None:
    moment_of_a_process(folder, tmp_path / "run", 1)


def test_a_signal_at_a_random_moment_after_them_does_too(folder: Path, tmp_path: Path) -> None:
    moments_after_imports(folder, tmp_path, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_a_signal_at_any_of_30_moments_of_the_imports(folder: Path, tmp_path: Path, seed: int) -> None:
    moment_of_a_process(folder, tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 207))
def test_a_signal_at_any_of_70_moments_after_them(folder: Path, tmp_path: Path, seed: int) -> None:
    moments_after_imports(folder, tmp_path, seed, 10)
