"""GLM-4-0414 and GLM-Z1 (9B, 32B): GLM-4 with sandwich norms, of what attention and feed-forward give as well."""

from dataclasses import replace

from megapatch.models.families import glm
from megapatch.models.rules import CORE, HF, Rule

AFTER = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")

FAMILY = replace(
    glm.FAMILY,
    model_type="glm4",
    modules=lambda hf: {"layer": "sandwich:SandwichLayer"},
    rules=lambda hf: (*glm.rules(hf), *(Rule(CORE + name, (HF + name,), shapes=("h",)) for name in AFTER)),
    tiny=glm.TINY_GLM | {"attention_bias": False},
)
