"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 9B as the hub's remote code has them: GLM-4's layer under older names.

Facts: the hub's modeling_chatglm.py. ``apply_query_key_layer_scaling`` divides and multiplies by the same number. The
first ChatGLM and GLM-130B (2D rotary embedding, prefix mask), which have the same ``model_type``, are refused.
"""

from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.family import Family, HfConfig
from megapatch.models.rules import CORE, Rule, fused_by_group, with_bias

HF = "transformer.encoder.layers.{l}."
QKV = CORE + "self_attention.linear_qkv."
VOCABULARY_GLM4 = 151552
SAME = ("num_layers", "ffn_hidden_size", "kv_channels", "layernorm_epsilon")  # named as in TransformerConfig


def rope(hf: HfConfig) -> dict[str, Any]:
    """``rope_ratio`` multiplies the base; in ChatGLM2-6B-32k alone, it divides positions."""
    ratio, origin = hf.get("rope_ratio", 1), str(hf.get("_name_or_path", "")).lower()
    if ratio != 1 and "chatglm2" in origin:
        return {"rope_theta": 10000.0, "rope_type": "linear", "factor": float(ratio)}
    if ratio == 1 or "chatglm3" in origin or hf["padded_vocab_size"] == VOCABULARY_GLM4:
        return {"rope_theta": 10000.0 * ratio}
    raise UserError(
        f"config.json: rope_ratio is {ratio}; it divides positions in ChatGLM2 and multiplies the base in ChatGLM3: "
        "set _name_or_path to the model this one comes from, such as THUDM/chatglm3-6b-32k"
    )


FAMILY = Family(
    model_type="chatglm",
    fixed={"rotary_interleaved": True, "add_qkv_bias": True},
    reads={name: name for name in SAME} | {"num_query_groups": "multi_query_group_num"},
    only={
        "multi_query_attention": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "original_rope": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "quantization_bit": 0,
        "pre_seq_len": None,
        "vision_config": None,
        "position_encoding_2d": None,
    },
    vocab_size="padded_vocab_size",
    max_positions="seq_length",
    rope=rope,
    rotary_dim=lambda hf: hf["kv_channels"] // 2,
    buffers=("transformer.rotary_pos_emb.inv_freq",),
    rules=lambda hf: (
        Rule("embedding.word_embeddings.weight", ("transformer.embedding.word_embeddings.weight",)),
        Rule("decoder.final_layernorm.weight", ("transformer.encoder.final_layernorm.weight",)),
        Rule("output_layer.weight", ("transformer.output_layer.weight",)),
        Rule(QKV + "layer_norm_weight", (HF + "input_layernorm.weight",)),
        *with_bias(
            Rule(QKV + "{k}", (HF + "self_attention.query_key_value.{k}",), fused_by_group, shapes=("q+k+k h",))
        ),
        Rule(CORE + "self_attention.linear_proj.weight", (HF + "self_attention.dense.weight",)),
        Rule(CORE + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",)),
        Rule(CORE + "mlp.linear_fc1.weight", (HF + "mlp.dense_h_to_4h.weight",), shapes=("f+f h",)),
        Rule(CORE + "mlp.linear_fc2.weight", (HF + "mlp.dense_4h_to_h.weight",)),
    ),
    tiny={"padded_vocab_size": 96, "hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 4, "num_attention_heads": 4}
    | {
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "seq_length": 64,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    },
)
