"""DeepSeek-MoE 16B (version 1): shared experts beside many small ones, softmax probabilities as they are.

Facts: the hub's modeling_deepseek.py. The first ``first_k_dense_replace`` layers are dense, and of the others those
whose number ``moe_layer_freq`` does not divide. Sizes that config.json leaves out have the defaults of that code.
"""

from megapatch.models.family import MOE_READS, TINY, Family, HfConfig
from megapatch.models.rules import Rule, attention, dense_mlp, embeddings, gated_mlp, moe_mlp, on_layers


def moe_layers(hf: HfConfig) -> list[int]:
    """1 for each mixture layer, 0 for each dense layer."""
    first, step = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    return [int(n >= first and n % step == 0) for n in range(hf["num_hidden_layers"])]


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Attention everywhere; a mixture or a dense feed-forward, by layer."""
    pattern = moe_layers(hf)
    shared = gated_mlp("mlp.shared_experts.", "mlp.shared_experts.", ("gate_proj", "up_proj", "down_proj"))
    mixtures = (*moe_mlp(), *(shared if hf.get("n_shared_experts") else ()))
    return (
        *embeddings(),
        *attention(),
        *on_layers(mixtures, [n for n, moe in enumerate(pattern) if moe]),
        *on_layers(dense_mlp(), [n for n, moe in enumerate(pattern) if not moe]),
    )


FAMILY = Family(
    model_type="deepseek",
    reads=MOE_READS
    | {
        "num_moe_experts": "n_routed_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": lambda hf: (
            hf["n_shared_experts"] * hf["moe_intermediate_size"] if hf.get("n_shared_experts") else None
        ),
        "moe_router_pre_softmax": lambda hf: not hf.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": lambda hf: "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss",
        "moe_aux_loss_coeff": lambda hf: hf.get("aux_loss_alpha", 0.001),
        "moe_layer_freq": lambda hf: moe_layers(hf) if 0 in moe_layers(hf) else 1,  # 1: stacked checkpoint keys
    },
    only={"attention_bias": False, "hidden_act": "silu", "scoring_func": "softmax"},
    rules=rules,
    tiny=TINY
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
)
