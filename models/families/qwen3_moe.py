"""Qwen3 mixture of experts (30B-A3B, 235B-A22B): QK norm, no biases, softmax top-k router.

Every layer is a mixture unless config.json lists it in ``mlp_only_layers`` or skips it with ``decoder_sparse_step``.
With ``norm_topk_prob`` the top-k probabilities are normalised after the softmax, which is the same as a softmax over
the top-k logits: core's ``moe_router_pre_softmax=False``.
"""

from megapatch.models.family import MOE_FIXED, MOE_READS, TINY, Family, HfConfig
from megapatch.models.rules import attention, dense_mlp, embeddings, moe_mlp, on_layers


def moe_layers(hf: HfConfig) -> list[int]:
    """1 for each mixture layer, 0 for each dense layer."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    return [int(n not in dense and (n + 1) % step == 0) for n in range(hf["num_hidden_layers"])]


FAMILY = Family(
    model_type="qwen3_moe",
    fixed=MOE_FIXED | {"qk_layernorm": True},
    reads=MOE_READS
    | {
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_pre_softmax": lambda hf: not hf.get("norm_topk_prob", False),
        "moe_layer_freq": lambda hf: moe_layers(hf) if 0 in moe_layers(hf) else 1,  # 1: stacked checkpoint keys
    },
    only={"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
    rules=lambda hf: (
        *embeddings(),
        *attention(qk_norm=True),
        *on_layers(moe_mlp(), [n for n, moe in enumerate(moe_layers(hf)) if moe]),
        *on_layers(dense_mlp(), [n for n, moe in enumerate(moe_layers(hf)) if not moe]),
    ),
    tiny=TINY
    | {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
)
