"""Every family at TP2, and at EP2 where it has experts: logits as its reference, training as in one process.

``pytest -s tests/test_family_layouts.py`` prints the differences.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import trainer_runs
from model_folders import make, soften
from slow_cases import marked, wanted
from trainer_runs import ENVIRONMENT, TORCHRUN, launch

from megapatch.models import family

LOGITS = 5e-5  # sums over two processes are taken in another order
EPSILON = 1e-3  # at Adam's own 1e-8 a gradient of rounding noise moves a weight as far as any other
STEPS = 5
MICRO_BATCHES = (1, 2, 4)
TP, EP = {"tp": 2, "sequence_parallel": True}, {"ep": 2}


def has_experts(name: str) -> bool:
    hf = tiny(name)
    return bool(family.find(hf).transformer_config(hf).get("num_moe_experts"))


def tiny(name: str) -> dict:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **dict(family.known()[name].tiny)).to_dict()


LAYOUTS = {name: {"TP2": TP} | ({"EP2": EP} if has_experts(name) else {}) for name in family.known()}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
TRAINED = ("bloom", "deepseek_v3", "gpt2", "qwen3", "qwen3_moe")  # in the default suite


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    """Largest difference of the logits of each family at each layout from those of its reference."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("logits")
    cases = {}
    for name, layouts in LAYOUTS.items():
        made = soften(make(folder / name, name, dtype=torch.float32))
        ids = torch.randint(90, (2, 32), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
            torch.save(model(ids, use_cache=False).logits, folder / f"{name}.pt")
        case = {"folder": str(made), "ids": ids.tolist(), "expected": str(folder / f"{name}.pt")}
        cases |= {f"{name} {layout}": case | {"layout": words} for layout, words in layouts.items()}
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    worker = str(Path(__file__).parent / "layout_worker.py")
    start = [*TORCHRUN, "--nproc-per-node", "2", worker, str(given), str(results)]
    ran = subprocess.run(start, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_family_computes_the_same_at_a_layout(differences: dict[str, float | str], name: str, layout: str) -> None:
    found = differences[f"{name} {layout}"]
    assert isinstance(found, float), found
    print(f"{name:14} {layout} {found:.1e}")
    assert found <= LOGITS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """The log records of each family's training at each layout; 'NAME alone' is the single process."""
    folder = tmp_path_factory.mktemp("training")
    trainer_runs.corpus(folder)
    by_size: dict[int, dict[str, list[str]]] = {1: {}, 2: {}}
    for name, layouts in wanted(request, LAYOUTS, TRAINED).items():
        trainer_runs.model(folder, name, name)
        for layout, words in {"alone": {}, **layouts}.items():
            flags = " ".join(f"--{key.replace('_', '-')}" + ("" if n is True else f" {n}") for key, n in words.items())
            asked = f"--train-iters {STEPS} --micro-batch-size 2 --lr 5e-3 --adam-eps {EPSILON} {flags}"
            size = 2 if words else 1
            by_size[size][f"{name} {layout}"] = trainer_runs.arguments(folder, name, "run", asked)
    trainer_runs.model(folder, "weighty", "deepseek", aux_loss_alpha=1.0)
    for rows in MICRO_BATCHES:
        asked = f"--train-iters 1 --micro-batch-size {rows}"
        by_size[1][f"micro-batch {rows}"] = trainer_runs.arguments(folder, "weighty", "run", asked)
    return {name: log for size, cases in by_size.items() for name, log in launch(size, cases, folder).items()}


@pytest.mark.timeout(1800)
def test_the_balancing_loss_of_each_sequence_does_not_depend_on_the_micro_batch(runs: dict[str, list[dict]]) -> None:
    norms = [trainer_runs.steps(runs[f"micro-batch {rows}"])[0][2] for rows in MICRO_BATCHES]
    assert max(norms) - min(norms) < 1e-5


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "layout"), marked(CASES, [case for case in CASES if case[0] in TRAINED]))
def test_a_family_trains_at_a_layout_as_in_one_process(runs: dict[str, list[dict]], name: str, layout: str) -> None:
    for kind in ("alone", layout):
        assert runs[f"{name} {kind}"][-1]["event"] != "error", runs[f"{name} {kind}"][-1]["text"]
    expected, found = (trainer_runs.steps(runs[f"{name} {kind}"]) for kind in ("alone", layout))
    assert len(expected) == len(found) == STEPS
    assert expected[-1][1] < expected[0][1]  # the loss falls
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    print(f"{name:14} {layout} loss {found[0][1]:.4f} -> {found[-1][1]:.4f} off by {loss:.1e}  norm off by {norm:.1e}")
    assert loss <= 5e-6
    assert norm <= 2e-5
