"""The forward pass with few calls: a model's own parameters, without the modules around them.

Each part of a layer has a lean version where its class is one of those in ``parts``, each layer where its order is one
of those below; any other part, or layer, is called as it is. So every model runs, and the common ones run fast.
Shape letters: t tokens, r of them whose logits are wanted, h hidden, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerLayer
from torch import Tensor

from megapatch.models.generation.linear import Linear, ModuleLinear
from megapatch.models.generation.parts import Pass, attention, inner, norm
from megapatch.models.layers.kv_cache import KeyValueCache
from megapatch.models.layers.parallel import ParallelLayer, SharedNormLayer
from megapatch.models.layers.sandwich import SandwichLayer


class Layer:
    """A layer whose order of parts is one of ``ORDERS``."""

    def __init__(self, module: Any, pack_for: int) -> None:
        self.first, self.second = norm(module.input_layernorm), norm(module.pre_mlp_layernorm)
        self.attention, self.inner = attention(module.self_attention, pack_for), inner(module.mlp, pack_for)
        self.after = [norm(getattr(module, name, None)) for name in AFTER]
        self.parts = *self.attention.parts, *self.inner.parts
        self.order = ORDERS[type(module)]

    def __call__(self, x: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        return self.order(self, x, given)


def _in_sequence(layer: Layer, x: Tensor, given: Pass) -> Tensor:
    x = layer.attention.added(layer.first(x), x, given)
    return layer.inner.added(layer.second(x), x, given)


def _side_by_side(layer: Layer, x: Tensor, given: Pass) -> Tensor:
    return layer.inner.added(layer.second(x), layer.attention.added(layer.first(x), x, given), given)


def _of_one_norm(layer: Layer, x: Tensor, given: Pass) -> Tensor:
    normed = layer.first(x)
    return layer.inner.added(normed, layer.attention.added(normed, x, given), given)


def _normed_after(layer: Layer, x: Tensor, given: Pass) -> Tensor:
    nothing = torch.zeros_like(x)
    x = x + layer.after[0](layer.attention.added(layer.first(x), nothing, given))
    return x + layer.after[1](layer.inner.added(layer.second(x), nothing, given))


AFTER = "post_self_attn_layernorm", "post_mlp_layernorm"
ORDERS: dict[type, Callable[[Layer, Tensor, Pass], Tensor]] = {
    TransformerLayer: _in_sequence,
    ParallelLayer: _side_by_side,
    SharedNormLayer: _of_one_norm,
    SandwichLayer: _normed_after,
}


class ModuleLayer:
    """A layer as it is."""

    parts: tuple[Linear | ModuleLinear, ...] = ()

    def __init__(self, module: Any, pack_for: int) -> None:
        self.module = module

    def __call__(self, x: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        out, _ = self.module(x[:, None], None, inference_context=given.cache, rotary_pos_emb=given.table)
        return out[:, 0]


class LeanExecutor:
    """A whole model in one process, or its parts of tensor parallelism without cut sequences."""

    name = "lean"

    def __init__(self, model: Any, pack_for: int) -> None:
        self.model = model
        self.layers = [
            (Layer if type(layer) in ORDERS else ModuleLayer)(layer, pack_for) for layer in model.decoder.layers
        ]
        self.kept = [layer.self_attention.kept for layer in model.decoder.layers]
        self.norm = norm(model.decoder.final_layernorm)
        self.head = self._head(pack_for)
        self.parts: list[Linear | ModuleLinear] = [part for layer in self.layers for part in layer.parts]
        self.parts += [self.head] if self.head else []

    @staticmethod
    def fits(chunks: list[Any]) -> bool:
        """Whether all layers are here, and of all tokens."""
        config = chunks[0].config
        return config.pipeline_model_parallel_size == 1 and not config.sequence_parallel

    def _head(self, pack_for: int) -> Linear | None:
        """The output layer; None where the module does more than a product."""
        model, module = self.model, self.model.output_layer
        if type(module) is not ColumnParallelLinear:
            return None
        tied = model.share_embeddings_and_output_weights
        return Linear(model.shared_embedding_or_output_weight() if tied else module.weight, module.bias, None, pack_for)

    @property
    def copy_bytes(self) -> int:
        """As Executor.copy_bytes."""
        return sum(part.copy_bytes for part in self.parts)

    def refresh(self) -> None:
        """Pack weights that have changed."""
        for part in self.parts:
            part.refresh()

    def forward(self, ids: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """Tokens and positions [1, t] -> logits [r, v]."""
        model = self.model
        x = model.embedding(ids, positions)[:, 0]  # [t, h]
        table = None
        if model.position_embedding_type == "rope" and not model.config.multi_latent_attention:
            table = model.rotary_pos_emb(cache.max_sequence_length, packed_seq=False, cp_group=None)  # as core calls it
        given = Pass(cache, table, x.dtype)
        for layer in self.layers:
            x = layer(x, given)
        x = self.norm(x[cache.wanted])
        if self.head is not None:
            return gather_from_tensor_model_parallel_region(self.head(x), group=model.output_layer.tp_group)
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        return model.output_layer(x[:, None], weight=weight, runtime_gather_output=True)[0][:, 0]
