"""What packing asks of a model, by training: windows, latent attention, learned positions, ALiBi, experts, bf16."""

import pytest
import sft_runs
from sft_runs import ROWS
from trainer_runs import error, steps

FAMILIES = {  # name -> changes of the tiny config.json
    "mistral": {"sliding_window": 7},
    "gpt2": {"n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "deepseek_v3": {"aux_loss_alpha": 0.0},
    "qwen3_moe": {"router_aux_loss_coef": 0.0},
}
WORDS = {"deepseek_v3": " --moe-bias-update-rate 0"}  # balancing counts all tokens, padding too
HALVES = "qwen3"  # in bf16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float, float, float]]]:
    """Steps of each family, packed and padded; a step meets every conversation once."""
    folder = tmp_path_factory.mktemp("families")
    sft_runs.tokenizer(folder)
    number = sft_runs.filling(folder, "chats")
    for name in (*FAMILIES, HALVES):
        sft_runs.model(folder, name, name, **FAMILIES.get(name, {}))
    cases = {}
    for name in (*FAMILIES, HALVES):
        more = " --train-iters 3" + (" --precision bf16" if name == HALVES else WORDS.get(name, ""))
        packed = f"--data-path {{}}/chats --global-batch-size {ROWS}{more}"
        padded = f"--data-path {{}}/chats --no-packing --global-batch-size {number}{more}"
        cases[name] = sft_runs.arguments(folder, name, "run", packed)
        cases[f"{name} padded"] = sft_runs.arguments(folder, name, "run", padded)
    logs = sft_runs.launch(1, cases, folder)
    assert not any(map(error, logs.values())), {name: error(log) for name, log in logs.items() if error(log)}
    return {name: steps(log) for name, log in logs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_packed_as_padded(runs: dict[str, list[tuple[int, float, float, float]]], name: str) -> None:
    a, b = runs[name], runs[f"{name} padded"]
    loss, norm = (max(abs(x[i] - y[i]) for x, y in zip(a, b, strict=True)) for i in (1, 2))
    print(f"{name}: loss {a[-1][1]:.5f} off by {loss:.1e}, norm {a[-1][2]:.5f} by {norm:.1e}")
    assert a[-1][1] < a[0][1]
    assert loss <= 1e-5
    assert norm <= 1e-4


def test_bf16_trains_packed_as_padded(runs: dict[str, list[tuple[int, float, float, float]]]) -> None:
    """Sums are in another order, which in bf16 shows in the third figure."""
    for a, b in zip(runs[HALVES], runs[f"{HALVES} padded"], strict=True):
        assert abs(a[1] - b[1]) <= 1e-2
