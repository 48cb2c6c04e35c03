"""What mp-sft refuses: one line that says what, where, and what to do, before anything is built."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import sft_runs
from chat_data import write
from data_pairs import write_pair

from megapatch.models import cli
from megapatch.trainer import signals
from megapatch.trainer.data import made_data
from megapatch.trainer.sft import main
from megapatch.trainer.tuning import sft_data
from megapatch.trainer.tuning.sft_options import SftOptions

HERE = "--data-path {}/chats --global-batch-size 2"
REFUSED = {  # arguments -> what is said
    "--global-batch-size 2": "give one of --data-path",
    f"{HERE} --data {{}}/chats.jsonl": "give one of --data-path",
    f"{HERE} --eval-interval 2": "--eval-interval needs --valid-data-path",
    f"{HERE} --valid-data-path {{}}/chats": "need --eval-interval",
    f"{HERE} --truncate split": "--truncate is for --data; give it to mp-preprocess-chat",
    f"{HERE} --data-cache-path {{}}/cache": "--data-cache-path is for --data",
    f"{HERE} --cp 2 --seq-length 126": "must be divisible by 2 x --cp",
    f"{HERE} --seq-length 16": "conversations are longer than --seq-length 16",
    "--data-path {}/corpus --global-batch-size 2": "format corpus; mp-sft trains on conversations",
    "--data-path {}/other --global-batch-size 2": "made with another tokenizer",
    "--data-path {}/silent --global-batch-size 2": "is trained; see the mask",
    "--data-path 0.5 {}/chats 0.5 --global-batch-size 2": "a blend needs WEIGHT PREFIX pairs",
    "--data {}/nothing.jsonl --global-batch-size 2": "nothing.jsonl: no such file; --data takes files",
    "--data {}/torn.jsonl --global-batch-size 2 --workers 1": "mp-preprocess-chat ended with status 1",
    "--data-path {}/chats --global-batch-size 3 --micro-batch-size 2": "is not divisible by --micro-batch-size",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, good conversations and bad ones."""
    made = tmp_path_factory.mktemp("refused")
    sft_runs.tokenizer(made)
    sft_runs.model(made, "dense")
    sft_runs.data(made, "chats", sft_runs.chats(6))
    said = json.loads((made / "chats.manifest.json").read_text())
    wrong = {"tokenizer": said["tokenizer"] | {"digest": "0" * 32}}, {"counts": said["counts"] | {"trained_tokens": 0}}
    for name, change in zip(("other", "silent"), wrong, strict=True):
        for path in made.glob("chats[._]*"):
            shutil.copy(path, made / path.name.replace("chats", name, 1))
        (made / f"{name}.manifest.json").write_text(json.dumps(said | change))
    write_pair(made / "corpus", [[1, 2, 3]])
    write(made / "torn.jsonl", [*sft_runs.chats(1), {"messages": 7}])
    return made


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_in_one_line(folder: Path, capfd: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        try:
            status = main(sft_runs.arguments(folder, "dense", "refused", words))
        except SystemExit as wrong_usage:
            status = int(wrong_usage.code or 0)
    lines = capfd.readouterr().err.strip().splitlines()
    assert status in (1, 2) and REFUSED[words] in lines[-1], lines
    assert not list((folder / "refused").glob("iter_*"))


BALANCED = "--moe-aux-loss seq_aux_loss --moe-aux-loss-coeff 0.01"
TOLD = {  # options -> is it said that experts are balanced over more than a conversation?
    f"{BALANCED} --micro-batch-size 2": True,
    f"{BALANCED} --no-packing": False,
    "--moe-aux-loss seq_aux_loss --moe-aux-loss-coeff 0": False,
    "--moe-aux-loss aux_loss --moe-aux-loss-coeff 0.01": False,
}


def test_a_loss_of_each_sequence_says_that_packed_conversations_are_one(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sft_runs.model(folder, "mixture", "qwen3_moe")
    for number, (words, told) in enumerate(TOLD.items()):
        given = f"{HERE} --train-iters 1 {words}"
        assert main(sft_runs.arguments(folder, "mixture", f"balanced{number}", given)) == 0
        lines = [line for line in capfd.readouterr().err.splitlines() if "seq_aux_loss" in line]
        assert len(lines) == told and all(f" {2 * sft_runs.ROW} tokens, not over each" in line for line in lines)


def test_lines_are_read_once_and_anew_when_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write(folder / "fresh.jsonl", sft_runs.chats(3))
    words = sft_runs.arguments(folder, "dense", "cached", f"--data {lines} --global-batch-size 2 --workers 1")
    options = cli.parser(SftOptions, prog="mp-sft").parse_args(words)
    runs: list[list[str]] = []
    real, maker = made_data._run, sft_data._maker(options)
    monkeypatch.setattr(made_data, "_run", lambda command, lock: runs.append(command) or real(command, lock))
    first = made_data.make(options, maker, [str(lines)], folder / "dense")
    assert made_data.make(options, maker, [str(lines)], folder / "dense") == first and len(runs) == 1
    write(lines, sft_runs.chats(4))
    second = made_data.make(options, maker, [str(lines)], folder / "dense")
    assert second != first and len(runs) == 2


def test_a_dry_run_shows_the_plan_and_reads_no_lines(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "--data {}/chats.jsonl --global-batch-size 2 --dry-run"
    assert main(sft_runs.arguments(folder, "dense", "dry", words)) == 0
    assert json.loads(capfd.readouterr().out)["options"]["loss_normalisation"] == "token"
    assert not (folder / "dry").exists()


def test_a_signal_while_lines_are_read_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sft_runs.arguments(folder, "dense", "signal", "--data {}/chats.jsonl --global-batch-size 2")
    words += ["--requeue-file", str(folder / "requeue")]
    options = cli.parser(SftOptions, prog="mp-sft").parse_args(words)
    slow = "import signal, time; signal.signal(15, lambda *_: exit(130)); print(flush=True); time.sleep(600)"
    monkeypatch.setattr(made_data.Maker, "command", property(lambda _: [sys.executable, "-c", slow]))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signals.listen()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    begin = time.monotonic()
    try:
        with pytest.raises(cli.UserError, match="signal 15: left while"):
            made_data.make(options, sft_data._maker(options), [str(folder / "chats.jsonl")], folder / "dense")
    finally:
        timer.join()
        signals.forget()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert time.monotonic() - begin < 300
    assert (folder / "requeue").exists()
