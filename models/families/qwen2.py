"""Qwen1.5, Qwen2, Qwen2.5 and QwQ: dense, a bias on q, k and v only; some layers may have sliding windows."""

from megapatch.models.family import TINY, Family, HfConfig, Source, UserError
from megapatch.models.rules import attention, dense_mlp, embeddings

WINDOW, WITHOUT = 4096, 28  # of a config.json that does not say


def windowed(hf: HfConfig) -> list[int]:
    """1 for each layer with a sliding window, 0 for each that sees everything; all 0 are an empty list."""
    switched = hf.get("use_sliding_window", False) and hf.get("sliding_window", WINDOW) is not None
    first = hf.get("max_window_layers", WITHOUT) if switched else hf["num_hidden_layers"]
    by_number = ["full_attention"] * first + ["sliding_attention"] * (hf["num_hidden_layers"] - first)
    kinds = hf.get("layer_types") or by_number[: hf["num_hidden_layers"]]
    if unknown := set(kinds) - {"full_attention", *(["sliding_attention"] if switched else [])}:
        raise UserError(f"config.json: layer_types has {min(unknown)}; without sliding windows it must not")
    found = [int(kind == "sliding_attention") for kind in kinds]
    return found if any(found) else []


WINDOWS: dict[str, Source] = {
    "window_size": lambda hf: (hf.get("sliding_window", WINDOW) - 1, 0) if windowed(hf) else None,
    "window_attn_skip_freq": lambda hf: windowed(hf) or None,
}
FAMILY = Family(
    model_type="qwen2",
    fixed={"add_qkv_bias": True},
    reads=WINDOWS,
    only={"hidden_act": "silu"},
    windows=True,
    rules=lambda hf: (*embeddings(), *attention(bias=True), *dense_mlp()),
    tiny=TINY,
)
