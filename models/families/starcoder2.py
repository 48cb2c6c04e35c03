"""StarCoder 2: RoPE, biases everywhere, LayerNorm, sliding windows, grouped keys."""

from megapatch.models.family import TINY, Family, HfConfig
from megapatch.models.rules import CORE, HF, Rule, by_group, embeddings, with_bias

ATTENTION, MLP = CORE + "self_attention.", CORE + "mlp."


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Norms always have biases, linear layers unless config.json says otherwise."""
    linear = with_bias(
        Rule(ATTENTION + "linear_qkv.{k}", tuple(HF + f"self_attn.{p}_proj.{{k}}" for p in "qkv"), by_group),
        Rule(ATTENTION + "linear_proj.{k}", (HF + "self_attn.o_proj.{k}",)),
        Rule(MLP + "linear_fc1.{k}", (HF + "mlp.c_fc.{k}",), shapes=("f h",)),
        Rule(MLP + "linear_fc2.{k}", (HF + "mlp.c_proj.{k}",)),
    )
    return (
        *(rule for rule in embeddings() if rule.core != "decoder.final_layernorm.weight"),
        *with_bias(
            Rule("decoder.final_layernorm.{k}", ("model.norm.{k}",)),
            Rule(ATTENTION + "linear_qkv.layer_norm_{k}", (HF + "input_layernorm.{k}",)),
            Rule(MLP + "linear_fc1.layer_norm_{k}", (HF + "post_attention_layernorm.{k}",)),
        ),
        *(rule for rule in linear if hf.get("use_bias", True) or rule.core.endswith("weight")),
    )


FAMILY = Family(
    model_type="starcoder2",
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu_tanh"},
    reads={
        "layernorm_epsilon": lambda hf: hf.get("norm_epsilon", 1e-5),
        "add_bias_linear": lambda hf: hf.get("use_bias", True),
        "hidden_dropout": lambda hf: hf.get("residual_dropout", 0.0),
        "window_size": lambda hf: (hf["sliding_window"] - 1, 0) if hf.get("sliding_window") else None,
    },
    only={
        "hidden_act": "gelu_pytorch_tanh",
        "norm_type": "layer_norm",
        "mlp_type": "default",
        "layer_types": None,
    },
    tied=True,
    windows=True,
    modules=lambda hf: {"adapt": "embedding:starcoder2_dropout"},
    rules=rules,
    tiny=TINY | {"sliding_window": 16},
)
