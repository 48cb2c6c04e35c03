"""Layouts of eight processes; only ``scripts/test.sh --all`` runs them."""

import layout_tables
import pytest
from layout_tables import OVERLAP, SP, Table
from test_layouts_latent import predicting

from megapatch.models import splits

DENSE = {  # name: (processes, arguments)
    "TP2 SP PP2 CP2": (8, f"{SP} --pp 2 --cp 2"),
    "TP2 SP PP2 VPP2 DP2 distributed optimizer, overlap": (8, f"{SP} --pp 2 --vpp 2 {OVERLAP}"),
    "TP2 SP CP2 DP2 distributed optimizer": (8, f"{SP} --cp 2 --use-distributed-optimizer"),
    "PP4 DP2": (8, "--pp 4"),
    "CP4 DP2": (8, "--cp 4"),
    "TP2 SP PP2 VPP2 uneven, CP2": (8, f"{SP} --pp 2 --vpp 2 --cp 2 {splits.LAYOUT} Ett|t||tL"),
}
MIXTURE = {
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "TP2 SP PP2 CP2 EP2": (8, f"{SP} --pp 2 --cp 2 --ep 2"),
    "EP4 DP2": (8, "--ep 4"),
    "TP2 SP EP4, distributed optimizer, overlap": (8, f"{SP} --ep 4 {OVERLAP}"),
    "PP2 VPP2 EP2 DP2": (8, "--pp 2 --vpp 2 --ep 2"),
    "TP2 SP EP2 ETP4": (8, f"{SP} --ep 2 --etp 4"),
    "CP2 EP2 ETP2, distributed optimizer, overlap": (8, f"--cp 2 --ep 2 --etp 2 {OVERLAP}"),
    "PP2 ETP4": (8, "--pp 2 --etp 4"),
}
LATENT = {
    "TP2 SP PP2 CP2": (8, f"{SP} --pp 2 --cp 2"),
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "CP2 EP4 DP2": (8, "--cp 2 --ep 4"),
    "EP8": (8, "--ep 8"),
    "PP4 uneven, EP2": (8, f"--pp 4 --ep 2 --use-distributed-optimizer {splits.LAYOUT} Et||tt|tL"),
}
PREDICTION = {
    "TP2 SP PP2 EP4 ETP1": (8, f"{SP} --pp 2 --ep 4 --etp 1"),
    "PP2 VPP2 EP4 distributed optimizer, overlap": (8, f"--pp 2 --vpp 2 --ep 4 {OVERLAP}"),
    "PP4 uneven, EP2": (8, f"--pp 4 --ep 2 {splits.LAYOUT} Et||tt|tmL"),
}
TABLES = {
    "qwen3": Table("qwen3", DENSE),
    "qwen3_moe": Table("qwen3_moe", MIXTURE),
    "deepseek_v3": Table("deepseek_v3", LATENT),
    "prediction": Table("deepseek_v3", PREDICTION, "--seq-length 32 --mtp-loss-weight 0.3", predicting),
}
runs = layout_tables.fixture(TABLES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@layout_tables.each(TABLES)
def test_a_layout_of_eight_processes_equals_the_single_process(
    runs: dict[str, layout_tables.Steps], model: str, layout: str
) -> None:
    layout_tables.check(runs, model, layout)
