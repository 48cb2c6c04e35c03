"""Multi-head latent attention (DeepSeek-V2, V3) without Transformer Engine, also with a memory for generation.

megatron-core 0.16.1 cannot build it from its local layers: its core attention knows heads of one size only; with
tensor parallelism its column-parallel projections give each process only its own heads' share of the gradient of the
rotated part of the keys, which all heads use. In generation what is kept of a token is the latent vector and the
rotated part of its key, not the keys and values of all heads, and the up-projections are applied to queries and outputs
instead: the same sums in another order.
Shape letters: s sequence, b batch, n query heads of this process, c size of the latent vector, p of what it is of keys,
r rotated part of a key, w a head's value.
"""

from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor

from megapatch.models.layers import spec
from megapatch.models.layers.attention import SdpaAttention, bounds_of
from megapatch.models.layers.kv_cache import Kept, KeyValueCache
from megapatch.models.layers.norm import RMSNorm

LATENT_NORMS = {  # our modules -> the checkpoint's names, those of Transformer Engine
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class LatentNorm(RMSNorm):
    """The norm of a latent vector: its epsilon is 1e-6 in transformers whatever rms_norm_eps says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(config, hidden_size, eps=1e-6)


class LatentCoreAttention(SdpaAttention):
    """Values of smaller heads than queries and keys: widened by zeros, as fused kernels take one size only; but not
    in fp32, whose logits then depart from the models' own by more than 1e-5."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flash = None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        wide = v if v.dtype == torch.float32 else F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
        return super()._attend(q, k, wide, visible, causal)[..., : v.shape[-1]]


class LatentAttention(MLASelfAttention):
    """megatron-core's modules and weights; queries, keys and values, and generation, are ours."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """[s, b, h] -> q, k [s, b, n, p+r], v [s, b, n, w], without b when packed; and two that nobody reads."""
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, packed_seq_params)
        table, scale = self._table(length, packed=packed_seq_params is not None)
        latent, rotated = self._latent(hidden_states)
        rotated = copy_to_tensor_model_parallel_region(rotated)  # its gradient is the sum over all heads
        if self.config.sequence_parallel:
            latent = scatter_to_sequence_parallel_region(latent)
        up = partial(self._up, table=table, scale=scale, packed=packed_seq_params)
        given = self._query_latent(hidden_states), latent, rotated
        if self.recompute_up_proj and self.training:
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8)  # upstream drops its output
            query, key, value = self.qkv_up_checkpoint.checkpoint(up, *given)
        else:
            query, key, value = up(*given)
        return query, key, value, None, None

    def _up(
        self,
        query: Tensor,
        latent: Tensor,
        rotated: Tensor,
        *,
        table: Tensor,
        scale: float,
        packed: PackedSeqParams | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``_query_latent`` and ``_latent`` give -> q, k [s, b, n, p+r], v [s, b, n, w], each with its memory."""
        query = self._up_query(query)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        up = up.view(*up.shape[:2], self.num_attention_heads_per_partition, -1)
        bounds = None
        if packed is not None:
            query, up, rotated = (x.squeeze(1) for x in (query, up, rotated))
            bounds = bounds_of(packed)
        part, value = up.split([self.config.qk_head_dim, self.config.v_head_dim], dim=-1)
        query, rotated = self._rotate(query, table, scale, bounds), self._rotate(rotated, table, scale, bounds)
        key = torch.cat([part, rotated.expand(*part.shape[:-1], -1)], dim=-1)
        return query, key, value.contiguous()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: KeyValueCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias to add; with a cache, b is 1 and s are tokens of several sequences."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, both = self._query(hidden_states), self._whole(self.linear_kv_down_proj, hidden_states)
        out = self.attend_latent(query[:, 0], both[:, 0], inference_context)
        return self.linear_proj(out[:, None])

    def attend_latent(self, query: Tensor, both: Tensor, cache: KeyValueCache) -> Tensor:
        """q [t, n, p+r], latent vectors and parts to be rotated [t, c+r] -> [t, n*w]; what is new is remembered."""
        config, count = self.config, cache.num_tokens
        table, scale = self._table(cache.max_sequence_length, packed=False)
        latent, rotated = both[:, None, None].split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        query, rotated = (self._rotate(x, cache.rotary(table), scale)[:, 0] for x in (query[:, None], rotated))
        latent = self.kv_layernorm(latent[:, 0])  # [t, 1, c]
        weight = self.linear_kv_up_proj.weight.view(query.shape[1], -1, config.kv_lora_rank)  # [n, p+w, c]
        of_keys, of_values = weight.split([config.qk_head_dim, config.v_head_dim], dim=1)
        part, turned = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        query = torch.cat([torch.einsum("tnp,npc->tnc", part, of_keys), turned], dim=-1)
        key = torch.cat([latent, rotated], dim=-1)
        out = cache.attend_tokens(self.kept, query[:count], key[:count], None, self.softmax_scale)  # [t, n*c]
        out = torch.einsum("tnc,nwc->tnw", out.unflatten(-1, (query.shape[1], -1)), of_values)
        return F.pad(out.flatten(1), (0, 0, 0, len(query) - count))

    @cached_property
    def kept(self) -> Kept:
        """What a KeyValueCache remembers of a token: its latent vector, the values too, and the rotated part."""
        config = self.config
        size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        return Kept(self.layer_number, 1, size, config.kv_lora_rank, shared=True)

    def _query(self, hidden: Tensor) -> Tensor:
        """[s/tp, b, h] -> [s, b, n, p+r]"""
        return self._up_query(self._query_latent(hidden))

    def _query_latent(self, hidden: Tensor) -> Tensor:
        """[s/tp, b, h] -> latent vectors of queries before their norm; ``hidden`` where there are none"""
        if self.config.q_lora_rank is None:
            return hidden
        latent = self._whole(self.linear_q_down_proj, hidden)
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent

    def _up_query(self, latent: Tensor) -> Tensor:
        """What ``_query_latent`` gives -> [s, b, n, p+r]"""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(latent)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(latent))
        return query.view(*query.shape[:2], self.num_attention_heads_per_partition, self.q_head_dim)

    def _latent(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[s/tp, b, h] -> latent vectors [s, b, c] before their norm, parts of keys to be rotated [s, b, 1, r]"""
        both = self._whole(self.linear_kv_down_proj, hidden)
        latent, rotated = both.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return latent, rotated[:, :, None]

    def _whole(self, linear: Any, hidden: Tensor) -> Tensor:
        """[s/tp, b, h] -> the column-parallel layer's whole output, [s, b, ...], on every process"""
        return gather_from_tensor_model_parallel_region(linear(hidden)[0], group=self.tp_group)

    def _table(self, length: int, *, packed: bool) -> tuple[Tensor, float]:
        """Rotary angles [length, 1, 1, r], only of this process's share with --cp; the factor on cosines and sines."""
        found = self.rotary_pos_emb(length, packed_seq=packed)
        return found if isinstance(found, tuple) else (found, 1.0)

    def _rotate(self, x: Tensor, angles: Tensor, scale: float, bounds: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., d] with its last r dimensions rotated, pairs of neighbours together."""
        part, rotated = x.split([x.shape[-1] - angles.shape[-1], angles.shape[-1]], dim=-1)
        rotated = apply_rotary_pos_emb(
            rotated, angles, config=self.config, cu_seqlens=bounds, mscale=scale, cp_group=self.pg_collection.cp
        )
        return torch.cat([part, rotated], dim=-1)


def layer_spec(config: TransformerConfig, moe: bool, modules: "spec.Modules") -> ModuleSpec:
    """One transformer layer with latent attention."""
    backend, made = LocalSpecProvider(), spec.layer_spec(config, moe, modules)
    linear = backend.column_parallel_linear()
    attention = MLASelfAttentionSubmodules(
        linear_q_proj=linear,
        linear_q_down_proj=linear,
        linear_q_up_proj=linear,
        linear_kv_down_proj=linear,
        linear_kv_up_proj=linear,
        core_attention=LatentCoreAttention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=LatentNorm,
        kv_layernorm=LatentNorm,
    )
    made.submodules.self_attention = ModuleSpec(
        module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
    )
    made.submodules.sharded_state_dict_keys_map = LATENT_NORMS if moe else LATENT_NORMS | spec.MLP_NORM
    return made
