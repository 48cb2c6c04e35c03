"""What the references share: a causal language model without a cache, RMS norm, rotary embedding, attention.

Letters: b batch, s sequence, n query heads, g key-value heads, d head size, h hidden, v vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Reference(PreTrainedModel, GenerationMixin):
    """A causal language model that reads the whole sequence anew for every token; subclasses give ``logits``."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """ids [b, s] -> logits [b, s, v]; nothing may be masked."""
        assert attention_mask is None or attention_mask.all()
        return CausalLMOutput(logits=self.logits(input_ids))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """Everything so far, however transformers keeps its cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x), with Llama's names."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def angles(length: int, dim: int, base: float, step: float = 1.0) -> Tensor:
    """Angle of each position and pair of dimensions, [s, dim/2]; positions are ``step`` apart."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    return torch.outer(torch.arange(length).float() * step, frequencies)


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """x [b, n, s, d]: dimension i turns with dimension i + d/2, by ``turn`` [s, d/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """x [b, n, s, d]: dimension 2i turns with dimension 2i + 1, by ``turn`` [s, r/2]; those from r on stay."""
    size = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(x[..., :size].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2)
    return torch.cat([turned, x[..., size:]], -1)


def heads(x: Tensor, count: int) -> Tensor:
    """[b, s, n*d] -> [b, n, s, d]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """q [b, n, s, d], k and v [b, g, s, d] -> [b, s, n*d]: causal; ``bias`` [n, 1, s] is added to scaled scores."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
