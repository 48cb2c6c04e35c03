"""Bloom: ALiBi, a norm after the embedding, biases everywhere; q, k and v of each head lie together, as in core."""

from megapatch.models.family import Family, HfConfig
from megapatch.models.rules import CORE, Rule, with_bias

HF, ATTENTION, MLP = "transformer.h.{l}.", CORE + "self_attention.", CORE + "mlp."


def width(hf: HfConfig) -> int:
    """Hidden size; published files have either name."""
    return hf.get("n_embed") or hf["hidden_size"]


def heads(hf: HfConfig) -> int:
    """Attention heads; published files have either name."""
    return hf.get("n_head") or hf["num_attention_heads"]


FAMILY = Family(
    model_type="bloom",
    fixed={
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": "gelu_tanh",
        "add_bias_linear": True,
    },
    reads={
        "num_layers": "n_layer|num_hidden_layers",
        "hidden_size": width,
        "ffn_hidden_size": lambda hf: 4 * width(hf),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": lambda hf: width(hf) // heads(hf),
        "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-5),
    },
    only={"apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "n_inner": None},
    tied=True,
    positions=lambda hf: "none",
    max_positions=lambda hf: None,
    modules=lambda hf: {"core_attention": "alibi:AlibiAttention", "adapt": "embedding:norm_embedding"},
    prefix="transformer.",
    rules=lambda hf: (
        Rule("embedding.word_embeddings.weight", ("transformer.word_embeddings.weight",)),
        *with_bias(
            Rule("embedding.norm.{k}", ("transformer.word_embeddings_layernorm.{k}",), shapes=("h",)),
            Rule("decoder.final_layernorm.{k}", ("transformer.ln_f.{k}",)),
            Rule(ATTENTION + "linear_qkv.layer_norm_{k}", (HF + "input_layernorm.{k}",)),
            Rule(ATTENTION + "linear_qkv.{k}", (HF + "self_attention.query_key_value.{k}",), shapes=("q+k+k h",)),
            Rule(ATTENTION + "linear_proj.{k}", (HF + "self_attention.dense.{k}",)),
            Rule(MLP + "linear_fc1.layer_norm_{k}", (HF + "post_attention_layernorm.{k}",)),
            Rule(MLP + "linear_fc1.{k}", (HF + "mlp.dense_h_to_4h.{k}",), shapes=("f h",)),
            Rule(MLP + "linear_fc2.{k}", (HF + "mlp.dense_4h_to_h.{k}",)),
        ),
        Rule("output_layer.weight", ("lm_head.weight",)),
    ),
    tiny={"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4},
)
