"""Layouts of a model with latent attention and biased experts (DeepSeek-V3), and with a layer that predicts further."""

from pathlib import Path

import layout_tables
import pytest
import trainer_runs
from layout_tables import OVERLAP, SP, Table
from test_prediction import published

from megapatch.models import splits

LATENT = {  # name: (processes, arguments)
    "PP2 VPP2": (2, "--pp 2 --vpp 2"),
    "TP2 SP EP2 ETP1": (2, f"{SP} --ep 2 --etp 1"),
    "CP2 EP2": (2, "--cp 2 --ep 2"),
}
LATENT_SLOW = {
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
    "TP2 SP": (2, SP),
    "PP2": (2, "--pp 2"),
    "CP2": (2, "--cp 2"),
    "EP2": (2, "--ep 2"),
    "TP2 SP EP2": (4, f"{SP} --ep 2"),
    "TP2 SP PP2 EP2 ETP1": (4, f"{SP} --pp 2 --ep 2 --etp 1"),
    "TP2 SP CP2": (4, f"{SP} --cp 2"),
    "PP2 EP2 distributed optimizer, overlap": (4, f"--pp 2 --ep 2 {OVERLAP}"),
    "recompute core_attn mla_up_proj moe": (
        2,
        f"{SP} --recompute selective --recompute-modules core_attn mla_up_proj moe",
    ),
}
PREDICTION = {
    "TP2 SP": (2, SP),
    "PP2, 3 and 1 layers": (2, f"--pp 2 {splits.LAYOUT} Ettt|tmL"),
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
}
PREDICTION_SLOW = {
    "EP2": (2, "--ep 2"),
    "PP2": (2, "--pp 2"),
    "PP2 VPP2": (2, "--pp 2 --vpp 2"),
    "TP2 SP PP2 EP2 ETP1": (4, f"{SP} --pp 2 --ep 2 --etp 1"),
}
SMALL = "--micro-batch-size 2 --global-batch-size 4 --seq-length 32"
BALANCED = f"{SMALL} --moe-z-loss-coeff 1e-2 --moe-bias-update-rate 1e-2"


def predicting(folder: Path, name: str, family: str) -> None:
    """A folder as published, with the further layer."""
    made = published(folder / name, vocab_size=trainer_runs.VOCABULARY)
    for stand_in in ("tokenizer.json", "chat_template.jinja"):
        (made / stand_in).unlink()


FURTHER = f"{SMALL} --mtp-loss-weight 0.3"
TABLES = {
    "latent": Table("deepseek_v3", LATENT, BALANCED),
    "prediction": Table("deepseek_v3", PREDICTION, FURTHER, predicting),
}
SLOW = {
    "latent": Table("deepseek_v3", LATENT_SLOW, BALANCED),
    "prediction": Table("deepseek_v3", PREDICTION_SLOW, FURTHER, predicting),
}


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
