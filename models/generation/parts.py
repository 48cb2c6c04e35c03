"""Parts of a layer with few calls: a model's own parameters, without the modules around them.

Each class below says which modules it fits, as megatron-core and megapatch.models make them; any other is called as it
is. All add what they give to a residual.
Shape letters: t tokens, h hidden, g key-value heads, q query heads of each, d head size, f feed-forward, e experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megapatch.models.generation.linear import Linear, ModuleLinear, linear
from megapatch.models.layers.attention import SdpaAttention
from megapatch.models.layers.kv_cache import CachedSelfAttention, Kept, KeyValueCache
from megapatch.models.layers.mla import LatentAttention
from megapatch.models.layers.norm import LayerNorm, RMSNorm


class Pass:
    """What all layers use of one pass: the cache, and the rotary angles of its tokens."""

    def __init__(self, cache: KeyValueCache, table: Tensor | None, dtype: torch.dtype) -> None:
        self.cache, self.table = cache, table
        if table is not None:
            angles = cache.rotary(table)[:, 0, :, None]  # [t, 1, 1, r]
            self.cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            half = sin.shape[-1] // 2
            self.sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)

    def turn(self, x: Tensor) -> None:
        """Rotate the first r dimensions of [t, g, n, d], halves against each other, in place."""
        x = x[..., : self.cos.shape[-1]]
        half = x.shape[-1] // 2
        other = torch.cat([x[..., half:], x[..., :half]], -1)
        x.mul_(self.cos).addcmul_(other, self.sin)


def norm(module: Any) -> Callable[[Tensor], Tensor]:
    """The function of a norm."""
    if type(module) is RMSNorm:
        return lambda x: F.rms_norm(x, module.weight.shape, module.weight, module.eps)
    if type(module) is LayerNorm:
        return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    return lambda x: module(x)


class Attention:
    """megatron-core's self-attention with our cache: heads in groups, rotated, normed or not."""

    def __init__(self, module: Any, pack_for: int) -> None:
        config = module.config
        self.kept: Kept = module.kept
        self.qkv, self.out = linear(module.linear_qkv, pack_for), linear(module.linear_proj, pack_for)
        self.parts = self.qkv, self.out
        self.groups, self.size = self.kept.heads, module.hidden_size_per_attention_head
        self.scale = config.softmax_scale or self.size**-0.5
        self.interleaved = config.rotary_interleaved
        norms = module.q_layernorm, module.k_layernorm
        self.norms = None if all(isinstance(n, IdentityOp | None) for n in norms) else [norm(n) for n in norms]
        self.module = module

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is one of those."""
        config = module.config
        whole = config.num_query_groups % config.tensor_model_parallel_size == 0
        plain = type(module) is CachedSelfAttention and type(module.core_attention) is SdpaAttention
        return plain and whole and not config.attention_output_gate

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        mixed = self.qkv(x).unflatten(-1, (self.groups, -1, self.size))  # [t, g, q+2, d]
        query, key = mixed[:, :, :-2], mixed[:, :, -2:-1]
        if self.norms:
            query.copy_(self.norms[0](query))
            key.copy_(self.norms[1](key))
        if given.table is not None:
            if self.interleaved:
                self._turn_pairs(mixed[:, :, :-1], given.cache.rotary(given.table))
            else:
                given.turn(mixed[:, :, :-1])
        out = given.cache.attend_tokens(self.kept, query.flatten(1, 2), key[:, :, 0], mixed[:, :, -1], self.scale)
        return self.out.added(out, residual)

    def _turn_pairs(self, x: Tensor, angles: Tensor) -> None:
        """Rotate [t, g, n, d], neighbours against each other, in place."""
        group = self.module.pg_collection.cp
        heads = x.flatten(1, 2)[:, None]
        turned = apply_rotary_pos_emb(heads, angles, config=self.module.config, cp_group=group)
        x.copy_(turned[:, 0].unflatten(1, x.shape[1:3]))


class Latent:
    """Latent attention of one process: what is kept of a token is its latent vector and the rotated part of its key."""

    def __init__(self, module: Any, pack_for: int) -> None:
        self.module, self.kept = module, module.kept
        queries = [module.linear_q_proj] if module.config.q_lora_rank is None else _query_layers(module)
        self.query = [linear(one, pack_for) for one in queries]
        self.down, self.out = linear(module.linear_kv_down_proj, pack_for), linear(module.linear_proj, pack_for)
        self.parts = *self.query, self.down, self.out

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is one of those."""
        return type(module) is LatentAttention and module.config.tensor_model_parallel_size == 1

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        query = self.query[0](x)
        if len(self.query) > 1:
            query = self.query[1](self.module.q_layernorm(query))
        query = query.unflatten(-1, (self.module.num_attention_heads_per_partition, -1))
        return self.out.added(self.module.attend_latent(query, self.down(x), given.cache), residual)


