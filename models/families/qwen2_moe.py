"""Qwen1.5-MoE and Qwen2-MoE (A2.7B, 57B-A14B): routed experts beside a shared one with a gate, bias on q, k and v.

Layers and routing are as in qwen3_moe.py; the probabilities of the top-k experts are as they come by default.
"""

from megapatch.models.families.qwen3_moe import moe_layers
from megapatch.models.family import MOE_FIXED, MOE_READS, TINY, Family, HfConfig
from megapatch.models.rules import CORE, HF, Rule, attention, dense_mlp, embeddings, gated_mlp, moe_mlp, on_layers


def mixture(hf: HfConfig) -> tuple[Rule, ...]:
    """Router, experts, and the shared expert with its gate."""
    gate = Rule(CORE + "mlp.shared_experts.gate_weight", (HF + "mlp.shared_expert_gate.weight",))
    names = ("gate_proj", "up_proj", "down_proj")
    return *moe_mlp(), *gated_mlp("mlp.shared_experts.", "mlp.shared_expert.", names), gate


FAMILY = Family(
    model_type="qwen2_moe",
    fixed=MOE_FIXED | {"moe_shared_expert_gate": True},
    reads=MOE_READS
    | {
        "add_qkv_bias": lambda hf: hf.get("qkv_bias", True),
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "moe_router_pre_softmax": lambda hf: not hf.get("norm_topk_prob", False),
        "moe_layer_freq": lambda hf: moe_layers(hf) if 0 in moe_layers(hf) else 1,  # 1: stacked checkpoint keys
    },
    only={"use_sliding_window": False, "hidden_act": "silu"},
    rules=lambda hf: (
        *embeddings(),
        *attention(bias=hf.get("qkv_bias", True)),
        *on_layers(mixture(hf), [n for n, moe in enumerate(moe_layers(hf)) if moe]),
        *on_layers(dense_mlp(), [n for n, moe in enumerate(moe_layers(hf)) if not moe]),
    ),
    tiny=TINY
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
)
