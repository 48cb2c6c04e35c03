"""Every parallel layout trains like the single process: fp32 loss within 1e-5 over 5 steps, gradient norm within 1e-4.

Here of a dense model and of one with experts; tests/test_layouts_latent.py has latent attention and multi-token
prediction, tests/test_layouts_large.py eight processes. ``pytest -s tests/test_layouts*.py`` prints the table.
"""

import layout_tables
import pytest
from layout_tables import OVERLAP, SP, Table

from megapatch.models import splits

DENSE = {  # name: (processes, arguments)
    "TP2 SP": (2, SP),
    "PP2 VPP2 (interleaved)": (2, "--pp 2 --vpp 2"),
    "PP2, 1 and 3 layers": (2, "--pp 2 --decoder-first-pipeline-num-layers 1"),
    "PP2 VPP2 uneven, DP2 distributed optimizer, overlap": (
        4,
        f"--pp 2 --vpp 2 {splits.LAYOUT} Ett|t|t|L {OVERLAP}",
    ),
    "CP2": (2, "--cp 2"),
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
}
DENSE_SLOW = {
    "TP2 CP2": (4, "--tp 2 --cp 2"),
    "DP2": (2, ""),
    "TP2": (2, "--tp 2"),
    "TP4, more than key-value heads": (4, "--tp 4"),
    "PP2": (2, "--pp 2"),
    "PP4": (4, "--pp 4"),
    "PP4, none, 3, 1 and none": (4, f"--pp 4 {splits.LAYOUT} E|ttt|t|L"),
    "PP2 VPP2, 2, 1, none and 1": (2, f"--pp 2 --vpp 2 {splits.LAYOUT} Ett|t||tL"),
    "CP4": (4, "--cp 4"),
    "DP2 distributed optimizer": (2, "--use-distributed-optimizer"),
    "TP2 PP2": (4, "--tp 2 --pp 2"),
    "TP2 SP PP2 VPP2": (4, "--tp 2 --sequence-parallel --pp 2 --vpp 2"),
    "PP2 VPP2 DP2 distributed optimizer, overlap": (4, f"--pp 2 --vpp 2 {OVERLAP}"),
    "TP2 SP DP2 distributed optimizer, overlap": (4, f"{SP} {OVERLAP}"),
    "CP2 DP2 distributed optimizer": (4, "--cp 2 --use-distributed-optimizer"),
    "PP2 CP2": (4, "--pp 2 --cp 2"),
    "recompute full": (2, "--recompute full"),
    "TP2 recompute selective": (2, "--recompute selective --tp 2"),
}
MIXTURE = {
    "EP2": (2, "--ep 2"),
    "TP2 SP EP2 ETP1": (2, "--tp 2 --sequence-parallel --ep 2 --etp 1"),
    "CP2 EP2": (2, "--cp 2 --ep 2"),
    "TP2 SP PP2 EP2 ETP1": (4, f"{SP} --pp 2 --ep 2 --etp 1"),
}
MIXTURE_SLOW = {
    "TP2 SP ETP1": (2, f"{SP} --etp 1"),
    "ETP2": (2, "--etp 2"),
    "EP4": (4, "--ep 4"),
    "TP2 SP": (2, SP),
    "CP2 ETP2": (2, "--cp 2 --etp 2"),
    "EP2 ETP2": (4, "--ep 2 --etp 2"),
    "TP2 SP ETP4 distributed optimizer": (4, f"{SP} --etp 4 --use-distributed-optimizer"),
    "PP2, 3 and 1 layers, EP2": (4, "--pp 2 --decoder-last-pipeline-num-layers 1 --ep 2"),
    "TP2 SP EP2": (4, "--tp 2 --sequence-parallel --ep 2"),
    "PP2 EP2": (4, "--pp 2 --ep 2"),
    "CP2": (2, "--cp 2"),
    "PP2 VPP2": (2, "--pp 2 --vpp 2"),
    "TP2 SP CP2 EP2": (4, f"{SP} --cp 2 --ep 2"),
    "PP2 VPP2 EP2 distributed optimizer, overlap": (4, f"--pp 2 --vpp 2 --ep 2 {OVERLAP}"),
    "EP2 distributed optimizer, overlap": (2, f"--ep 2 {OVERLAP}"),
}
TABLES = {"qwen3": Table("qwen3", DENSE), "qwen3_moe": Table("qwen3_moe", MIXTURE)}
SLOW = {"qwen3": Table("qwen3", DENSE_SLOW), "qwen3_moe": Table("qwen3_moe", MIXTURE_SLOW)}


runs, slow_runs = layout_tables.fixture(TABLES), layout_tables.fixture(SLOW)
Runs = dict[str, layout_tables.Steps]


@pytest.mark.timeout(1800)
@layout_tables.each(TABLES)
def test_a_layout_equals_the_single_process(runs: Runs, model: str, layout: str) -> None:
    layout_tables.check(runs, model, layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@layout_tables.each(SLOW)
def test_more_layouts_equal_the_single_process(slow_runs: Runs, model: str, layout: str) -> None:
    layout_tables.check(slow_runs, model, layout)
