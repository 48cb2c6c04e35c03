"""Core attention through flash-attn or PyTorch's scaled_dot_product_attention: grouped, windowed, packed, in CP pieces.

Takes the place of megatron-core's unfused DotProductAttention, which builds the [s, s] scores and knows none of these.
Shape letters: s sequence, b batch, n query heads of this process, g key-value heads of this process, d head size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megapatch.models import device

_BLOCK = 128  # queries of a window attended at once, at least
_PAST_BLOCK = 512  # queries with a past attended at once: each has a row of a mask


def flash_function() -> Callable[..., Tensor] | None:
    """flash-attn's kernel (q, k, v [b, s, n, d], half precision, on a GPU), where it is installed."""
    if not device.start().flash_attention:
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


def flash_packed_function() -> Callable[..., Tensor]:
    """flash-attn's kernel for packed sequences (q, k, v [s, n, d]); called only where ``flash_function`` is there."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def bounds_of(packed: PackedSeqParams) -> Tensor:
    """Where packed sequences begin and end in the row, each with the padding that follows it, int32 [n + 1]."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """How many keys a query of this layer sees, its own included; None: all that came before."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq or None, layer_number):
        return None
    assert config.window_size is not None and config.window_size[1] == 0, "windows are of keys that came before"
    return config.window_size[0] + 1


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Places of queries [..., s, 1] and of keys [t] -> [..., s, t], True where the query sees the key."""
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def blocks(
    length: int, window: int | None, device: torch.device, past: int = 0
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys that these see, and which of them see which; None: causal. The queries are all in order.

    ``past`` keys come before the first query's own.
    """
    if not past and (window is None or length <= window):
        yield slice(length), slice(length), None
        return
    size = max(window or _PAST_BLOCK, _BLOCK)
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, past + start - window + 1)
        places = torch.arange(first, past + end, device=device)
        yield (
            slice(start, end),
            slice(first, past + end),
            visible_keys(places[past + start - first :, None], places, window),
        )


class SdpaAttention(MegatronModule):
    """softmax(q k^T * scale) v, never materialising the scores where the backend can avoid it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", "cross attention comes with encoder-decoder models"
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = groups.tp
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.window = window_of(config, layer_number)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.flash = flash_function() if config.params_dtype != torch.float32 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n*d]; packed: [s, n, d] -> [s, n*d].

        Causal unless ``attn_mask_type`` is no_mask; ``attention_mask`` (True: hidden) is read only with 'arbitrary'.
        """
        assert attention_bias is None, "attention bias is not supported"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group is not None:
            return self._context_parallel(query, key, value)
        if attn_mask_type == AttnMaskType.no_mask:
            return self._attend(query, key, value, None, False).flatten(2)
        if attn_mask_type == AttnMaskType.arbitrary and attention_mask is not None:
            assert self.window is None, "a mask of its own with windows is not supported"
            return self._attend(query, key, value, ~attention_mask, False).flatten(2)
        return self._causal(query, key, value).flatten(2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d]"""
        window = None if self.flash is not None else self.window  # flash-attn knows windows itself
        out = [
            self._attend(q[queries], k[keys], v[keys], visible, visible is None)
            for queries, keys, visible in blocks(q.shape[0], window, q.device)
        ]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        """q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n, d]"""
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            if self.flash is not None and visible is None:
                q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [s, b, n, d] -> [b, s, n, d]
                sides = (-1, -1) if self.window is None or not causal else (self.window - 1, 0)
                out = self.flash(q, k, v, dropout_p=dropout, softmax_scale=self.scale, causal=causal, window_size=sides)
                return out.transpose(0, 1)
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, n, d] -> [b, n, s, d]
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=causal,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.permute(2, 0, 1, 3)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """[s, n, d] -> [s, n*d]: each packed sequence attends to itself; with --cp, s is this rank's share."""
        if self.cp_group is None and self.flash is not None:
            return self._flash_packed(query, key, value, packed)
        bounds, (q, k, v) = bounds_of(packed).tolist(), (x[:, None] for x in (query, key, value))
        if self.cp_group is not None:
            return self._context_parallel(q, k, v, bounds)[:, 0]
        out = [self._causal(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds) if a < b]
        return torch.cat(out)[:, 0].flatten(1)

    def _flash_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """[s, n, d] -> [s, n*d] by one kernel for all sequences."""
        bounds, dropout = bounds_of(packed), self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            out = flash_packed_function()(
                query,
                key,
                value,
                bounds,
                bounds,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                dropout_p=dropout,
                softmax_scale=self.scale,
                causal=True,
                window_size=(-1, -1) if self.window is None else (self.window - 1, 0),
            )
        return out.flatten(1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None = None) -> Tensor:
        """[s/cp, b, n, d] -> [s/cp, b, n*d]: this rank's two pieces of each sequence against all keys of the sequence.

        ``bounds`` of the sequences in the whole row; None: one.
        """
        assert self.cp_group is not None
        size = self.cp_group.size()
        bounds = bounds or [0, query.shape[0] * size]
        assert not any(place % (2 * size) for place in bounds), (
            f"packed sequences are padded to multiples of {2 * size}"
        )
        key, value = (_AllGather.apply(x.contiguous(), self.cp_group) for x in (key, value))
        out = [
            self._two_pieces(query[a:b], _in_order(key[:, a:b]), _in_order(value[:, a:b]))
            for a, b in pairwise(place // size for place in bounds)
            if a < b
        ]
        return torch.cat(out).flatten(2)

    def _two_pieces(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query pieces r and 2*cp-1-r [s/cp, b, n, d] against the keys of their whole sequence [s, b, g, d]."""
        assert self.cp_group is not None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        half = query.shape[0] // 2
        places = torch.arange(key.shape[0], device=query.device)
        out = []
        for piece, number in zip(query.split(half), (rank, 2 * size - 1 - rank), strict=True):
            start, end = number * half, (number + 1) * half
            first = 0 if self.window is None else max(0, start - self.window + 1)
            visible = visible_keys(places[start:end, None], places[first:end], self.window)
            out.append(self._attend(piece, key[first:end], value[first:end], visible, causal=False))
        return torch.cat(out)


def _in_order(x: Tensor) -> Tensor:
    """[cp, s/cp, ...] -> [s, ...]: rank r holds pieces r and 2*cp-1-r, the load-balanced order of megatron-core."""
    size, pieces = x.shape[0], x.unflatten(1, (2, -1))  # [cp, 2, s/(2*cp), ...]
    order = [(r, 0) if r < size else (2 * size - 1 - r, 1) for r in range(2 * size)]
    return torch.cat([pieces[rank, which] for rank, which in order])


class _AllGather(torch.autograd.Function):
    """[s, ...] -> [cp, s, ...] of every rank; the gradient is summed over ranks and cut back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        torch.distributed.all_gather_into_tensor(out, x, group=group)
        return out.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().view(-1, *ctx.shape[1:])
        out = grad.new_empty(ctx.shape)
        torch.distributed.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None
