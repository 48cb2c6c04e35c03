"""A long run of tiny steps with many checkpoints holds no more memory, files or threads at its end than early on."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainer_runs import arguments, corpus, events, log_of, model

from megapatch.trainer.pretrain import main
from megapatch.trainer.watching.metrics import JsonLines

MIB = 2**20
STEPS, EVERY = 300, 20
WORDS = "--seq-length 16 --global-batch-size 2 --micro-batch-size 1 --eval-interval 20 --eval-iters 1 --split 80,20"


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--keep 2", "--keep 2 --async-save --log-sample-ids --precision bf16"])
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    corpus(tmp_path)
    model(tmp_path, "dense")
    held: list[tuple[int, int, int]] = []
    write, this = JsonLines.write, psutil.Process()

    def measured(sink: JsonLines, record: Mapping[str, Any]) -> None:
        write(sink, record)
        if record["event"] == "train" and record["step"] % EVERY == EVERY // 2:  # no checkpoint is on its way
            gc.collect()
            held.append((this.memory_info().rss, this.num_fds(), this.num_threads()))

    monkeypatch.setattr(JsonLines, "write", measured)
    words = f"{WORDS} --train-iters {STEPS} --save-interval {EVERY} --log-interval 100 {options}"
    board = ["--tensorboard", str(tmp_path / "board")]
    assert main([*arguments(tmp_path, "dense", "run", words), *board]) == 0
    records = log_of(tmp_path / "run")
    assert [r["step"] for r in events(records, "save")] == list(range(EVERY, STEPS + 1, EVERY))
    assert len(list((tmp_path / "run").glob("iter_*"))) == 2
    memory, files, threads = zip(*held, strict=True)
    print(f"{options}: memory {[round(m / MIB, 1) for m in memory]} MiB, files {files}, threads {threads}")
    assert len(held) == STEPS // EVERY
    settled = len(held) // 3  # by then every code path has run, several times
    assert max(memory[settled:]) - memory[settled] < 8 * MIB
    assert len(set(files[settled:])) == 1
    assert len(set(threads[settled:])) == 1
