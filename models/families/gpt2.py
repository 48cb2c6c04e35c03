"""GPT-2: learned positions, biases everywhere, weights stored transposed with q, k and v in one tensor.

Its older files have neither ``transformer.`` before their names nor only weights: causal masks lie beside them.
"""

from typing import Any

from megapatch.models.family import Family, HfConfig, Source
from megapatch.models.rules import CORE, Rule, fused_by_group, with_bias

HF, ATTENTION, MLP = "transformer.h.{l}.", CORE + "self_attention.", CORE + "mlp."
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one function
ACTIVATIONS = dict.fromkeys(TANH, "gelu_tanh") | {"gelu": "gelu", "relu": "relu"}
READS: dict[str, Source] = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "ffn_hidden_size": lambda hf: hf.get("n_inner") or 4 * hf["n_embd"],
    "num_attention_heads": "n_head",
    "num_query_groups": "n_head",
    "kv_channels": lambda hf: hf["n_embd"] // hf["n_head"],
    "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-5),
    "activation_func": lambda hf: ACTIVATIONS[hf.get("activation_function", TANH[0])],
    "attention_dropout": lambda hf: hf.get("attn_pdrop", 0.1),
    "hidden_dropout": lambda hf: hf.get("resid_pdrop", 0.1),
}
FIXED = {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}
ONLY: dict[str, Any] = {
    "activation_function": tuple(ACTIVATIONS),
    "scale_attn_weights": True,
    "add_cross_attention": False,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # training at every layout is then the same
TINY = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **NO_DROPOUT}


def around(hf: HfConfig) -> tuple[Rule, ...]:
    """Embeddings, norms and output layer."""
    return (
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",)),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), shapes=("p h",)),
        *with_bias(
            Rule("decoder.final_layernorm.{k}", ("transformer.ln_f.{k}",)),
            Rule(ATTENTION + "linear_qkv.layer_norm_{k}", (HF + "ln_1.{k}",)),
            Rule(MLP + "linear_fc1.layer_norm_{k}", (HF + "ln_2.{k}",)),
        ),
        Rule("output_layer.weight", ("lm_head.weight",)),
    )


FAMILY = Family(
    model_type="gpt2",
    fixed=FIXED,
    reads=READS,
    only=ONLY
    | {
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "attention_head_type": "multihead",  # SantaCoder's own code says multiquery
    },
    tied=True,
    positions=lambda hf: "learned_absolute",
    max_positions="n_positions",
    modules=lambda hf: {"adapt": "embedding:gpt2_dropout"},
    prefix="transformer.",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
    rules=lambda hf: (
        *around(hf),
        *with_bias(
            Rule(ATTENTION + "linear_qkv.{k}", (HF + "attn.c_attn.{k}",), fused_by_group, None, ("h q+k+k",), True),
            Rule(ATTENTION + "linear_proj.{k}", (HF + "attn.c_proj.{k}",), shapes=("q h",), transposed=True),
            Rule(MLP + "linear_fc1.{k}", (HF + "mlp.c_fc.{k}",), shapes=("h f",), transposed=True),
            Rule(MLP + "linear_fc2.{k}", (HF + "mlp.c_proj.{k}",), shapes=("f h",), transposed=True),
        ),
    ),
    tiny=TINY,
)
