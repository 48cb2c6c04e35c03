"""The sandwich norms and the normalised output layer: in training, pipelines, recomputation, bf16 and long contexts."""

import pytest
import torch
import torch.nn.functional as F
import trainer_runs
from slow_cases import marked, wanted
from trainer_runs import launch, steps

from megapatch.models import device

device.start()  # before megatron-core is imported

from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megapatch.models import parallel  # noqa: E402
from megapatch.models.layers.norm_head import NormHead  # noqa: E402


def test_rows_are_normalised_when_used_and_stay_as_they_are_where_they_are_stored() -> None:
    found = device.start()
    parallel.start(parallel.Parallel(), found)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
    head = ColumnParallelLinear(8, 12, config=config, init_method=torch.nn.init.normal_, bias=False)
    head.__class__ = NormHead
    before, x = head.weight.detach().clone(), torch.randn(5, 1, 8)
    head(x)[0].square().sum().backward()
    assert torch.equal(head.weight, before)
    again = before.clone().requires_grad_()
    (x @ F.normalize(again, dim=-1).T).square().sum().backward()
    assert torch.allclose(head.weight.grad, again.grad, rtol=0, atol=1e-6)
    assert (head.weight.grad * before).sum(-1).abs().max() < 1e-5, "a row's length matters"
    parallel.stop()


RUNS = {  # name -> family, changes of config.json, flags, how far the losses may be apart from a run without the flags
    "baichuan pp": ("baichuan", {}, "--pp 2", 2e-5),
    "baichuan 13b cp": ("baichuan", {"max_position_embeddings": None}, "--cp 2", 2e-5),
    "glm4 pp": ("glm4", {}, "--pp 2 --recompute full", 2e-5),
    "glm4 cp": ("glm4", {}, "--cp 2 --recompute selective", 2e-5),
    "glm4 bf16": ("glm4", {}, "--tp 2 --sequence-parallel --precision bf16", 2e-2),
    "baichuan bf16": ("baichuan", {}, "--tp 2 --precision bf16", 2e-2),
    "chatglm cp": ("chatglm", {}, "--cp 2", 2e-5),
    "qwen pp": ("qwen", {}, "--pp 2", 2e-5),
    "deepseek pp": ("deepseek", {}, "--pp 2", 2e-5),
}
QUICK = ("baichuan pp", "baichuan 13b cp", "glm4 cp", "glm4 bf16")
COMMON = "--train-iters 3 --adam-eps 1e-3"  # Adam's first steps make noise of gradients near zero as large as others


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """Log records of each run in two processes, of 'NAME alone' in one, and of 'long', too long a sequence."""
    folder = tmp_path_factory.mktemp("runs")
    trainer_runs.corpus(folder)
    trainer_runs.model(folder, "qwen", "qwen", seq_length=16)
    cases: dict[int, dict[str, list[str]]] = {1: {"long": trainer_runs.arguments(folder, "qwen", "long")}, 2: {}}
    for name, (family, changes, flags, _) in wanted(request, RUNS, QUICK).items():
        trainer_runs.model(folder, name, family, **changes)
        cases[1][name + " alone"] = trainer_runs.arguments(folder, name, name + " alone", COMMON)
        cases[2][name] = trainer_runs.arguments(folder, name, name + " run", f"{COMMON} {flags}")
    return {name: log for size, made in cases.items() for name, log in launch(size, made, folder).items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", marked(RUNS, QUICK))
def test_a_layout_trains_as_one_process(runs: dict[str, list[dict]], name: str) -> None:
    for log in (runs[name], runs[name + " alone"]):
        assert log[-1]["event"] != "error", log[-1]["text"]
    found, expected = steps(runs[name]), steps(runs[name + " alone"])
    assert len(found) == 3
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(found, expected, strict=True)) for i in (1, 2))
    print(f"{name:16} loss off by {loss:.1e}, norm of gradients by {norm:.1e}")
    assert loss <= RUNS[name][3]
    assert norm <= 5 * RUNS[name][3]


def test_a_sequence_longer_than_the_model_was_made_for_is_refused(runs: dict[str, list[dict]]) -> None:
    assert "--seq-length 32 is longer than" in trainer_runs.error(runs["long"])
