"""Every parallel layout trains like the single process: fp32 loss within 1e-5 over 5 steps, gradient norm within 1e-4.

All layouts of one world size run in one set of processes (tests/train_worker.py); what a layout leaves over is data
parallelism. ``pytest -s tests/test_layouts.py`` prints the table.
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
from model_folders import make

from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

STEPS = 5
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
DENSE = {
    "DP4": "",
    "TP2": "--tp 2",
    "TP4, more than key-value heads": "--tp 4",
    "TP2 SP": "--tp 2 --sequence-parallel",
    "PP2": "--pp 2",
    "PP4": "--pp 4",
    "PP2 VPP2 (interleaved)": "--pp 2 --vpp 2",
    "CP2": "--cp 2",
    "CP4": "--cp 4",
    "DP4 distributed optimizer": "--use-distributed-optimizer",
    "DP4 distributed optimizer, overlap": OVERLAP,
    "TP2 PP2": "--tp 2 --pp 2",
    "TP2 CP2": "--tp 2 --cp 2",
    "TP2 SP PP2 VPP2": "--tp 2 --sequence-parallel --pp 2 --vpp 2",
    "PP2 VPP2 distributed optimizer, overlap": f"--pp 2 --vpp 2 {OVERLAP}",
    "recompute full": "--recompute full",
    "recompute selective, TP2": "--recompute selective --tp 2",
}
MIXTURE = {
    "DP4": "",
    "EP2": "--ep 2",
    "EP4": "--ep 4",
    "TP2 SP": "--tp 2 --sequence-parallel",
    "TP2 SP EP2 ETP1": "--tp 2 --sequence-parallel --ep 2 --etp 1",
    "TP2 SP EP2": "--tp 2 --sequence-parallel --ep 2",
    "PP2 EP2": "--pp 2 --ep 2",
    "CP2": "--cp 2",
    "CP2 EP2": "--cp 2 --ep 2",
    "PP2 VPP2": "--pp 2 --vpp 2",
    "EP2 distributed optimizer, overlap": f"--ep 2 {OVERLAP}",
}
CASES = [("qwen3", name) for name in DENSE] + [("qwen3_moe", name) for name in MIXTURE]


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
    return json.loads(results.read_text())


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

    for model in ("qwen3", "qwen3_moe"):  # 511 tokens: no tensor parallelism divides them
        made = make(folder / model, model, dtype=torch.float32, vocab_size=511)
        for name in ("tokenizer.json", "chat_template.jinja"):  # the folder's stand-ins
            (made / name).unlink()
    alone = {f"{model} alone": arguments(model, "") for model in ("qwen3", "qwen3_moe")}
    cut = {f"qwen3 {name}": arguments("qwen3", layout) for name, layout in DENSE.items()}
    cut |= {f"qwen3_moe {name}": arguments("qwen3_moe", layout) for name, layout in MIXTURE.items()}
    records = launch(1, alone, folder, root) | launch(4, cut, folder, root)
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
