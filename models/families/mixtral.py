"""Mixtral 8x7B and 8x22B: mixture of experts in every layer, top-2 router, no biases."""

from megapatch.models.family import MOE_FIXED, MOE_READS, TINY, Family
from megapatch.models.rules import attention, embeddings, moe_mlp

FAMILY = Family(
    model_type="mixtral",
    fixed=MOE_FIXED,
    reads=MOE_READS
    | {
        "moe_ffn_hidden_size": "intermediate_size",
        "window_size": lambda hf: (hf["sliding_window"] - 1, 0) if hf.get("sliding_window") else None,
    },
    only={"hidden_act": "silu", "router_jitter_noise": 0.0, "layer_types": None},
    windows=True,  # use_sliding_window is not read
    rules=lambda hf: (*embeddings(), *attention(), *moe_mlp("block_sparse_moe", ("w1", "w3", "w2"))),
    tiny=TINY | {"num_local_experts": 4, "num_experts_per_tok": 2},
)
