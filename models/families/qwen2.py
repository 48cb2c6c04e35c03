"""Qwen2, Qwen2.5 and QwQ: dense decoder with a bias on q, k and v only."""

from megapatch.models.family import TINY, Family
from megapatch.models.rules import attention, dense_mlp, embeddings

FAMILY = Family(
    model_type="qwen2",
    fixed={"add_qkv_bias": True},
    only={"use_sliding_window": False, "hidden_act": "silu"},
    rules=lambda hf: (*embeddings(), *attention(bias=True), *dense_mlp()),
    tiny=TINY,
)
