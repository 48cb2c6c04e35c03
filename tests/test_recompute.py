"""What is computed again in the backward pass is the same to the bit, dropout included, and less is kept.

``pytest -s tests/test_recompute.py`` prints what is kept.
"""

import pytest
import trainer_runs
from slow_cases import marked, wanted
from trainer_runs import launch

from megapatch.models.cli import UserError, parser
from megapatch.trainer.options import PretrainOptions

DENSE = {
    "full": "--recompute full",
    "full, units of 2": "--recompute full --recompute-unit 2",
    "the first 2 layers": "--recompute full --recompute-layers 2",
    "core_attn": "--recompute selective",
    "mlp": "--recompute selective --recompute-modules mlp",
    "layernorm": "--recompute selective --recompute-modules layernorm",
    "core_attn mlp layernorm": "--recompute selective --recompute-modules core_attn mlp layernorm",
}
LATENT = {  # DeepSeek-V3: latent attention, one dense layer, experts beside shared ones
    "full": "--recompute full",
    "moe": "--recompute selective --recompute-modules moe",
    "shared_experts": "--recompute selective --recompute-modules shared_experts",
    "mla_up_proj": "--recompute selective --recompute-modules mla_up_proj",
    "core_attn layernorm mla_up_proj mlp": (
        "--recompute selective --recompute-modules core_attn layernorm mla_up_proj mlp"
    ),
}
MODELS = {"qwen3": DENSE, "deepseek_v3": LATENT}
CASES = {(model, kind): words for model, kinds in MODELS.items() for kind, words in kinds.items()}
QUICK = [  # in the default suite
    ("qwen3", "full"),
    ("qwen3", "the first 2 layers"),
    ("qwen3", "core_attn mlp layernorm"),
    ("deepseek_v3", "moe"),
    ("deepseek_v3", "core_attn layernorm mla_up_proj mlp"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """Records of each model with each kind of recomputation; 'MODEL none' keeps all."""
    folder = tmp_path_factory.mktemp("recompute")
    trainer_runs.corpus(folder)
    cases = {}
    for model in MODELS:
        trainer_runs.model(folder, model, model, attention_dropout=0.1)
    for (model, kind), flags in ({(model, "none"): "" for model in MODELS} | wanted(request, CASES, QUICK)).items():
        words = trainer_runs.arguments(folder, model, "run", f"--train-iters 3 --lr 5e-3 {flags}")
        cases[f"{model} {kind}"] = {"arguments": words, "digests": True, "kept": True}
    return launch(1, cases, folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "kind"), marked(CASES, QUICK))
def test_recomputation_changes_no_bit_and_keeps_less(runs: dict[str, list[dict]], model: str, kind: str) -> None:
    plain, found = runs[f"{model} none"], runs[f"{model} {kind}"]
    assert trainer_runs.steps(found) == trainer_runs.steps(plain)
    states = [[r["digest"] for r in records if r["event"] == "state"] for records in (plain, found)]
    assert states[0] == states[1]
    assert len(set(states[0])) == 3  # it trained
    kept = [max(r["bytes"] for r in records if r["event"] == "kept") for records in (plain, found)]
    print(f"{model:12} {kind:36} kept {kept[1]:>9,} of {kept[0]:,} bytes: {kept[1] / kept[0]:.2f}")
    assert kept[1] < kept[0]


@pytest.mark.parametrize(
    ("model", "part", "reason"),
    [
        ({}, "moe", "the model of config.json has no experts"),
        ({}, "mla_up_proj", "the model of config.json has no multi-head latent attention"),
        ({"num_moe_experts": 8}, "mlp", "has no dense layers that megatron-core's own layer calls"),
        ({"num_moe_experts": 8}, "shared_experts", "has no shared experts"),
        ({"num_moe_experts": 8}, "moe_act", "has no grouped experts, which need Transformer Engine"),
    ],
)
def test_a_part_that_a_model_does_not_have_is_refused(model: dict, part: str, reason: str) -> None:
    words = f"--init-from c --save s --data-path d --train-iters 1 --recompute selective --recompute-modules {part}"
    options = parser(PretrainOptions, prog="mp-pretrain").parse_args(words.split())
    with pytest.raises(UserError) as error:
        options.recompute_config(model, own_layer=False, engine=False)
    assert str(error.value).startswith(f"--recompute-modules {part}: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--recompute-modules mlp", "--recompute-modules needs --recompute selective"),
        ("--recompute-layers 2", "--recompute-layers needs --recompute full"),
        ("--recompute full --recompute-layers 0", "--recompute-layers 0: must be at least 1"),
        ("--recompute full --recompute-layers 2 --recompute-unit 2", "give one"),
        ("--recompute selective --recompute-unit 2", "--recompute-unit needs --recompute full"),
    ],
)
def test_options_without_effect_are_refused(words: str, reason: str) -> None:
    given = f"--init-from c --save s --data-path d --train-iters 1 {words}".split()
    with pytest.raises(ValueError, match=reason):
        parser(PretrainOptions, prog="mp-pretrain").parse_args(given)
