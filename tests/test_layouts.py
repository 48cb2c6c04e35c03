"""Every parallel layout trains like the single process: fp32 loss within 1e-5 over 5 steps, gradient norm within 1e-4.

All layouts of one number of processes run in one set of them (tests/train_worker.py).
``pytest -s tests/test_layouts.py`` prints the table.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make, soften

from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

STEPS = 5
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
DENSE = {  # name: (processes, arguments)
    "DP2": (2, ""),
    "TP2": (2, "--tp 2"),
    "TP2 SP": (2, "--tp 2 --sequence-parallel"),
    "TP4, more than key-value heads": (4, "--tp 4"),
    "PP2": (2, "--pp 2"),
    "PP4": (4, "--pp 4"),
    "PP2 VPP2 (interleaved)": (2, "--pp 2 --vpp 2"),
    "CP2": (2, "--cp 2"),
    "CP4": (4, "--cp 4"),
    "DP2 distributed optimizer": (2, "--use-distributed-optimizer"),
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
    "TP2 PP2": (4, "--tp 2 --pp 2"),
    "TP2 CP2": (4, "--tp 2 --cp 2"),
    "TP2 SP PP2 VPP2": (4, "--tp 2 --sequence-parallel --pp 2 --vpp 2"),
    "PP2 VPP2 DP2 distributed optimizer, overlap": (4, f"--pp 2 --vpp 2 {OVERLAP}"),
    "recompute full": (2, "--recompute full"),
    "TP2 recompute selective": (2, "--recompute selective --tp 2"),
}
MIXTURE = {
    "EP2": (2, "--ep 2"),
    "EP4": (4, "--ep 4"),
    "TP2 SP": (2, "--tp 2 --sequence-parallel"),
    "TP2 SP EP2 ETP1": (2, "--tp 2 --sequence-parallel --ep 2 --etp 1"),
    "TP2 SP EP2": (4, "--tp 2 --sequence-parallel --ep 2"),
    "PP2 EP2": (4, "--pp 2 --ep 2"),
    "CP2": (2, "--cp 2"),
    "CP2 EP2": (2, "--cp 2 --ep 2"),
    "PP2 VPP2": (2, "--pp 2 --vpp 2"),
    "EP2 distributed optimizer, overlap": (2, f"--ep 2 {OVERLAP}"),
}
MODELS = {"qwen3": DENSE, "qwen3_moe": MIXTURE}
CASES = [(model, name) for model, layouts in MODELS.items() for name in layouts]


def launch(world_size: int, cases: dict[str, Any], folder: Path, root: Path) -> dict[str, list[dict]]:
    """Run training cases in ``world_size`` processes; the log records of each."""
    given, results = folder / f"cases{world_size}.json", folder / f"results{world_size}.json"
    given.write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    command += ["--master-port", str(port), str(root / "tests" / "train_worker.py"), str(given), str(results)]
    ran = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    records = json.loads(results.read_text())
    errors = [f"{name}: {log[0]['text']}" for name, log in records.items() if log[0]["event"] == "error"]
    assert not errors, f"{len(errors)} cases failed, the first: {errors[0]}"
    return records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of each case, with the single process as 'qwen3 alone'."""
    folder = tmp_path_factory.mktemp("layouts")
    text = [str(path) for path in sorted((root / "models").glob("*.py"))]
    assert train_tokenizer(["--input", *text, "--vocab-size", "511", "--output", str(folder / "tokenizer")]) == 0
    data = ["--append-eod", "--workers", "1", "--output-prefix", str(folder / "data")]
    assert preprocess(["--input", *text, "--tokenizer", str(folder / "tokenizer"), *data]) == 0

    def arguments(model: str, layout: str) -> list[str]:
        words = f"--train-iters {STEPS} --seq-length 64 --global-batch-size 8 --micro-batch-size 1 --lr 1e-3 {layout}"
        where = [
            "--model",
            str(folder / model),
            "--tokenizer",
            str(folder / "tokenizer"),
            "--save",
            str(folder / "run"),
        ]
        return [*where, "--data-path", str(folder / "data"), "--timeout-s", "60", *words.split()]

    by_size: dict[int, dict[str, list[str]]] = {1: {}, 2: {}, 4: {}}
    for model, layouts in MODELS.items():
        made = soften(make(folder / model, model, dtype=torch.float32, vocab_size=511))  # 511: TP does not divide it
        for stand_in in ("tokenizer.json", "chat_template.jinja"):
            (made / stand_in).unlink()
        for name, (size, layout) in {"alone": (1, ""), **layouts}.items():
            by_size[size][f"{model} {name}"] = arguments(model, layout)
    records = {name: log for size, cases in by_size.items() for name, log in launch(size, cases, folder, root).items()}
    return {name: [(r["loss"], r["grad_norm"]) for r in log if r["event"] == "train"] for name, log in records.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{m}-{n}".replace(" ", "_") for m, n in CASES])
def test_a_layout_equals_the_single_process(
    runs: dict[str, list[tuple[float, float]]], model: str, layout: str
) -> None:
    expected, found = runs[f"{model} alone"], runs[f"{model} {layout}"]
    assert len(expected) == len(found) == STEPS
    loss = max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True))
    norm = max(abs(a[1] - b[1]) for a, b in zip(expected, found, strict=True))
    print(
        f"{model:10} {layout:40} loss {found[-1][0]:.7f} off by {loss:.1e}  norm {found[-1][1]:.6f} off by {norm:.1e}"
    )
    assert loss <= 1e-5
    assert norm <= 1e-4
    assert expected[-1][0] != expected[0][0]  # it trained