def _query_layers(module: Any) -> list[Any]:
    return [module.linear_q_down_proj, module.linear_q_up_proj]


class FeedForward:
    """Two linear layers and an activation, gated by silu or none."""

    def __init__(self, module: Any, pack_for: int) -> None:
        self.up, self.down = linear(module.linear_fc1, pack_for), linear(module.linear_fc2, pack_for)
        self.parts = self.up, self.down
        self.activation = _swiglu if module.config.gated_linear_unit else module.config.activation_func

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is one of those."""
        config = module.config
        known = not config.gated_linear_unit or config.activation_func is F.silu
        changed = config.activation_func_clamp_value is not None or config.glu_linear_offset
        return type(module) in (MLP, SharedExpertMLP) and known and not changed

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        return self.down.added(self.activation(self.up(x)), residual)

    def weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        """[t, h] -> [t, h], each token's share of an expert by its weight [t, 1]."""
        inner = self.activation(self.up(x))
        return self.down((inner * weights).to(inner.dtype))


def _swiglu(x: Tensor) -> Tensor:
    """[t, 2f] -> [t, f]"""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


class Experts:
    """A mixture of experts that are all here: each reads the tokens that are routed to it."""

    def __init__(self, module: Any, pack_for: int) -> None:
        self.router = module.router
        self.experts = [FeedForward(expert, pack_for) for expert in module.experts.local_experts]
        shared = module.shared_experts if module.use_shared_expert else None
        self.shared = FeedForward(shared, pack_for) if shared is not None else None
        self.gate = getattr(shared, "gate_weight", None)
        every = [*self.experts, *([self.shared] if self.shared else [])]
        self.parts = tuple(part for one in every for part in one.parts)

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether it is one of those."""
        config = module.config
        here = config.expert_model_parallel_size == 1 and config.expert_tensor_parallel_size == 1
        one = here and config.tensor_model_parallel_size == 1
        special = config.moe_latent_size or config.moe_apply_probs_on_input or config.moe_expert_capacity_factor
        plain = type(module) is MoELayer and type(module.experts) is SequentialMLP and not special
        if not (plain and one):
            return False
        shared = [module.shared_experts] if module.use_shared_expert else []
        return all(FeedForward.fits(part) for part in [*module.experts.local_experts, *shared])

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        weights, chosen = self.router(x[:, None])  # [t, e], [t, e]
        out = self._shared(x, residual, given)
        tokens = chosen.t().nonzero()[:, 1]  # of the first expert, of the second, ...
        for expert, rows in enumerate(tokens.split(chosen.sum(0).tolist())):
            if len(rows):
                part = self.experts[expert].weighted(x[rows], weights[rows, expert, None])
                out.index_add_(0, rows, part.to(out.dtype))
        return out

    def _shared(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        if self.shared is None:
            return residual.clone()
        if self.gate is None:
            return self.shared.added(x, residual, given)
        return residual + self.shared.added(x, torch.zeros_like(x), given) * F.linear(x, self.gate).sigmoid()


class ModulePart:
    """A part of a layer as it is."""

    parts: tuple[Linear | ModuleLinear, ...] = ()

    def __init__(self, module: Any, pack_for: int) -> None:
        self.module = module

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        out, bias = self.module(x[:, None])
        return residual + (out if bias is None else out + bias)[:, 0]


class ModuleAttention(ModulePart):
    """Self-attention as it is."""

    def added(self, x: Tensor, residual: Tensor, given: Pass) -> Tensor:
        """[t, h] -> [t, h]"""
        out, bias = self.module(x[:, None], None, inference_context=given.cache, rotary_pos_emb=given.table)
        return residual + (out if bias is None else out + bias)[:, 0]


ATTENTION = Attention, Latent
INNER = FeedForward, Experts


def attention(module: Any, pack_for: int) -> Any:
    """The lean version of a layer's attention, or the module."""
    return next((kind for kind in ATTENTION if kind.fits(module)), ModuleAttention)(module, pack_for)


def inner(module: Any, pack_for: int) -> Any:
    """The lean version of a layer's feed-forward, or the module."""
    return next((kind for kind in INNER if kind.fits(module)), ModulePart)(module, pack_for)
