"""Layer specs: Transformer Engine's where the device has it, else ours on megatron-core's own linear layers.

Both store checkpoints under the same names (those of Transformer Engine), so a checkpoint moves between them. A family
with modules of its own (``Family.modules``) has our spec everywhere.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megapatch.models.layers.attention import SdpaAttention
from megapatch.models.layers.kv_cache import CachedSelfAttention
from megapatch.models.layers.norm import NORMS
from megapatch.models.layers.router import Router

ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}  # dense layers only, as Transformer Engine fuses them


@dataclass(frozen=True)
class Modules:
    """What a family puts in the place of the modules below."""

    layer: Any = TransformerLayer
    norm: Any = None  # of layers and heads, and the final one; None: by config.normalization
    core_attention: Any = SdpaAttention
    router: Any = Router
    layer_spec: Callable[..., ModuleSpec] | None = (
        None  # (config, moe, modules) -> spec, where ``layer_spec`` is no base
    )
    adapt: tuple[Callable[..., None], ...] = ()  # each is called with a new GPTModel and config.json

    @property
    def special(self) -> bool:
        """True when Transformer Engine's spec does not hold for the layers."""
        return self != Modules(adapt=self.adapt, router=self.router)


def resolve(names: Mapping[str, str]) -> Modules:
    """Slot -> "module:name" in megapatch.models.layers; ``adapt`` may be several, separated by blanks."""
    found = {slot: tuple(map(_named, text.split())) for slot, text in names.items()}
    chosen: dict[str, Any] = {slot: values if slot == "adapt" else values[0] for slot, values in found.items()}
    return Modules(**chosen)


def _named(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(f"megapatch.models.layers.{module}"), name)


def block_spec(
    config: TransformerConfig, modules: Modules, transformer_engine: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of its chunk ``vp_stage``), and the final norm."""
    if transformer_engine and not modules.special:
        from megatron.core.extensions.transformer_engine import TENorm

        layers, norm = get_gpt_decoder_layer_specs(config, use_transformer_engine=True), TENorm
        for layer in layers:
            if layer.submodules.self_attention.module is SelfAttention:
                layer.submodules.self_attention.module = CachedSelfAttention
    else:
        make = modules.layer_spec or layer_spec
        layers = [make(config, moe, modules) for moe in mixture_layers(config)]
        norm = norm_class(config, modules)
    for layer, mixture in zip(layers, mixture_layers(config), strict=True):
        if mixture:
            layer.submodules.mlp.submodules.router = modules.router
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    stop = start + get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers[start:stop], layer_norm=norm)


def norm_class(config: TransformerConfig, modules: Modules) -> Any:
    """The norm of the layers."""
    return modules.norm or NORMS[config.normalization]


def mixture_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model, whether it is a mixture of experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    pattern = config.moe_layer_freq
    return [bool(kind) for kind in pattern] if isinstance(pattern, list) else [True] * config.num_layers


def layer_spec(config: TransformerConfig, moe: bool, modules: Modules) -> ModuleSpec:
    """One transformer layer without Transformer Engine."""
    backend, norm = LocalSpecProvider(), norm_class(config, modules)
    head_norm = norm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=modules.core_attention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = get_mlp_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts if moe else None, moe_grouped_gemm=config.moe_grouped_gemm
    )
    return ModuleSpec(
        module=modules.layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=ATTENTION_NORM if moe else ATTENTION_NORM | MLP_NORM,
        ),
    )
