"""A mixture of experts in training: what balances it, what the log says of it, at every layout and after a resume."""

import pytest
import torch
import trainer_runs
from trainer_runs import launch

from megapatch.models import device, family, parallel

FOUND = device.start("cpu")  # before megatron-core is imported

from megapatch.models.build import ModelOptions, build  # noqa: E402
from megapatch.models.cli import UserError, parser  # noqa: E402
from megapatch.trainer.layout import experts  # noqa: E402
from megapatch.trainer.options import PretrainOptions  # noqa: E402

EXPERTS, TOPK = 8, 3  # of the tiny DeepSeek-V3
TOKENS = 4 * 32
SMALL = "--global-batch-size 4 --micro-batch-size 1 --lr 5e-3"
LAYOUTS = {"EP2": "--ep 2", "TP2 SP": "--tp 2 --sequence-parallel", "CP2": "--cp 2", "PP2": "--pp 2"}
CASES = {  # name: arguments; the model is DeepSeek-V3's
    "alone": "--train-iters 4 --moe-z-loss-coeff 0.1 --moe-bias-update-rate 0.1",
    "fixed bias": "--train-iters 4 --moe-z-loss-coeff 0.1 --moe-bias-update-rate 0",
    "no z-loss": "--train-iters 4 --moe-bias-update-rate 0.1",
    "no balancing": "--train-iters 4 --moe-aux-loss none --moe-bias-update-rate 0.1",
    "heavy balancing": "--train-iters 4 --moe-aux-loss-coeff 1 --moe-bias-update-rate 0.1",
    "over the micro-batch": "--train-iters 2 --moe-aux-loss aux_loss",
    "capacity": "--train-iters 2 --moe-capacity-factor 1",
}
Records = dict[str, list[dict]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records of each case; 'first' and 'second' are one run in two parts."""
    folder = tmp_path_factory.mktemp("moe")
    trainer_runs.corpus(folder)
    trainer_runs.model(folder, "v3", "deepseek_v3")

    def arguments(save: str, words: str) -> list[str]:
        return trainer_runs.arguments(folder, "v3", save, f"{SMALL} {words}")

    cases: dict = {name: arguments("none", words) for name, words in CASES.items()}
    whole = CASES["alone"].replace("--train-iters 4", "--lr-decay-iters 4")
    for name, steps in {"first": 2, "second": 4}.items():
        cases[name] = {"arguments": arguments("parts", f"{whole} --train-iters {steps} --save-interval 2"), "save": {}}
    found = launch(1, cases, folder)
    two = {name: arguments("none", f"{CASES['alone']} {words}") for name, words in LAYOUTS.items()}
    return found | launch(2, two, folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_balances_as_one_process(runs: Records, layout: str) -> None:
    for one, other in zip(trainer_runs.steps(runs["alone"]), trainer_runs.steps(runs[layout]), strict=True):
        assert abs(one[1] - other[1]) <= 1e-5  # loss
        assert abs(one[2] - other[2]) <= 1e-4  # gradient norm, which the z-loss is part of
    for name in ("expert_tokens_mean", "expert_tokens_max", "tokens_dropped"):
        assert logged(runs["alone"], name) == logged(runs[layout], name)
    assert logged(runs["alone"], "router_z_loss") == pytest.approx(logged(runs[layout], "router_z_loss"), rel=1e-5)


def logged(records: list[dict], name: str) -> list[float]:
    return [record[name] for record in trainer_runs.events(records, "train")]


@pytest.mark.timeout(900)
def test_the_log_has_the_load_of_experts(runs: Records) -> None:
    assert logged(runs["alone"], "expert_tokens_mean") == [TOKENS * TOPK / EXPERTS] * 4
    assert all(TOKENS * TOPK / EXPERTS < most <= TOKENS for most in logged(runs["alone"], "expert_tokens_max"))
    assert logged(runs["alone"], "tokens_dropped") == [0] * 4
    assert "router_z_loss" not in trainer_runs.events(runs["no z-loss"], "train")[0]


@pytest.mark.timeout(900)
def test_tokens_beyond_the_capacity_are_dropped_and_counted(runs: Records) -> None:
    dropped, mean = logged(runs["capacity"], "tokens_dropped"), logged(runs["capacity"], "expert_tokens_mean")
    assert all(0 < count < 3 * TOKENS for count in dropped)  # three mixtures
    for count, taken in zip(dropped, mean, strict=True):
        assert count * TOPK + taken * EXPERTS * 3 == TOKENS * TOPK * 3


@pytest.mark.timeout(900)
def test_a_run_goes_on_with_its_biases(runs: Records) -> None:
    assert trainer_runs.steps(runs["first"], runs["second"]) == trainer_runs.steps(runs["alone"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("other", ["fixed bias", "no z-loss", "no balancing", "heavy balancing"])
def test_each_way_to_balance_has_an_effect(runs: Records, other: str) -> None:
    assert trainer_runs.steps(runs[other]) != trainer_runs.steps(runs["alone"])


@pytest.mark.timeout(900)
def test_the_kind_of_balancing_loss_is_the_one_asked_for(runs: Records) -> None:
    first = {name: trainer_runs.events(runs[name], "train")[0] for name in ("alone", "over the micro-batch")}
    assert "seq_load_balancing_loss" in first["alone"]  # as config.json says
    assert "load_balancing_loss" in first["over the micro-batch"]
    assert not {"seq_load_balancing_loss", "load_balancing_loss"} & set(
        trainer_runs.events(runs["no balancing"], "train")[0]
    )


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory):
    """A bf16 model of one process, and its first router."""
    from transformers import AutoConfig

    hf = AutoConfig.for_model("deepseek_v3", **dict(family.known()["deepseek_v3"].tiny)).to_dict()
    parallel.start(parallel.Parallel(), FOUND)
    device.seed_everything(1, 0)
    fields = {"calculate_per_token_loss": True, "moe_router_bias_update_rate": 0.25}
    models = build(hf, ModelOptions(parallel.Parallel(), FOUND, "bf16", 64, fields))
    yield models, next(experts.routers(models))
    parallel.stop()


def test_in_bf16_tokens_are_counted_one_by_one(router) -> None:
    models, first = router
    rows = 12
    ids = torch.randint(90, (rows, 64), generator=torch.Generator().manual_seed(1))
    models[0].train()(ids, torch.arange(64).expand_as(ids), None, labels=ids).sum().backward()
    assert first.local_tokens_per_expert.dtype == torch.float32
    assert first.local_tokens_per_expert.sum() == rows * 64 * TOPK
    assert first.local_tokens_per_expert.tolist() == first.load.tokens.tolist()
    assert first.local_tokens_per_expert.max() > 256  # what bf16 cannot count beyond


def test_a_step_that_is_skipped_leaves_the_biases(router) -> None:
    models, first = router
    models[0].finish_grad_sync = lambda force_all_reduce: None  # gradients are not what this is about
    first.local_tokens_per_expert.copy_(torch.arange(EXPERTS))
    before = first.expert_bias.clone()
    experts.finalize(models)
    assert (first.expert_bias - before).tolist() == [0.25] * 4 + [-0.25] * 4  # few tokens: more wanted
    experts.undo_bias(models)
    assert torch.equal(first.expert_bias, before)


@pytest.mark.parametrize(
    ("words", "model", "reason"),
    [
        ("--moe-z-loss-coeff 1e-3", {}, "--moe-z-loss-coeff: the model of config.json has no experts"),
        ("--moe-capacity-factor 1", {}, "--moe-capacity-factor: the model of config.json has no experts"),
        ("--moe-bias-update-rate 0", {"num_moe_experts": 8}, "the router of config.json has no bias"),
        ("--moe-grouped-gemm", {"num_moe_experts": 8}, "--moe-grouped-gemm needs Transformer Engine"),
    ],
)
def test_what_a_model_has_no_place_for_is_refused(words: str, model: dict, reason: str) -> None:
    given = f"--init-from c --save s --data-path d --train-iters 1 {words}".split()
    options = parser(PretrainOptions, prog="mp-pretrain").parse_args(given)
    with pytest.raises(UserError, match=reason):
        options.moe_config(model, engine=False)


@pytest.mark.parametrize("words", ["--moe-z-loss-coeff -1", "--moe-aux-loss none --moe-aux-loss-coeff 1"])
def test_numbers_that_cannot_be_are_refused(words: str) -> None:
    given = f"--init-from c --save s --data-path d --train-iters 1 {words}".split()
    with pytest.raises(ValueError, match="--moe-"):
        parser(PretrainOptions, prog="mp-pretrain").parse_args(given)
