"""Attention with a memory: keys and values of the sequences being generated, kept after the rotary embedding.

The tokens of all sequences lie one after another, as a sequence of one batch row. So prompts of different lengths need
no padding, experts see no padding, and sequence parallelism cuts a step of single tokens as it cuts a prompt.
A layer with a window keeps a ring of that many positions. What keys were rotated by is in them, so their order in the
ring does not matter to a query that sees all of them.
Shape letters: t tokens of this pass, r sequences of this pass, m positions kept, n query heads of this process,
g key-value heads of this process, d head size, w size of a head's value.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megapatch.models.layers.alibi import AlibiAttention
from megapatch.models.layers.attention import blocks, window_of

_GROWTH = 1.5


class Kept(NamedTuple):
    """What is remembered of each token in one layer, by one process."""

    layer: int
    heads: int
    key_size: int
    value_size: int
    window: int | None = None  # how many positions back a token sees, itself included; None: all
    shared: bool = False  # the values are the first part of the keys

    @property
    def numbers(self) -> int:
        """Of one token."""
        return self.heads * (self.key_size + (0 if self.shared else self.value_size))

    def positions(self, length: int) -> int:
        """How many of a sequence's first ``length`` positions are kept."""
        return length if self.window is None else min(length, self.window)


class KeyValueCache(BaseInferenceContext):
    """What the layers remember of ``slots`` sequences, and which tokens of them the next forward pass brings."""

    def __init__(
        self, slots: int, max_sequence_length: int, device: torch.device, multiple: int = 1, whole: bool = False
    ) -> None:
        """``multiple``: the number of tokens of a pass is rounded up to it (the size of sequence parallelism).

        ``whole``: buffers have their last size from the beginning, so that none is ever there twice, to be enlarged.
        """
        super().__init__(materialize_only_last_token_logits=True)
        self.max_sequence_length = max_sequence_length  # megatron-core makes rotary embeddings for so many positions
        self.slots, self.device, self.multiple = slots, device, multiple
        self.capacity = max_sequence_length if whole else 0  # positions that the buffers have room for
        self.layers: dict[int, tuple[Kept, Tensor, Tensor]] = {}  # keys [slots, g, m, d], values [slots, g, m, w]
        self.masks: dict[int, Tensor] = {}  # by the number of positions
        self._rotary: Tensor | None = None

    def is_static_batching(self) -> bool:
        """False: megatron-core then asks ``last_token_logits`` which tokens need logits."""
        return False

    def is_decode_only(self) -> bool:
        """True when every sequence of this pass brings one token and has a past."""
        return self.decoding

    def read(
        self, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        """Announce so many further tokens for slots that hold ``starts``; returns their positions [1, t].

        ``wanted``: places among the tokens of this pass whose logits are needed.
        """
        self.decoding, self.slots_read = False, list(slots)
        self.starts, self.lengths = list(starts), list(lengths)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        return self._announce(positions, torch.tensor(wanted), max(ends))

    def decode(self, lengths: Sequence[int]) -> Tensor:
        """Announce one token for each of the first slots, which hold ``lengths`` positions; returns positions."""
        self.decoding, self.rows = True, len(lengths)
        self.length, self.masks = max(lengths) + 1, {}
        self.even = min(lengths) == max(lengths)
        positions = torch.tensor(lengths)
        places = self._announce(positions, torch.arange(len(lengths)), self.length)
        self.at, self.index = positions.to(self.device), torch.arange(len(lengths), device=self.device)
        return places

    def mask(self, positions: int) -> Tensor | None:
        """Which of the positions kept a decoded token sees, where lengths differ: [r, 1, 1, m], 0 or -inf."""
        if self.even:
            return None
        if positions not in self.masks:
            hidden = torch.arange(positions, device=self.device) > self.at[:, None]
            self.masks[positions] = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        return self.masks[positions][:, None, None]

    def _announce(self, positions: Tensor, wanted: Tensor, room: int) -> Tensor:
        self.num_tokens, self._rotary = len(positions), None
        if room > self.capacity:
            self._grow(room)
        padded = -(-len(positions) // self.multiple) * self.multiple
        self.wanted = wanted.to(self.device)
        self.positions = F.pad(positions, (0, padded - len(positions))).to(self.device)
        return self.positions[None]

    def _grow(self, room: int) -> None:
        assert room <= self.max_sequence_length, "the caller ends sequences that reach the longest length"
        self.capacity = min(self.max_sequence_length, max(room, int(self.capacity * _GROWTH)))
        for number, (kept, keys, values) in self.layers.items():
            more = kept.positions(self.capacity) - keys.shape[2]
            self.layers[number] = self._with_values(kept, F.pad(keys, (0, 0, 0, more)), values, more)

    @staticmethod
    def _with_values(kept: Kept, keys: Tensor, values: Tensor, more: int) -> tuple[Kept, Tensor, Tensor]:
        return kept, keys, keys[..., : kept.value_size] if kept.shared else F.pad(values, (0, 0, 0, more))

    def _buffers(self, kept: Kept, key: Tensor) -> tuple[Tensor, Tensor]:
        if kept.layer not in self.layers:
            room = self.slots, kept.heads, kept.positions(self.capacity)
            keys = key.new_zeros(*room, kept.key_size)
            values = keys.new_zeros(*room, 0 if kept.shared else kept.value_size)
            self.layers[kept.layer] = self._with_values(kept, keys, values, 0)
        return self.layers[kept.layer][1:]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot ``target`` the first ``length`` positions that slot ``source`` holds (all of a ring)."""
        for kept, keys, values in self.layers.values():
            there = slice(kept.positions(length) if kept.window is None else None)
            keys[target, :, there].copy_(keys[source, :, there])
            if not kept.shared:
                values[target, :, there].copy_(values[source, :, there])

    def holds(self, cached: int, length: int) -> bool:
        """Whether a slot with ``cached`` positions has all that tokens from position ``length`` on need to see."""
        windows = [kept.window for kept, *_ in self.layers.values() if kept.window]
        return length <= cached and (cached <= min(windows, default=cached) or length >= cached - 1)

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """[1, t, h] -> [r, h], the tokens whose logits are wanted (called by megatron-core's GPTModel)."""
        return hidden[0, self.wanted]

    def rotary(self, table: Tensor) -> Tensor:
        """Rotary angles of this pass's tokens, [t, 1, 1, d], from those of all positions, [max, 1, 1, d]."""
        if self._rotary is None:
            self._rotary = table[self.positions]
        return self._rotary

    def attend(self, kept: Kept, query: Tensor, key: Tensor, value: Tensor | None, scale: float) -> Tensor:
        """q [t, 1, n, d], k and v [t, 1, g, ...] -> [t, 1, n*w]: remember k and v, attend to what came before.

        ``value`` is None where the values are the first part of the keys.
        """
        q, k = query[: self.num_tokens, 0], key[: self.num_tokens, 0]
        v = None if value is None else value[: self.num_tokens, 0]
        out = self.attend_tokens(kept, q, k, v, scale)
        return F.pad(out, (0, 0, 0, len(self.positions) - self.num_tokens))[:, None]

    def attend_tokens(self, kept: Kept, q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor:
        """As ``attend``, without padding: q [t, n, d], k and v [t, g, ...] -> [t, n*w]."""
        return (self._decode if self.decoding else self._read)(kept, q, k, v, scale)

    def _decode(self, kept: Kept, q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor:
        """q [r, n, d] -> [r, n*w]; the query heads of a key-value head are its rows: no copies of keys."""
        buffers, rows = self._buffers(kept, k), self.rows
        if self.even:
            at = (self.length - 1) % kept.window if kept.window else self.length - 1
            places: Any = (slice(rows), slice(None), at)
        else:
            places = (self.index, slice(None), self.at % kept.window if kept.window else self.at)
        for buffer, new in zip(buffers, (k, v), strict=True):
            if new is not None:
                buffer[places] = new
        length = kept.positions(self.length)
        mask = self.mask(length)
        out = F.scaled_dot_product_attention(
            q.reshape(rows, kept.heads, -1, kept.key_size),  # [r, g, n/g, d]
            buffers[0][:rows, :, :length],
            buffers[1][:rows, :, :length],
            attn_mask=None if mask is None else mask.to(q.dtype),
            scale=scale,
        )
        return out.flatten(1)

    def _read(self, kept: Kept, q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor:
        """q [t, n, d] -> [t, n*w], each sequence by itself."""
        keys, values = self._buffers(kept, k)
        v = k[..., : kept.value_size] if v is None else v
        outs = []
        pieces = (x.split(self.lengths) for x in (q, k, v))
        for slot, start, *piece in zip(self.slots_read, self.starts, *pieces, strict=True):
            one_q, new_k, new_v = (x.transpose(0, 1) for x in piece)  # [s, n, d] -> [n, s, d]
            all_k = _remember(kept, keys[slot], start, new_k)
            all_v = all_k[..., : kept.value_size] if kept.shared else _remember(kept, values[slot], start, new_v)
            past = all_k.shape[1] - one_q.shape[1]
            for queries, seen, visible in blocks(one_q.shape[1], kept.window, one_q.device, past):
                out = F.scaled_dot_product_attention(
                    one_q[None, :, queries],
                    all_k[None, :, seen],
                    all_v[None, :, seen],
                    attn_mask=visible,
                    is_causal=visible is None,
                    scale=scale,
                    enable_gqa=one_q.shape[0] != kept.heads,
                )
                outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)


def _remember(kept: Kept, buffer: Tensor, start: int, new: Tensor) -> Tensor:
    """Put new [g, s, d] from position ``start`` into a slot [g, m, d]; all that its tokens may see, [g, p+s, d]."""
    end = start + new.shape[1]
    if kept.window is None:
        buffer[:, start:end] = new
        return buffer[:, :end]
    before = torch.arange(max(0, start - kept.window + 1), start, device=new.device) % kept.window
    seen = torch.cat([buffer[:, before], new], dim=1) if start else new
    stay = torch.arange(max(start, end - kept.window), end, device=new.device)
    buffer[:, stay % kept.window] = new[:, stay - start]
    return seen


class CachedSelfAttention(SelfAttention):
    """megatron-core's SelfAttention, unchanged in training; given a KeyValueCache it attends to what that holds."""

    @cached_property
    def kept(self) -> Kept:
        """What a KeyValueCache remembers of a token."""
        core, size = self.core_attention, self.hidden_size_per_attention_head
        more = core.extra if isinstance(core, AlibiAttention) else 0
        heads, window = self.num_query_groups_per_partition, window_of(self.config, self.layer_number)
        return Kept(self.layer_number, heads, size + more, size + more, window)

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
        alibi = isinstance(self.core_attention, AlibiAttention)
        if alibi:
            query, key, value = self.core_attention.with_places(query, key, value, inference_context.positions)
        out = inference_context.attend(self.kept, query, key, value, scale)
        return self.linear_proj(self.core_attention.without_places(out) if alibi else out)
