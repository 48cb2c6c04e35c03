"""OPT, and Galactica, which is OPT without biases and without weights in its norms: learned positions from row 2 on."""

from megapatch.models.family import TINY, Family, HfConfig, UserError
from megapatch.models.rules import CORE, Rule, by_group, with_bias

HF, ATTENTION, MLP = "model.decoder.layers.{l}.", CORE + "self_attention.", CORE + "mlp."


def width(hf: HfConfig) -> int:
    """Hidden size, which must be that of the embedding."""
    embedding = hf.get("word_embed_proj_dim") or hf["hidden_size"]
    if embedding != hf["hidden_size"]:
        raise UserError(
            f"config.json: word_embed_proj_dim is {embedding}; opt supports {hf['hidden_size']} only, as hidden_size"
        )
    return hf["hidden_size"]


def norms() -> tuple[Rule, ...]:
    """Those that have weights."""
    return with_bias(
        Rule("decoder.final_layernorm.{k}", ("model.decoder.final_layer_norm.{k}",)),
        Rule(ATTENTION + "linear_qkv.layer_norm_{k}", (HF + "self_attn_layer_norm.{k}",)),
        Rule(MLP + "linear_fc1.layer_norm_{k}", (HF + "final_layer_norm.{k}",)),
    )


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Biases and norms with weights unless config.json says otherwise."""
    linear = with_bias(
        Rule(ATTENTION + "linear_qkv.{k}", tuple(HF + f"self_attn.{p}_proj.{{k}}" for p in "qkv"), by_group),
        Rule(ATTENTION + "linear_proj.{k}", (HF + "self_attn.out_proj.{k}",)),
        Rule(MLP + "linear_fc1.{k}", (HF + "fc1.{k}",), shapes=("f h",)),
        Rule(MLP + "linear_fc2.{k}", (HF + "fc2.{k}",)),
    )
    return (
        Rule("embedding.word_embeddings.weight", ("model.decoder.embed_tokens.weight",)),
        Rule("embedding.position_embeddings.weight", ("model.decoder.embed_positions.weight",), shapes=("p+2 h",)),
        *(norms() if hf.get("layer_norm_elementwise_affine", True) else ()),
        *(rule for rule in linear if hf.get("enable_bias", True) or rule.core.endswith("weight")),
        Rule("output_layer.weight", ("lm_head.weight",)),
    )


FAMILY = Family(
    model_type="opt",
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False},
    reads={
        "hidden_size": width,
        "ffn_hidden_size": "ffn_dim",
        "num_query_groups": "num_attention_heads",
        "kv_channels": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
        "layernorm_epsilon": lambda hf: 1e-5,
        "activation_func": lambda hf: hf.get("activation_function", "relu"),
        "add_bias_linear": lambda hf: hf.get("enable_bias", True),
        "init_method_std": lambda hf: hf.get("init_std", 0.02),
        "hidden_dropout": lambda hf: hf.get("dropout", 0.1),
    },
    only={
        "activation_function": ("relu", "gelu"),
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layerdrop": 0.0,
        "scale_embeddings": False,
    },
    tied=True,
    positions=lambda hf: "learned_absolute",
    modules=lambda hf: (
        {"adapt": "embedding:offset_positions"}
        | ({} if hf.get("layer_norm_elementwise_affine", True) else {"norm": "norm:BareLayerNorm"})
    ),
    prefix="model.",
    rules=rules,
    # gelu: the derivative of relu jumps, and trainings that differ by roundings depart there
    tiny=TINY | {"ffn_dim": 64, "dropout": 0.0, "activation_function": "gelu"},
)
