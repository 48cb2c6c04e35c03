"""Qwen3 dense: RMSNorm on each head of q and k, no biases, head size set apart from the hidden size."""

from megapatch.models.families.qwen2 import WINDOWS
from megapatch.models.family import TINY, Family
from megapatch.models.rules import attention, dense_mlp, embeddings

FAMILY = Family(
    model_type="qwen3",
    fixed={"qk_layernorm": True},
    reads=WINDOWS,
    only={"attention_bias": False, "hidden_act": "silu"},
    windows=True,
    rules=lambda hf: (*embeddings(), *attention(qk_norm=True), *dense_mlp()),
    tiny=TINY | {"head_dim": 16, "tie_word_embeddings": True},
)
