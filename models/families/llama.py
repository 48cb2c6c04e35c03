"""Llama 1, 2, 3, 3.1, 3.2, CodeLlama, Yi and DeepSeek LLM: grouped-query attention, RoPE, SwiGLU, RMSNorm.

Sizes that differ between releases come from config.json. Llama 3.2 1B and 3B tie the output layer to the embedding.
"""

from megapatch.models.family import TINY, Family
from megapatch.models.rules import attention, dense_mlp, embeddings

FAMILY = Family(
    model_type="llama",
    only={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    rules=lambda hf: (*embeddings(), *attention(), *dense_mlp()),
    tiny=TINY
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
)
