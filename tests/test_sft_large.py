"""mp-sft on four processes: combined layouts train as one process does, packed."""

from pathlib import Path

import pytest
import sft_runs
from sft_runs import ROWS
from trainer_runs import error, steps

pytestmark = pytest.mark.slow
ALL = f"--data-path {{}}/weighted --global-batch-size {ROWS}"
SEQUENCE = f"{ALL} --loss-normalisation sequence"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {  # name -> (model, arguments, the case of one process that it equals)
    "TP2 CP2": ("dense", f"{ALL} --tp 2 --cp 2", "dense"),
    "TP2 SP CP2 sequence": ("dense", f"{SEQUENCE} --tp 2 --sequence-parallel --cp 2", "dense sequence"),
    "PP2 CP2 sequence": ("dense", f"{SEQUENCE} --pp 2 --cp 2", "dense sequence"),
    "CP4": ("dense", f"{ALL} --cp 4", "dense"),
    "PP4": ("dense", f"{ALL} --pp 4", "dense"),
    "DP4 rows joined, overlap": ("dense", f"{SEQUENCE} --micro-batch-size 2 {OVERLAP}", "dense sequence"),
    "TP2 SP PP2 VPP2": ("dense", f"{ALL} --tp 2 --sequence-parallel --pp 2 --vpp 2", "dense"),
    "EP2 CP2": ("experts", f"{ALL} --ep 2 --cp 2", "experts"),
    "TP2 SP EP2 ETP1 PP2": ("experts", f"{ALL} --tp 2 --sequence-parallel --ep 2 --etp 1 --pp 2", "experts"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float, float, float]]]:
    """Steps of each case."""
    folder: Path = tmp_path_factory.mktemp("large")
    sft_runs.tokenizer(folder)
    sft_runs.filling(folder, "weighted", weighted=True)
    sft_runs.model(folder, "dense", num_hidden_layers=4)
    sft_runs.model(folder, "experts", "qwen3_moe", router_aux_loss_coef=0.0)
    alone = {"dense": ("dense", ALL), "dense sequence": ("dense", SEQUENCE), "experts": ("experts", ALL)}
    one = {name: sft_runs.arguments(folder, model, "run", words) for name, (model, words) in alone.items()}
    four = {name: sft_runs.arguments(folder, model, "run", words) for name, (model, words, _) in LAYOUTS.items()}
    logs = sft_runs.launch(1, one, folder) | sft_runs.launch(4, four, folder)
    assert not any(map(error, logs.values())), {name: error(log) for name, log in logs.items() if error(log)}
    return {name: steps(log) for name, log in logs.items()}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_four_trains_as_one(runs: dict[str, list[tuple[int, float, float, float]]], name: str) -> None:
    a, b = runs[LAYOUTS[name][2]], runs[name]
    loss, norm = (max(abs(x[i] - y[i]) for x, y in zip(a, b, strict=True)) for i in (1, 2))
    print(f"{name}: loss off by {loss:.1e}, norm by {norm:.1e}")
    assert a[-1][1] < a[0][1]
    assert loss <= 1e-5
    assert norm <= 1e-4
