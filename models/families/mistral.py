"""Mistral 7B and Nemo: Llama with sliding windows (version 0.1; those after it have none)."""

from megapatch.models.family import TINY, Family, HfConfig
from megapatch.models.rules import attention, dense_mlp, embeddings


def window(hf: HfConfig) -> tuple[int, int] | None:
    """Keys before and after that a query sees; a config.json that does not say has version 0.1's."""
    keys = hf.get("sliding_window", 4096)
    return (keys - 1, 0) if keys else None


FAMILY = Family(
    model_type="mistral",
    reads={"window_size": window},
    only={"hidden_act": "silu", "layer_types": None},
    windows=True,
    rules=lambda hf: (*embeddings(), *attention(), *dense_mlp()),
    tiny=TINY | {"sliding_window": 16, "head_dim": 16},
)
