"""StarCoder 1 and SantaCoder: GPT-2 with one key-value head for all, or with q, k and v of each head together."""

from megapatch.models.families.gpt2 import ATTENTION, FIXED, HF, MLP, ONLY, READS, TANH, TINY, around
from megapatch.models.family import Family
from megapatch.models.rules import Rule, with_bias

FAMILY = Family(
    model_type="gpt_bigcode",
    fixed=FIXED,
    reads=READS | {"num_query_groups": lambda hf: 1 if hf.get("multi_query", True) else hf["n_head"]},
    only=ONLY | {"activation_function": (TANH[1], *ONLY["activation_function"])},
    tied=True,
    positions=lambda hf: "learned_absolute",
    max_positions="n_positions",
    modules=lambda hf: {"adapt": "embedding:gpt2_dropout"},
    prefix="transformer.",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
    rules=lambda hf: (
        *around(hf),
        *with_bias(
            Rule(ATTENTION + "linear_qkv.{k}", (HF + "attn.c_attn.{k}",), shapes=("q+k+k h",)),
            Rule(ATTENTION + "linear_proj.{k}", (HF + "attn.c_proj.{k}",)),
            Rule(MLP + "linear_fc1.{k}", (HF + "mlp.c_fc.{k}",), shapes=("f h",)),
            Rule(MLP + "linear_fc2.{k}", (HF + "mlp.c_proj.{k}",)),
        ),
    ),
    tiny=TINY,
)
