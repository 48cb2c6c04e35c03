"""Qwen 1 (1.8B to 72B): fused [q; k; v] with a bias, no other biases; ``intermediate_size`` counts gate and up.

Facts: the hub's modeling_qwen.py (remote code). w2 is the gate, w1 the other factor. Beyond ``seq_length`` the model
changes when it generates (dynamic NTK, logarithmic scaling of queries); up to it these do nothing, so longer sequences
are refused. A language model only: Qwen-VL and Qwen-Audio carry ``visual`` or ``audio``.
"""

from megapatch.models.family import TINY, Family
from megapatch.models.rules import CORE, Rule, fused_by_group

HF = "transformer.h.{l}."
QKV = CORE + "self_attention.linear_qkv."

FAMILY = Family(
    model_type="qwen",
    fixed={"add_qkv_bias": True},
    reads={
        "ffn_hidden_size": lambda hf: hf["intermediate_size"] // 2,
        "num_query_groups": "num_attention_heads",
        "kv_channels": "kv_channels",
        "layernorm_epsilon": "layer_norm_epsilon",
        "attention_dropout": lambda hf: hf.get("attn_dropout_prob", 0.0),
    },
    only={
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "emb_dropout_prob": 0.0,
        "visual": None,
        "audio": None,
    },
    rope=lambda hf: {"rope_theta": hf.get("rotary_emb_base", 10000)},
    max_positions="seq_length",
    rules=lambda hf: (
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",)),
        Rule("decoder.final_layernorm.weight", ("transformer.ln_f.weight",)),
        Rule("output_layer.weight", ("lm_head.weight",)),
        Rule(QKV + "layer_norm_weight", (HF + "ln_1.weight",)),
        Rule(QKV + "weight", (HF + "attn.c_attn.weight",), fused_by_group, shapes=("q+k+k h",)),
        Rule(QKV + "bias", (HF + "attn.c_attn.bias",), fused_by_group, shapes=("q+k+k",)),
        Rule(CORE + "self_attention.linear_proj.weight", (HF + "attn.c_proj.weight",)),
        Rule(CORE + "mlp.linear_fc1.layer_norm_weight", (HF + "ln_2.weight",)),
        Rule(CORE + "mlp.linear_fc1.weight", (HF + "mlp.w2.weight", HF + "mlp.w1.weight")),
        Rule(CORE + "mlp.linear_fc2.weight", (HF + "mlp.c_proj.weight",)),
    ),
    tiny={key: size for key, size in TINY.items() if key != "num_key_value_heads"}
    | {"intermediate_size": 128, "kv_channels": 8, "layer_norm_epsilon": 1e-6, "seq_length": 64},
)
