"""GLM-4 9B as transformers has it (glm-4-9b-chat-hf): half of each head rotated, neighbours paired; gate and up fused.

Sizes that config.json leaves out have transformers' defaults.
"""

from megapatch.models.family import TINY, Family, HfConfig, written_rope
from megapatch.models.rules import CORE, HF, Rule, attention, embeddings

TINY_GLM = TINY | {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1}


def head_size(hf: HfConfig) -> int:
    """Dimensions of each head."""
    return hf.get("head_dim", 128)


def biased(hf: HfConfig) -> bool:
    """Whether q, k and v have a bias."""
    return hf.get("attention_bias", True)


def rotary_dim(hf: HfConfig) -> int:
    """How many dimensions of each head are rotated."""
    named = written_rope(hf).get("partial_rotary_factor") or hf.get("partial_rotary_factor")
    return int(head_size(hf) * (named or 0.5))


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Llama's, with a bias on q, k and v where config.json has it, and gate and up in one tensor."""
    return (
        *embeddings(),
        *attention(bias=biased(hf)),
        Rule(CORE + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",)),
        Rule(CORE + "mlp.linear_fc1.weight", (HF + "mlp.gate_up_proj.weight",), shapes=("f+f h",)),
        Rule(CORE + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",)),
    )


FAMILY = Family(
    model_type="glm",
    fixed={"rotary_interleaved": True},
    reads={
        "num_query_groups": lambda hf: hf.get("num_key_value_heads", 2),
        "kv_channels": head_size,
        "layernorm_epsilon": lambda hf: hf.get("rms_norm_eps", 1.5625e-07),
        "add_qkv_bias": biased,
    },
    only={"hidden_act": "silu"},
    rotary_dim=rotary_dim,
    rules=rules,
    tiny=TINY_GLM,
)
