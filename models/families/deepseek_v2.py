"""DeepSeek-V2 and V2-Lite: latent attention, dense layers first, then shared experts beside routed ones.

V2 routes each token to experts of a few groups only (``group_limited_greedy``), a group being worth its best expert.
"""

from typing import Any

from megapatch.models.family import MLA_FIXED, MLA_READS, MOE_MLA_TINY, Family, HfConfig
from megapatch.models.rules import Rule, dense_mlp, embeddings, gated_mlp, latent_attention, moe_mlp, on_layers


def moe_layers(hf: HfConfig) -> list[int]:
    """0 for each of the dense layers, which are the first ones, 1 for each mixture layer."""
    dense = hf.get("first_k_dense_replace", 0)
    return [int(n >= dense) for n in range(hf["num_hidden_layers"])]


def attention(hf: HfConfig) -> tuple[Rule, ...]:
    """Latent attention; queries have no latent vector where config.json says null."""
    return latent_attention(query_latent=hf.get("q_lora_rank", 0) is not None)


def mixture() -> tuple[Rule, ...]:
    """Router, experts and shared experts."""
    names = ("gate_proj", "up_proj", "down_proj")
    return *moe_mlp(), *gated_mlp("mlp.shared_experts.", "mlp.shared_experts.", names)


def layers(hf: HfConfig, mixture: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Embeddings and all layers, dense or this mixture."""
    return (
        *embeddings(),
        *attention(hf),
        *on_layers(dense_mlp(), [n for n, moe in enumerate(moe_layers(hf)) if not moe]),
        *on_layers(mixture, [n for n, moe in enumerate(moe_layers(hf)) if moe]),
    )


def limited(hf: HfConfig) -> bool:
    """True when experts are of a few groups only."""
    return hf.get("topk_method", "greedy") == "group_limited_greedy"


READS: dict[str, Any] = MLA_READS | {
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": lambda hf: hf["n_shared_experts"] * hf["moe_intermediate_size"],
    "moe_router_topk_scaling_factor": lambda hf: hf.get("routed_scaling_factor", 1.0),
    "moe_aux_loss_coeff": lambda hf: hf.get("aux_loss_alpha", 0.001),
    "moe_router_load_balancing_type": lambda hf: "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss",
    "moe_layer_freq": lambda hf: moe_layers(hf) if 0 in moe_layers(hf) else 1,  # 1: stacked checkpoint keys
}
ONLY = {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False, "moe_layer_freq": 1}
FAMILY = Family(
    model_type="deepseek_v2",
    fixed=MLA_FIXED | {"moe_router_pre_softmax": True, "moe_router_dtype": "fp32"},
    reads=READS
    | {
        "moe_router_num_groups": lambda hf: hf["n_group"] if limited(hf) else None,
        "moe_router_group_topk": lambda hf: hf["topk_group"] if limited(hf) else None,
    },
    only=ONLY
    | {
        "norm_topk_prob": (False, None),
        "scoring_func": "softmax",
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    rope_kinds=("default", "yarn"),
    modules=lambda hf: (
        {"layer_spec": "mla:layer_spec"} | ({"router": "group_router:BestOfGroupRouter"} if limited(hf) else {})
    ),
    rules=lambda hf: layers(hf, mixture()),
    tiny=MOE_MLA_TINY | {"topk_method": "group_limited_greedy", "norm_topk_prob": False, "num_experts_per_tok": 4},
)
