"""Every parallel layout trains like the single process: fp32 loss within 1e-5 over 5 steps, gradient norm within 1e-4.

All layouts of one number of processes run in one set of them (tests/train_worker.py).
``pytest -s tests/test_layouts.py`` prints the table.
"""

import pytest
import trainer_runs
from trainer_runs import launch

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float, float, float]]]:
    """Step, loss, gradient norm and learning rate of each step of each case; the single process is 'MODEL alone'."""
    folder = tmp_path_factory.mktemp("layouts")
    trainer_runs.corpus(folder)
    by_size: dict[int, dict[str, list[str]]] = {1: {}, 2: {}, 4: {}}
    for model, layouts in MODELS.items():
        trainer_runs.model(folder, model, model)
        for name, (size, layout) in {"alone": (1, ""), **layouts}.items():
            words = f"--train-iters {STEPS} --micro-batch-size 1 --seq-length 64 {layout}"
            by_size[size][f"{model} {name}"] = trainer_runs.arguments(folder, model, "run", words)
    records = {name: log for size, cases in by_size.items() for name, log in launch(size, cases, folder).items()}
    return {name: trainer_runs.steps(log) for name, log in records.items()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{m}-{n}".replace(" ", "_") for m, n in CASES])
def test_a_layout_equals_the_single_process(
    runs: dict[str, list[tuple[int, float, float, float]]], model: str, layout: str
) -> None:
    expected, found = runs[f"{model} alone"], runs[f"{model} {layout}"]
    assert len(expected) == len(found) == STEPS
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    last = f"loss {found[-1][1]:.7f} off by {loss:.1e}  norm {found[-1][2]:.6f} off by {norm:.1e}"
    print(f"{model:10} {layout:45} {last}")
    assert loss <= 1e-5
    assert norm <= 1e-4
    assert expected[-1][1] != expected[0][1]  # it trained
