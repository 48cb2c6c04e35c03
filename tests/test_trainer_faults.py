"""What goes wrong while mp-pretrain runs: numbers that are not finite, full disks, damage, signals, killed ranks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import ENVIRONMENT, TORCHRUN, arguments, corpus, error, events, launch, log_of, model, steps, train

from megapatch.models import core_files
from megapatch.trainer.pretrain import main

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    corpus(made)
    model(made, "dense")
    model(made, "mixture", "qwen3_moe")
    return made


def test_weights_that_are_not_finite_end_the_run_and_are_never_saved(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(folder / "dense", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    words = arguments(folder, str(tmp_path / "broken"), str(tmp_path / "run"), "--max-nan 2 --save-interval 1")
    assert main(words) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"step 3: the loss is not finite (samples 16 to 23: {folder / 'data'} documents " in last
    assert "; 3 such steps in a row, giving up; the last checkpoint is step 2; lower --lr" in last
    named = [event["samples"] for event in events(log_of(tmp_path / "run"), "bad_step")]
    assert [[place["sample"] for place in places] for places in named] == [[*range(n, n + 8)] for n in (0, 8, 16)]
    assert all(place["prefix"] == str(folder / "data") and place["documents"] for places in named for place in places)
    records = events(log_of(tmp_path / "run"), "train")
    assert [(r["loss"], r["grad_norm"]) for r in records] == [(None, None)] * 3


BAD = {"2": ["loss", 1], "3": ["gradient", 0]}
GUARDED = {  # layout: (model, options)
    "DP2": ("dense", ""),
    "DP2 bf16": ("dense", "--precision bf16"),
    "DP2 distributed": ("dense", "--use-distributed-optimizer"),
    "PP2": ("dense", "--pp 2"),
    "TP2": ("dense", "--tp 2"),
    "EP2": ("mixture", "--ep 2"),
}


@pytest.fixture(scope="module")
def guarded(folder: Path) -> dict[str, list[dict]]:
    """Two processes, of which one at a time meets a number that is not finite."""
    cases: dict[str, Any] = {}
    for name, (kind, options) in GUARDED.items():
        words = arguments(folder, kind, f"guarded/{name}", f"--train-iters 5 {options}")
        cases[name] = {"arguments": words, "bad": BAD, "digests": True}
    overlap = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --train-iters 5"
    cases["overlap"] = {"arguments": arguments(folder, "dense", "guarded/overlap", overlap), "bad": BAD}
    many = {"2": ["gradient", 1], "3": ["loss", 1]}
    words = arguments(folder, "dense", "guarded/many", "--max-nan 1 --save-interval 1")
    cases["too many"] = {"arguments": words, "bad": many}
    words = arguments(folder, "dense", "guarded/first", "--save-interval 1")
    cases["first"] = {"arguments": words, "bad": {"1": ["loss", 0]}, "signal": {"step": 1, "number": 10}}
    cases["first, rest"] = words
    cases["behind"] = {"arguments": [*words, "--train-iters", "6"], "behind": 1}
    cases["done for one"] = {"arguments": [*words, "--train-iters", "5"], "done": [1, True]}
    cases["done for the first"] = {"arguments": [*words, "--train-iters", "5"], "done": [1, False]}
    words = arguments(folder, "dense", "guarded/full", "--save-interval 2 --async-save --use-distributed-optimizer")
    cases["full"] = {"arguments": words, "full": 1}
    cases["full, rest"] = words
    cases["failing"] = {"arguments": arguments(folder, "dense", "guarded/failing"), "fail": 1}
    return launch(2, cases, folder)


@pytest.mark.parametrize("layout", GUARDED)
def test_a_step_with_bad_numbers_on_one_rank_changes_nothing_on_any(
    guarded: dict[str, list[dict]], layout: str
) -> None:
    found = steps(guarded[layout])
    assert [norm is None for _, _, norm, _ in found] == [False, True, True, False, False]
    digests = [record["digest"] for record in events(guarded[layout], "state")]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 3
    assert found[3][3] == found[1][3]  # a skipped step does not move the schedule


def test_skipped_steps_leave_overlapped_communication_in_order(guarded: dict[str, list[dict]]) -> None:
    for a, b in zip(steps(guarded["overlap"]), steps(guarded["DP2 distributed"]), strict=True):
        assert [x if x is None else pytest.approx(x, rel=1e-6) for x in a] == list(b)


def test_too_many_bad_steps_end_the_run(guarded: dict[str, list[dict]], folder: Path) -> None:
    told = error(guarded["too many"])
    assert f"step 3: the loss is not finite (samples 16 to 23: {folder / 'data'} documents " in told
    assert "; 2 such steps in a row, giving up; the last checkpoint is step 2;" in told
    assert [path.name for path in sorted((folder / "guarded/many").glob("iter_*"))] == ["iter_0000001", "iter_0000002"]


def test_a_run_whose_first_step_was_bad_can_be_resumed(guarded: dict[str, list[dict]]) -> None:
    assert [step for step, *_ in steps(guarded["first"], guarded["first, rest"])] == [1, 2, 3, 4]
    assert all(norm is not None for _, _, norm, _ in steps(guarded["first, rest"]))


def test_ranks_that_found_other_checkpoints_do_not_resume(guarded: dict[str, list[dict]], folder: Path) -> None:
    save = folder / "guarded/first"
    told = f"rank 1: {save}: iter_0000001 was the newest checkpoint here, iter_0000004 for rank 0; run again to go on"
    assert error(guarded["behind"]) == f"megapatch.models.cli.UserError: {told}"
    assert core_files.read_tracker(save) == 5


def test_all_ranks_go_on_or_leave_as_the_first_sees_it(guarded: dict[str, list[dict]]) -> None:
    assert [step for step, *_ in steps(guarded["done for one"])] == [5]
    assert guarded["done for the first"] == []


def test_a_mistake_that_one_rank_meets_ends_all_and_names_the_rank(guarded: dict[str, list[dict]]) -> None:
    assert error(guarded["failing"]) == "megapatch.models.cli.UserError: rank 1: no such weights"


def test_a_disk_that_is_full_for_one_rank_ends_all_and_the_run_goes_on_later(
    guarded: dict[str, list[dict]], folder: Path
) -> None:
    told = error(guarded["full"])
    assert told.startswith(f"megapatch.models.cli.UserError: rank 1: {folder}/guarded/full/iter_0000002.tmp")
    assert "disk full: 791,040 bytes needed, " in told
    assert [step for step, *_ in steps(guarded["full, rest"])] == [1, 2, 3, 4]


def test_a_disk_without_room_is_told_before_the_first_byte(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))
    assert main(arguments(folder, "dense", str(tmp_path / "run"))) == 73
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'run'}: disk full: 791,040 bytes needed, 100 bytes are free; what was complete" in last
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.parametrize("where", ["torch.save", "writer", "seal"])
def test_a_disk_that_fills_while_saving_leaves_the_old_checkpoint(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megapatch.models import commit

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut(*args: Any, **kwargs: Any) -> None:  # what torch.save says of a full disk
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    places = {"torch.save": (torch, "save", cut), "writer": (filesystem_async, "_write_item", full)}
    save = tmp_path / "run"
    train(folder, str(save), "--train-iters 2")
    with monkeypatch.context() as patch:
        patch.setattr(*places.get(where, (commit, "seal", full)))
        assert main(arguments(folder, "dense", str(save), "--lr-decay-iters 4")) == 73
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mp-pretrain: error: {save / 'iter_0000004'}") and " bytes are free; what was" in last
    assert "791,040 bytes needed" in last
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    train(folder, str(save), "--lr-decay-iters 4")
    assert [path.name for path in sorted(save.glob("iter_*"))] == ["iter_0000002", "iter_0000004"]


FAILING = {  # what the thread that saves beside the training meets: exit status, what is said
    "EIO": (OSError(errno.EIO, os.strerror(errno.EIO)), 73, "Input/output error: 791,040 bytes needed"),
    "ENOSPC": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 73, "disk full: 791,040 bytes needed"),
    "a mistake of ours": (AssertionError("broken"), 1, "AssertionError: broken"),
}


@pytest.mark.parametrize("where", ["write", "finish"])
@pytest.mark.parametrize("what", FAILING)
def test_a_save_beside_the_training_that_fails_ends_the_run(
    folder: Path, tmp_path: Path, what: str, where: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from megapatch.models import commit
    from megapatch.trainer.saving import writing

    error, status, said = FAILING[what]
    calls = []

    def second(*args: Any, **words: Any) -> Any:
        calls.append(threading.current_thread() is not threading.main_thread())
        if len(calls) == 2:
            raise error
        return real(*args, **words)

    owner, name = {"write": (writing, "write"), "finish": (commit, "seal")}[where]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, second)
    words = arguments(folder, "dense", str(tmp_path), "--async-save --save-interval 2 --train-iters 400")
    assert outcome(words) == status
    assert calls == [True, True]
    told = capfd.readouterr().err
    assert said in told
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    left = ["iter_0000004.tmp"] if status == 1 else []  # for the next start to remove; on a full disk it must go
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", *left]
    assert events(log_of(tmp_path), "train")[-1]["step"] < 20  # it is met at the next step that finds the thread done


def outcome(words: list[str]) -> int:
    """The exit status; 1 for an error that is not the user's, which Python would tell of with a traceback."""
    try:
        return main(words)
    except AssertionError:
        traceback.print_exc()
        return 1


