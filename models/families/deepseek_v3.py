"""DeepSeek-V3, R1 and Moonlight: as DeepSeek-V2, but a sigmoid router with a bias that balances the experts.

Groups are worth their two best experts, the bias included. The bias chooses only: the weights of the chosen experts are
their sigmoids, normalised. Moonlight has one group and no latent vector of queries.

Published files hold further layers, for multi-token prediction, that share embedding and output layer with the model
and repeat both; files written by transformers lack these layers though config.json names them.
"""

from collections.abc import Mapping

from megapatch.models.families.deepseek_v2 import ONLY, READS, attention, layers, mixture
from megapatch.models.family import MLA_FIXED, MOE_MLA_TINY, Family, HfConfig
from megapatch.models.rules import CORE, HF, Rule, predicting_layer

BIAS = Rule(CORE + "mlp.router.expert_bias", (HF + "mlp.gate.e_score_correction_bias",), shapes=("e",))
MIXTURE = (*mixture(), BIAS)
PREDICTING = "num_nextn_predict_layers"


def predicting(hf: HfConfig) -> tuple[Rule, ...]:
    """The layers for multi-token prediction, all mixtures."""
    count, after = hf.get(PREDICTING) or 0, hf["num_hidden_layers"]
    made = (predicting_layer((*attention(hf), *MIXTURE), number, after) for number in range(count))
    return tuple(rule for rules in made for rule in rules)


def repeated(hf: HfConfig) -> Mapping[str, str]:
    """Copies of embedding and output layer in each of these layers."""
    shared = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    places = range(hf["num_hidden_layers"], hf["num_hidden_layers"] + (hf.get(PREDICTING) or 0))
    return {f"model.layers.{n}.{copy}.weight": f"{name}.weight" for n in places for copy, name in shared.items()}


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
        "mtp_num_layers": lambda hf: hf.get(PREDICTING) or None,
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
    optional={PREDICTING: 0},
    copies=repeated,
    rules=lambda hf: (*layers(hf, MIXTURE), *predicting(hf)),
    tiny=MOE_MLA_TINY | {"num_experts_per_tok": 3, PREDICTING: 0},
)
