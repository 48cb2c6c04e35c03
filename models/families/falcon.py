"""Falcon 7B (attention and feed-forward in parallel, one norm), 40B (two norms), 11B, and RW 1B and 7B (ALiBi).

RW has biases and layers in sequence. q, k and v of each group of heads lie together, as in core.
"""

from typing import Literal

from megapatch.models.family import TINY, Family, HfConfig, UserError
from megapatch.models.rules import CORE, Rule, with_bias

HF, ATTENTION, MLP = "transformer.h.{l}.", CORE + "self_attention.", CORE + "mlp."


def norms(hf: HfConfig) -> Literal["sequence", "shared", "two"]:
    """Where the norms of a layer are: in sequence as usual, or one or two for parallel parts."""
    if not hf.get("new_decoder_architecture", False):
        return "shared" if hf.get("parallel_attn", True) else "sequence"
    return "two" if (hf.get("num_ln_in_parallel_attn") or 2) == 2 else "shared"


def groups(hf: HfConfig) -> int:
    """Key-value heads."""
    heads, new = hf["num_attention_heads"], hf.get("new_decoder_architecture", False)
    found = (hf.get("num_kv_heads") or heads) if new else (1 if hf.get("multi_query", True) else heads)
    if hf.get("alibi") and found != heads:
        raise UserError("config.json: alibi is True; falcon supports it with a key-value head for each head only")
    return found


def modules(hf: HfConfig) -> dict[str, str]:
    """Parallel layers and ALiBi where config.json has them."""
    layers = {"shared": {"layer": "parallel:SharedNormLayer"}, "two": {"layer": "parallel:ParallelLayer"}}
    alibi = {"core_attention": "alibi:FalconAlibiAttention"} if hf.get("alibi") else {}
    return layers.get(norms(hf), {}) | alibi


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Norms always have biases, linear layers where config.json says so."""
    first, second = ("ln_attn", "ln_mlp") if norms(hf) == "two" else ("input_layernorm", "post_attention_layernorm")
    linear = with_bias(
        Rule(ATTENTION + "linear_qkv.{k}", (HF + "self_attention.query_key_value.{k}",), shapes=("q+k+k h",)),
        Rule(ATTENTION + "linear_proj.{k}", (HF + "self_attention.dense.{k}",)),
        Rule(MLP + "linear_fc1.{k}", (HF + "mlp.dense_h_to_4h.{k}",), shapes=("f h",)),
        Rule(MLP + "linear_fc2.{k}", (HF + "mlp.dense_4h_to_h.{k}",)),
    )
    mlp_norm = with_bias(Rule(MLP + "linear_fc1.layer_norm_{k}", (HF + second + ".{k}",)))
    return (
        Rule("embedding.word_embeddings.weight", ("transformer.word_embeddings.weight",)),
        *with_bias(
            Rule("decoder.final_layernorm.{k}", ("transformer.ln_f.{k}",)),
            Rule(ATTENTION + "linear_qkv.layer_norm_{k}", (HF + first + ".{k}",)),
        ),
        *(mlp_norm if norms(hf) != "shared" else ()),
        *(rule for rule in linear if hf.get("bias") or rule.core.endswith("weight")),
        Rule("output_layer.weight", ("lm_head.weight",)),
    )


FAMILY = Family(
    model_type="falcon",
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu"},
    reads={
        "num_query_groups": groups,
        "kv_channels": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
        "ffn_hidden_size": lambda hf: hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
        "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-5),
        "add_bias_linear": lambda hf: bool(hf.get("bias")),
    },
    only={"activation": "gelu", "hidden_dropout": 0.0, "attention_dropout": 0.0},
    tied=True,
    positions=lambda hf: "none" if hf.get("alibi") else "rope",
    max_positions=lambda hf: None if hf.get("alibi") else hf.get("max_position_embeddings", 2048),
    modules=modules,
    prefix="transformer.",
    rules=rules,
    tiny={key: size for key, size in TINY.items() if key != "num_key_value_heads"}
    | {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 64},
)
