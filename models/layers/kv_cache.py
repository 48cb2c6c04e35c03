"""Attention with a memory: keys and values of the sequences being generated, kept after the rotary embedding.

The tokens of all sequences lie one after another, as a sequence of one batch row. So prompts of different lengths need
no padding, experts see no padding, and sequence parallelism cuts a step of single tokens as it cuts a prompt.
Shape letters: t tokens of this pass, r sequences of this pass, m positions kept, n query heads of this process,
g key-value heads of this process, d head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megapatch.models.layers.alibi import AlibiAttention
from megapatch.models.layers.attention import blocks, visible_keys, window_of

_GROWTH = 1.5


class KeyValueCache(BaseInferenceContext):
    """What the layers remember of ``slots`` sequences, and which tokens of them the next forward pass brings."""

    def __init__(self, slots: int, max_sequence_length: int, device: torch.device, multiple: int = 1) -> None:
        """``multiple``: the number of tokens of a pass is rounded up to it (the size of sequence parallelism)."""
        super().__init__(materialize_only_last_token_logits=True)
        self.max_sequence_length = max_sequence_length  # megatron-core makes rotary embeddings for so many positions
        self.slots, self.device, self.multiple = slots, device, multiple
        self.capacity = 0  # positions that the buffers have room for
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer number -> keys, values [slots, g, capacity, d]
        self.masks: dict[int | None, Tensor] = {}  # by the number of keys that a token sees
        self._rotary: Tensor | None = None

    def is_static_batching(self) -> bool:
        """False: megatron-core then asks ``last_token_logits`` which tokens need logits."""
        return False

    def is_decode_only(self) -> bool:
        """True when every sequence of this pass brings one token and has a past."""
        return self.decoding

    def prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Announce whole prompts of these lengths for these slots; returns the positions [1, t] of their tokens."""
        self.decoding, self.rows, self.lengths = False, list(slots), list(lengths)
        positions = torch.cat([torch.arange(n) for n in lengths])
        return self._announce(positions, torch.tensor(lengths).cumsum(0) - 1, max(lengths))

    def decode(self, lengths: Sequence[int]) -> Tensor:
        """Announce one token for each of the first slots, which hold ``lengths`` positions; returns positions."""
        self.decoding, self.rows = True, list(range(len(lengths)))
        positions = torch.tensor(lengths)
        places = self._announce(positions, torch.arange(len(lengths)), max(lengths) + 1)
        self.at = positions.to(self.device)
        self.length, self.masks = max(lengths) + 1, {}
        self.index = torch.arange(len(lengths), device=self.device)
        return places

    def mask(self, window: int | None) -> Tensor:
        """Which positions a decoded token sees, since lengths differ: [r, 1, 1, m], 0 or -inf."""
        if window not in self.masks:
            visible = visible_keys(self.at[:, None], torch.arange(self.length, device=self.device), window)
            self.masks[window] = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        return self.masks[window][:, None, None]

    def _announce(self, positions: Tensor, last: Tensor, room: int) -> Tensor:
        self.num_tokens, self._rotary = len(positions), None
        if room > self.capacity:
            self._grow(room)
        padded = -(-len(positions) // self.multiple) * self.multiple
        self.last = last.to(self.device)
        self.positions = F.pad(positions, (0, padded - len(positions))).to(self.device)
        return self.positions[None]

    def _grow(self, room: int) -> None:
        assert room <= self.max_sequence_length, "the caller ends sequences that reach the longest length"
        self.capacity = min(self.max_sequence_length, max(room, int(self.capacity * _GROWTH)))
        for number, kept in self.layers.items():
            more = self.capacity - kept[0].shape[2]
            self.layers[number] = F.pad(kept[0], (0, 0, 0, more)), F.pad(kept[1], (0, 0, 0, more))

    def move(self, source: int, target: int) -> None:
        """Give slot ``target`` what slot ``source`` holds, so that the sequences in use stay the first ones."""
        for kept in self.layers.values():
            for tensor in kept:
                tensor[target].copy_(tensor[source])

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """[1, t, h] -> [r, h], the last token of each sequence (called by megatron-core's GPTModel)."""
        return hidden[0, self.last]

    def rotary(self, table: Tensor) -> Tensor:
        """Rotary angles of this pass's tokens, [t, 1, 1, d], from those of all positions, [max, 1, 1, d]."""
        if self._rotary is None:
            self._rotary = table[self.positions]
        return self._rotary

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """q [t, 1, n, d], k and v [t, 1, g, d] -> [t, 1, n*d]: remember k and v, and attend to what came before."""
        q, k, v = (x[: self.num_tokens, 0] for x in (query, key, value))
        if layer not in self.layers:
            shape = self.slots, k.shape[1], self.capacity, k.shape[2]
            self.layers[layer] = k.new_zeros(shape), v.new_zeros((*shape[:3], v.shape[2]))
        attend = self._decode if self.decoding else self._prefill
        out = attend(*self.layers[layer], q, k, v, scale, window)
        return F.pad(out, (0, 0, 0, len(self.positions) - self.num_tokens))[:, None]

    def _decode(
        self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q [r, n, d] -> [r, n*d]; the query heads of a key-value head are its rows: no copies of keys."""
        keys[self.index, :, self.at], values[self.index, :, self.at] = k, v
        rows, heads, size = k.shape
        out = F.scaled_dot_product_attention(
            q.reshape(rows, heads, -1, size),  # [r, g, n/g, d]
            keys[:rows, :, : self.length],
            values[:rows, :, : self.length],
            attn_mask=self.mask(window).to(q.dtype),
            scale=scale,
        )
        return out.flatten(1)

    def _prefill(
        self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q [t, n, d] -> [t, n*d], each prompt by itself."""
        outs = []
        for slot, *prompt in zip(self.rows, *(x.split(self.lengths) for x in (q, k, v)), strict=True):
            one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in prompt)  # [s, n, d] -> [1, n, s, d]
            keys[slot, :, : one_k.shape[2]], values[slot, :, : one_v.shape[2]] = one_k[0], one_v[0]
            for queries, seen, visible in blocks(one_q.shape[2], window, one_q.device):
                out = F.scaled_dot_product_attention(
                    one_q[:, :, queries],
                    one_k[:, :, seen],
                    one_v[:, :, seen],
                    attn_mask=visible,
                    is_causal=visible is None,
                    scale=scale,
                    enable_gqa=one_q.shape[1] != one_k.shape[1],
                )
                outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)


class CachedSelfAttention(SelfAttention):
    """megatron-core's SelfAttention, unchanged in training; given a KeyValueCache it attends to what that holds."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[t, 1, h] -> [t, 1, h] and the bias to add (t is cut over the processes by sequence parallelism)."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        assert not self.config.attention_output_gate, "a gate on the attention output is not supported"
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            angles = inference_context.rotary(rotary_pos_emb)
            query, key = (
                apply_rotary_pos_emb(x, angles, config=self.config, cp_group=self.pg_collection.cp)
                for x in (query, key)
            )
        scale = self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
        window, alibi = window_of(self.config, self.layer_number), isinstance(self.core_attention, AlibiAttention)
        if alibi:
            query, key, value = self.core_attention.with_places(query, key, value, inference_context.positions)
        out = inference_context.attend(self.layer_number, query, key, value, scale, window)
        return self.linear_proj(self.core_attention.without_places(out) if alibi else out)
