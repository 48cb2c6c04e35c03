"""Which attention kernel a run has, and why: Transformer Engine, flash-attn, a fused kernel of PyTorch, or none."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megapatch.models.device import Device, installed
from megapatch.models.layers.attention import SdpaAttention

KERNELS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "the device's own"}  # torch's SDPBackend
UPGRADES = {"flash_attn_interface": "FA3", "flash_attn.cute": "FA4"}  # package: what torch calls its kernels
_PROBE = 64  # tokens


@dataclass(frozen=True)
class Choice:
    """An attention backend; ``fused``: it never builds the [s, s] scores."""

    name: str
    reason: str
    fused: bool = True


def upgrade(device: Device) -> str | None:
    """Have PyTorch's attention use the newest flash-attention that is installed; its name, None without one."""
    if device.backend != "nccl":
        return None
    for package, name in UPGRADES.items():
        if installed(package.partition(".")[0]) and installed(package):
            torch.nn.attention.activate_flash_attention_impl(name)
            return name
    return None


def choose(config: TransformerConfig, models: list[Any], device: Device) -> Choice:
    """The backend of the layers of a model that is built."""
    ours = [module for model in models for module in model.modules() if isinstance(module, SdpaAttention)]
    if not ours and device.transformer_engine:
        return Choice("Transformer Engine", "its package is installed, and the layers are its")
    why = "the layers of this run are not Transformer Engine's" if device.transformer_engine else device.no_engine
    if any(module.flash is not None for module in ours):
        return Choice("flash-attn", f"no Transformer Engine ({why}); flash-attn is installed")
    newest = upgrade(device)
    dropout = config.attention_dropout
    kernel = KERNELS.get(_kernel(config, device, dropout), "unknown")
    reason = f"no Transformer Engine ({why})" + (f"; {newest} is installed" if newest else "")
    if kernel != "math":
        return Choice(f"PyTorch SDPA, {kernel} kernel", reason)
    cause = "with attention dropout" if dropout and _kernel(config, device, 0.0) != 0 else "for these heads"
    return Choice("PyTorch SDPA, unfused (math)", f"{reason}; PyTorch has no fused kernel here {cause}", fused=False)


def _kernel(config: TransformerConfig, device: Device, dropout: float) -> int:
    """PyTorch's own choice for a causal attention of this model's heads."""
    heads, groups, size = config.num_attention_heads, config.num_query_groups, config.kv_channels
    assert heads is not None and groups is not None and size is not None
    wide = size  # of values
    if isinstance(config, MLATransformerConfig):
        groups, size = heads, config.qk_head_dim + config.qk_pos_emb_head_dim
        wide = config.v_head_dim if config.params_dtype == torch.float32 else size  # values are widened to it
    made = {"dtype": config.params_dtype, "device": device.torch, "requires_grad": True}
    query = torch.empty(1, heads, _PROBE, size, **made)
    key, value = (torch.empty(1, groups, _PROBE, width, **made) for width in (size, wide))
    return int(torch._fused_sdp_choice(query, key, value, None, dropout, True, enable_gqa=heads != groups))
