"""Layers for multi-token prediction: after the decoder, each predicts one token further."""

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)

from megapatch.models.layers import spec


def block_spec(
    config: TransformerConfig, modules: spec.Modules, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers, of the kind of the decoder's last one; None where this stage (its chunk ``vp_stage``) has none."""
    count, norm = get_mtp_num_layers_to_build(config, vp_stage), spec.norm_class(config, modules)
    if count == 0:
        return None
    mixture = spec.mixture_layers(config)[-1]
    layer = (modules.layer_spec or spec.layer_spec)(config, mixture, modules)
    if mixture:
        layer.submodules.mlp.submodules.router = modules.router
    parts = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        eh_proj=LocalSpecProvider().column_parallel_linear(),
        transformer_layer=layer,
        layer_norm=norm,
    )
    return MultiTokenPredictionBlockSubmodules([ModuleSpec(module=MultiTokenPredictionLayer, submodules=parts)] * count)
