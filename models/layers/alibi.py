"""Attention with linear biases (ALiBi, arXiv:2108.12409): each head favours near keys, by a slope of its own.

A bias that is slope times the place of the key is a product of one more dimension of queries and keys, so no [s, s]
matrix is ever made, and every kernel, context parallelism, packed sequences and the key-value cache serve as they are.
In half precision the bias is a sum of parts that are exact in it, one more dimension each.
Shape letters: s sequence, b batch, n heads of this process (one key-value head each), d head size.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megapatch.models.layers.attention import SdpaAttention, bounds_of

_EXTRA = 8  # further dimensions; kernels want multiples of eight
_PARTS = 3  # of a bias in half precision: 3 x 8 bits are the 24 of fp32


def slopes(heads: int) -> list[float]:
    """Of each head: 2^(-8/n), 2^(-16/n), ... for a power of two; what is missing is every second one of twice as many.

    As in the paper's published code, which all models with ALiBi follow.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return first + [2.0 ** (-4 * i / power) for i in range(1, 2 * (heads - power) + 1, 2)]


class AlibiAttention(SdpaAttention):
    """softmax(q k^T * scale + slope * place of the key) v."""

    extra = _EXTRA

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        heads, size = config.num_attention_heads, config.tensor_model_parallel_size
        assert config.num_query_groups == heads, "ALiBi with grouped keys is not supported"
        rank = self.tp_group.rank() if size > 1 else 0
        here = slopes(heads)[rank * heads // size : (rank + 1) * heads // size]
        self.slopes = torch.tensor(here, dtype=torch.float32)  # [n]; no buffer, which checkpoints would hold

    def bias(self, places: Tensor) -> Tensor:
        """Places of keys [s] -> [s, n] in fp32, to be added to q k^T before it is scaled."""
        return self.slopes.to(places.device) * places[:, None] / self.scale

    def with_places(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [s, ..., n, d], places of the keys [s] -> [s, ..., n, d + 8], whose attention has the bias."""
        parts = _parts(self.bias(places), key.dtype)  # [s, n, parts]
        parts = F.pad(parts, (0, _EXTRA - parts.shape[-1]))
        if key.dim() == 4:
            parts = parts[:, None].expand(*key.shape[:-1], _EXTRA)
        ones = query.new_ones(()).expand(*query.shape[:-1], _EXTRA)
        return torch.cat([query, ones], -1), torch.cat([key, parts], -1), F.pad(value, (0, _EXTRA))

    def without_places(self, out: Tensor) -> Tensor:
        """[..., n * (d + 8)] -> [..., n * d]"""
        return out.unflatten(-1, (len(self.slopes), -1))[..., :-_EXTRA].flatten(-2)

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
        """As SdpaAttention.forward."""
        places = self._places(key.shape[0], packed_seq_params).to(key.device)
        longer = self.with_places(query, key, value, places)
        out = super().forward(*longer, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        return self.without_places(out)

    def _places(self, length: int, packed: PackedSeqParams | None) -> Tensor:
        """Where this process's keys are in their sequences, [s]."""
        rank, size = (0, 1) if self.cp_group is None else (self.cp_group.rank(), self.cp_group.size())
        bounds = [0, length * size] if packed is None else bounds_of(packed).tolist()
        return torch.cat([_places_of_rank(b - a, rank, size) for a, b in pairwise(bounds)])


class FalconAlibiAttention(AlibiAttention):
    """softmax((q k^T + slope * place of the key) * scale) v, with slopes, places and biases rounded to bf16.

    Falcon RW was trained so: its config.json says nothing of it, transformers' modeling_falcon.py does.
    """

    def bias(self, places: Tensor) -> Tensor:
        """Places of keys [s] -> [s, n]."""
        return (self.slopes.to(places.device).bfloat16() * places[:, None].bfloat16()).float()


def _places_of_rank(length: int, rank: int, size: int) -> Tensor:
    """Of a sequence, the places that a rank of context parallelism holds: its pieces r and 2*cp-1-r, [length/cp]."""
    if size == 1:
        return torch.arange(length)
    pieces = torch.arange(length).unflatten(0, (2 * size, -1))
    return pieces[[rank, 2 * size - 1 - rank]].flatten()


def _parts(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] in fp32 -> [..., parts] in ``dtype``, whose sum it is."""
    if dtype.itemsize >= bias.dtype.itemsize:
        return bias[..., None].to(dtype)
    parts = []
    for _ in range(_PARTS):
        parts.append(bias.to(dtype))
        bias = bias - parts[-1].float()
    return torch.stack(parts, -1)
