"""How much work training is: model FLOPs per token, and the peak of known devices. Imports no torch."""

from types import SimpleNamespace
from typing import Any

from megapatch.models.family import HfConfig, find

PEAKS = {  # device name, as torch tells it, begins with -> TFLOP/s in bf16, dense; NVIDIA's data sheets of each
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 80GB HBM3": 989.5,  # SXM
    "NVIDIA H200": 989.5,  # SXM
    "NVIDIA H200 NVL": 835.5,
}


DEFAULTS: dict[str, Any] = {  # of megatron-core 0.16.1, for fields that a family may leave out
    "gated_linear_unit": False,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_layer_freq": 1,
    "mtp_num_layers": None,
    "q_lora_rank": None,
    "qk_layernorm": False,
}


def sizes_of(hf: HfConfig, predicting: bool) -> Any:
    """The fields of config.json's model, with its layers for multi-token prediction or without."""
    fields = DEFAULTS | find(hf).transformer_config(hf)
    return SimpleNamespace(**fields | ({} if predicting else {"mtp_num_layers": None}))


def mixtures(sizes: Any) -> int:
    """How many layers are mixtures of experts."""
    if not sizes.num_moe_experts:
        return 0
    pattern = sizes.moe_layer_freq
    return sum(map(bool, pattern)) if isinstance(pattern, list) else sizes.num_layers


def flops_per_token(
    config: Any, vocab_size: int, seq_length: int, moe_layers: int, adapters: int | None = None
) -> float:
    """Model FLOPs per trained token: forward and backward (3x), matrix products only, causal attention counted half.

    ``config`` is a TransformerConfig or ``sizes_of``. Counts what the model needs, not what is recomputed. A
    multiply-add is 2 FLOPs. With so many numbers in ``adapters`` the other weights need no gradients (2x).
    """
    h = config.hidden_size
    matrices = 3 if config.gated_linear_unit else 2
    dense = matrices * h * config.ffn_hidden_size
    active = (config.moe_ffn_hidden_size or 0) * config.moe_router_topk  # feed-forward width that a token meets
    active += config.moe_shared_expert_intermediate_size or 0
    gates = (config.num_moe_experts or 0) + int(config.moe_shared_expert_gate)
    experts = h * gates + matrices * h * active
    projections, scores = _attention(config, seq_length)
    further = config.mtp_num_layers or 0  # layers that predict a later token
    weights = config.num_layers * projections + (config.num_layers - moe_layers) * dense + moe_layers * experts
    weights += h * vocab_size
    weights += further * (2 * h * h + projections + (experts if moe_layers else dense) + h * vocab_size)
    scores *= config.num_layers + further
    if adapters is None:
        return 2 * 3 * (weights + scores)
    return 2 * (2 * weights + 3 * scores + 3 * adapters)


def _attention(config: Any, seq_length: int) -> tuple[float, float]:
    """Multiply-adds of a layer for a token, which sees half of the sequence: by its weights; q k^T and scores v."""
    h, heads, groups, size = config.hidden_size, config.num_attention_heads, config.num_query_groups, config.kv_channels
    if not config.multi_latent_attention:
        return 2 * h * size * (heads + groups), heads * size * seq_length
    value, latent, rank = config.v_head_dim, config.kv_lora_rank, config.q_lora_rank
    query = h * heads * size if rank is None else rank * (h + heads * size)
    keys = h * (latent + config.qk_pos_emb_head_dim) + latent * heads * (config.qk_head_dim + value)
    return query + keys + h * heads * value, heads * (size + value) * seq_length / 2


def known_peak(device_name: str, precision: str) -> float | None:
    """TFLOP/s that one such device can do at best, None where no figure is known."""
    found = [name for name in PEAKS if device_name.startswith(name)]
    return PEAKS[max(found, key=len)] if found and precision == "bf16" else None
