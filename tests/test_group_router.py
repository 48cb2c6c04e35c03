"""Routing to experts of a few groups: as DeepSeek's models do it, and not as megatron-core 0.16.1 does."""

import pytest
import torch

from megapatch.models import device

device.start()  # before megatron-core is imported

from megatron.core.transformer.moe.moe_utils import (  # noqa: E402
    group_limited_topk,
    topk_routing_with_score_function,
)
from transformers import DeepseekV2Config, DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter  # noqa: E402

from megapatch.models.layers.group_router import GroupChoice, choose_in_groups  # noqa: E402

TOKENS, EXPERTS, GROUPS, HIDDEN, SCALE = 200, 24, 6, 32, 2.5
ROUTERS = {  # ours: experts that a group is worth; theirs
    "deepseek_v2": (1, DeepseekV2Config, DeepseekV2TopkRouter, {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": (2, DeepseekV3Config, DeepseekV3TopkRouter, {}),
}


def chosen(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Weights of the chosen experts [t, k], and which they are -> [t, e], zero where not chosen."""
    return torch.zeros(TOKENS, EXPERTS).scatter(1, experts, weights)


@pytest.mark.parametrize("topk", [2, 3, 6])  # 1, 1.5 and 3 experts for each group that is allowed
@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_their_weights_are_those_of_transformers(name: str, topk: int) -> None:
    best, config, router, words = ROUTERS[name]
    sizes = {"n_routed_experts": EXPERTS, "n_group": GROUPS, "topk_group": 2, "num_experts_per_tok": topk}
    theirs = router(config(hidden_size=HIDDEN, routed_scaling_factor=SCALE, **sizes, **words))
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN)
    torch.nn.init.normal_(theirs.weight)
    bias = torch.randn(EXPERTS) if name == "deepseek_v3" else None
    if bias is not None:
        theirs.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        logits, weights, experts = theirs(hidden)
    ours, _ = topk_routing_with_score_function(
        logits.detach(),
        topk,
        use_pre_softmax=True,
        num_groups=GROUPS,
        group_topk=2,
        scaling_factor=SCALE,
        score_function="sigmoid" if bias is not None else "softmax",
        expert_bias=bias,
        router_replay=GroupChoice(best),
    )
    torch.testing.assert_close(ours, chosen(weights, experts), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("best", "topk"), [(1, 4), (2, 2)])
def test_megatron_core_still_chooses_other_groups(best: int, topk: int) -> None:
    """When this fails, upstream chooses as the models do: our routers can go."""
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    _, ours = choose_in_groups(scores, topk, GROUPS, 2, best)
    _, theirs = group_limited_topk(scores, topk, TOKENS, EXPERTS, GROUPS, 2)
    differing = (ours.sort().values != theirs.sort().values).any(1).sum()
    assert differing > TOKENS // 10


def test_megatron_core_agrees_where_its_number_of_experts_is_that_of_the_model() -> None:
    """DeepSeek-V3 as published: 8 experts of 4 groups, so that 8 // 4 is the 2 that it means."""
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    ours, theirs = choose_in_groups(scores, 4, GROUPS, 2, 2), group_limited_topk(scores, 4, TOKENS, EXPERTS, GROUPS, 2)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
