"""ALiBi, sliding windows, parallel layers and learned positions train alike in every layout: fp32, 5 steps.

``pytest -s tests/test_dense_layouts.py`` prints the differences from the single process.
"""

from typing import Any

import pytest
import trainer_runs
from slow_cases import marked, wanted
from trainer_runs import launch

STEPS = 5
FALCON_7B = {"new_decoder_architecture": False, "num_kv_heads": None}  # one key-value head, one norm
FALCON_RW = FALCON_7B | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
QWEN2 = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom, 6 heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "falcon": ("falcon", {}),
    "falcon 7B": ("falcon", FALCON_7B),
    "falcon RW, 6 heads": ("falcon", FALCON_RW | {"num_attention_heads": 6, "hidden_size": 48}),
    "galactica": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt": ("opt", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "qwen2, windows in some layers": ("qwen2", QWEN2),
}
TP = "--tp 2 --sequence-parallel"
LAYOUTS = {
    "bloom, 6 heads": (TP, "--tp 2", "--cp 2", "--pp 2", "--recompute full"),
    "falcon": ("--tp 2", "--cp 2", "--pp 2 --vpp 2", "--recompute full", "--recompute selective"),
    "falcon 7B": (TP, "--tp 2"),
    "falcon RW, 6 heads": (TP, "--cp 2"),
    "galactica": (TP, "--pp 2"),
    "opt": ("--tp 2", "--cp 2", "--pp 2 --vpp 2"),
    "gpt_bigcode": ("--tp 2", "--cp 2"),
    "gpt2": ("--pp 2", "--use-distributed-optimizer"),
    "mistral": ("--cp 2", "--pp 2", "--recompute selective"),
    "qwen2, windows in some layers": (TP, "--cp 2", "--pp 2 --vpp 2"),
}
CASES = {(model, layout): layout for model, layouts in LAYOUTS.items() for layout in layouts}
QUICK = [  # in the default suite
    ("bloom, 6 heads", TP),
    ("bloom, 6 heads", "--cp 2"),
    ("falcon", "--pp 2 --vpp 2"),
    ("falcon", "--recompute selective"),
    ("falcon 7B", "--tp 2"),
    ("opt", "--cp 2"),
    ("opt", "--pp 2 --vpp 2"),
    ("gpt_bigcode", "--tp 2"),
    ("qwen2, windows in some layers", TP),
    ("qwen2, windows in some layers", "--cp 2"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """The log records of each case; the single process is 'MODEL alone'."""
    folder = tmp_path_factory.mktemp("layouts")
    trainer_runs.corpus(folder)
    by_size: dict[int, dict[str, list[str]]] = {1: {}, 2: {}}
    asked = wanted(request, CASES, QUICK)
    for name in dict.fromkeys(name for name, _ in asked):
        family, changes = MODELS[name]
        trainer_runs.model(folder, name, family, **changes)
        for layout in ("alone", *(layout for model, layout in asked if model == name)):
            flags = "" if layout == "alone" else layout
            words = f"--train-iters {STEPS} --micro-batch-size 2 --seq-length 64 {flags}"
            size = 1 if layout == "alone" else 2
            by_size[size][f"{name} {layout}"] = trainer_runs.arguments(folder, name, "run", words)
    return {name: log for size, cases in by_size.items() for name, log in launch(size, cases, folder).items()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "layout"), marked(CASES, QUICK))
def test_a_layout_equals_the_single_process(runs: dict[str, list[dict]], model: str, layout: str) -> None:
    expected, found = (trainer_runs.steps(runs[f"{model} {kind}"]) for kind in ("alone", layout))
    assert len(expected) == len(found) == STEPS
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    print(f"{model:30} {layout:30} loss {found[-1][1]:.7f} off by {loss:.1e}  norm off by {norm:.1e}")
    assert loss <= 1e-5
    assert norm <= 1e-4
    assert expected[-1][1] != expected[0][1]  # it trained
