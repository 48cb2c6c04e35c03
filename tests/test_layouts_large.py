"""Layouts of eight processes: one of each run of the tests, the others only of ``scripts/test.sh --all``."""

import layout_tables
import pytest
from layout_tables import OVERLAP, SP, Table
from test_layouts_latent import predicting

from megapatch.models import splits

DENSE = {"TP2 SP PP2 CP2": (8, f"{SP} --pp 2 --cp 2")}  # name: (processes, arguments)
DENSE_SLOW = {
    "TP2 SP PP2 VPP2 DP2 distributed optimizer, overlap": (8, f"{SP} --pp 2 --vpp 2 {OVERLAP}"),
    "TP2 SP CP2 DP2 distributed optimizer": (8, f"{SP} --cp 2 --use-distributed-optimizer"),
    "PP4 DP2": (8, "--pp 4"),
    "CP4 DP2": (8, "--cp 4"),
    "TP2 SP PP2 VPP2 uneven, CP2": (8, f"{SP} --pp 2 --vpp 2 --cp 2 {splits.LAYOUT} Ett|t||tL"),
}
MIXTURE_SLOW = {
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "TP2 SP PP2 CP2 EP2": (8, f"{SP} --pp 2 --cp 2 --ep 2"),
    "EP4 DP2": (8, "--ep 4"),
    "TP2 SP EP4, distributed optimizer, overlap": (8, f"{SP} --ep 4 {OVERLAP}"),
    "PP2 VPP2 EP2 DP2": (8, "--pp 2 --vpp 2 --ep 2"),
    "TP2 SP EP2 ETP4": (8, f"{SP} --ep 2 --etp 4"),
    "CP2 EP2 ETP2, distributed optimizer, overlap": (8, f"--cp 2 --ep 2 --etp 2 {OVERLAP}"),
    "PP2 ETP4": (8, "--pp 2 --etp 4"),
}
LATENT_SLOW = {
    "TP2 SP PP2 CP2": (8, f"{SP} --pp 2 --cp 2"),
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "CP2 EP4 DP2": (8, "--cp 2 --ep 4"),
    "EP8": (8, "--ep 8"),
    "PP4 uneven, EP2": (8, f"--pp 4 --ep 2 --use-distributed-optimizer {splits.LAYOUT} Et||tt|tL"),
}
PREDICTION_SLOW = {
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "PP2 VPP2 EP4 distributed optimizer, overlap": (8, f"--pp 2 --vpp 2 --ep 4 {OVERLAP}"),
    "PP4 uneven, EP2": (8, f"--pp 4 --ep 2 {splits.LAYOUT} Et||tt|tmL"),
}
TABLES = {"qwen3": Table("qwen3", DENSE)}
SLOW = {
    "qwen3": Table("qwen3", DENSE_SLOW),
    "qwen3_moe": Table("qwen3_moe", MIXTURE_SLOW),
    "deepseek_v3": Table("deepseek_v3", LATENT_SLOW),
    "prediction": Table("deepseek_v3", PREDICTION_SLOW, "--seq-length 32 --mtp-loss-weight 0.3", predicting),
}
CASES, SLOW_CASES = layout_tables.cases(TABLES), layout_tables.cases(SLOW)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, layout_tables.Steps]:
    return layout_tables.run(tmp_path_factory.mktemp("layouts"), TABLES)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{m}-{n}".replace(" ", "_") for m, n in CASES])
def test_a_layout_equals_the_single_process(runs: dict[str, layout_tables.Steps], model: str, layout: str) -> None:
    layout_tables.check(runs, model, layout)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, layout_tables.Steps]:
    return layout_tables.run(tmp_path_factory.mktemp("layouts"), SLOW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "layout"), SLOW_CASES, ids=[f"{m}-{n}".replace(" ", "_") for m, n in SLOW_CASES])
def test_a_layout_of_eight_processes_equals_the_single_process(
    slow_runs: dict[str, layout_tables.Steps], model: str, layout: str
) -> None:
    layout_tables.check(slow_runs, model, layout)