def test_a_checkpoint_on_its_way_is_completed_before_a_run_gives_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from megapatch.models import commit
    from megapatch.trainer import step

    def slow(*args: Any, **words: Any) -> None:
        time.sleep(3)
        real(*args, **words)

    def spoilt(session: Any) -> float | None:
        return None if session.step >= 2 else update(session)

    real, update = commit.seal, step.update
    monkeypatch.setattr(commit, "seal", slow)
    monkeypatch.setattr(step, "update", spoilt)
    words = "--async-save --save-interval 2 --train-iters 400 --max-nan 1"
    assert main(arguments(folder, "dense", str(tmp_path), words)) == 1
    assert "giving up; the last checkpoint is step 2" in capfd.readouterr().err
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_damaged_checkpoint_is_not_resumed(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    save = tmp_path / "run"
    train(folder, str(save), "--train-iters 1")
    file = next((save / "iter_0000001").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(arguments(folder, "dense", str(save))) == 1
    assert f"{file.name}: content differs from manifest.json; it is damaged" in capfd.readouterr().err


def test_a_signal_while_everything_loads_saves_after_one_step(folder: Path, tmp_path: Path) -> None:
    script = [sys.executable, "-m", "megapatch.trainer.pretrain"]
    words = arguments(folder, "dense", str(tmp_path / "run"), "--train-iters 1000")
    run = subprocess.Popen([*script, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait(run, lambda: catches(run.pid, signal.SIGUSR1))
    run.send_signal(signal.SIGUSR1)
    said = run.communicate(timeout=500)[1]
    assert run.returncode == 0, said
    assert log_of(tmp_path / "run")[-1]["reason"] == "signal 10"
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "1"


def catches(process: int, number: int) -> bool:
    """Has the process a handler for the signal?"""
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait(run: subprocess.Popen, condition: Any, limit_s: float = 300) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def torchrun(words: list[str], *options: str) -> subprocess.Popen:
    command = [*TORCHRUN, "--nproc-per-node", "2", *options, "-m", "megapatch.trainer.pretrain", *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def test_torchrun_restarts_a_killed_rank_and_passes_sigterm_on(folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    words = arguments(folder, "dense", str(save), "--train-iters 3000 --save-interval 3 --lr 1e-6")
    run = torchrun(words, "--max-restarts", "1", "--monitor-interval", "0.1")
    wait(run, lambda: (save / "log.jsonl").exists() and len(events(log_of(save), "train")) >= 4)
    workers = psutil.Process(run.pid).children()
    workers[1].kill()
    wait(run, lambda: len(events(log_of(save), "resume")) == 1 and log_of(save)[-1]["event"] == "train")
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=500)[1]
    records = log_of(save)
    assert records[-1]["reason"] == "signal 15", said
    resumed = events(records, "resume")[0]["step"]
    assert resumed >= 3 and resumed % 3 == 0
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(records[-1]["step"])
    lost = [
        line for line in said.splitlines() if "mp-pretrain" in line and "error: another process of this run" in line
    ]
    assert len(lost) == 1


def test_under_torchrun_a_mistake_is_told_once(folder: Path, tmp_path: Path) -> None:
    run = torchrun(arguments(folder, "dense", str(tmp_path / "run"), "--split 0,1"), "--monitor-interval", "0.1")
    said = run.communicate(timeout=500)[1].splitlines()
    message = "mp-pretrain[0]: error: --split 0,1: leaves nothing to train on"
    assert run.returncode == 1
    assert said[0] == message
    assert [line for line in said if message in line][1:] == [f"  traceback : {message}"]  # torchrun's own report
