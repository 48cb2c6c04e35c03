"""DeepSeek-V3, R1 and Moonlight: as DeepSeek-V2, but a sigmoid router with a bias that balances the experts.

Groups are worth their two best experts, the bias included. The bias chooses only: the weights of the chosen experts are
their sigmoids, normalised. Moonlight has one group and no latent vector of queries.
"""

from megapatch.models.families.deepseek_v2 import ONLY, READS, SMALL, layers, mixture
from megapatch.models.family import MLA_FIXED, Family
from megapatch.models.rules import CORE, HF, Rule

BIAS = Rule(CORE + "mlp.router.expert_bias", (HF + "mlp.gate.e_score_correction_bias",), shapes=("e",))
FAMILY = Family(
    model_type="deepseek_v3",
    fixed=MLA_FIXED
    | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    reads=READS
    | {
        "moe_router_num_groups": lambda hf: hf.get("n_group", 8),
        "moe_router_group_topk": lambda hf: hf.get("topk_group", 4),
    },
    only=ONLY
    | {
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    },
    rope_kinds=("default", "yarn"),
    modules=lambda hf: {"layer_spec": "mla:layer_spec", "router": "group_router:BestTwoOfGroupRouter"},
    rules=lambda hf: layers(hf, (*mixture(), BIAS)),
    tiny=SMALL | {"num_experts_per_tok": 3},
)
