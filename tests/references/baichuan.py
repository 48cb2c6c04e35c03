"""Baichuan 1 and 2, 7B and 13B, from the technical report (arXiv 2309.10305) and the hub's four modeling_baichuan.py.

``max_position_embeddings`` makes a model of the 7B kind (rotary embedding), ``z_loss_weight`` one of version 2.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from references.parts import GatedMlp, Reference, RMSNorm, angles, attend, heads, rotate_halves


class BaichuanConfig(PretrainedConfig):
    """Settings that all four have; the others are there or not."""

    model_type = "baichuan"

    def __init__(self, **settings: Any) -> None:
        defaults = {"vocab_size": 125696, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        defaults |= {"num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02}
        super().__init__(**{"tie_word_embeddings": False} | defaults | settings)


def slopes(count: int) -> list[float]:
    """ALiBi's slope of each head: powers of two, and between them for the heads beyond a power of two."""
    whole = 2 ** math.floor(math.log2(count))
    first = [2.0 ** (-8 * (n + 1) / whole) for n in range(whole)]
    return first + [2.0 ** (-4 * (2 * n + 1) / whole) for n in range(count - whole)]


class Attention(nn.Module):
    """Queries, keys and values from one matrix; rotary embedding or ALiBi."""

    def __init__(self, c: BaichuanConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.rotary = getattr(c, "max_position_embeddings", None) is not None
        self.W_pack = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.heads) for part in self.W_pack(x).chunk(3, -1))
        if self.rotary:
            turn = angles(x.shape[1], q.shape[-1], 10000.0)
            return self.o_proj(attend(rotate_halves(q, turn), rotate_halves(k, turn), v))
        places = torch.arange(x.shape[1])
        distance = places[None, :] - places[:, None]
        return self.o_proj(attend(q, k, v, torch.tensor(slopes(self.heads))[:, None, None] * distance))


class Layer(nn.Module):
    """Attention and feed-forward, each on the normed stream."""

    def __init__(self, c: BaichuanConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), GatedMlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, c: BaichuanConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class NormHead(nn.Linear):
    """An output layer with rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


class Baichuan(Reference):
    """The language model."""

    config_class = BaichuanConfig
    base_model_prefix = "model"

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        head = nn.Linear if getattr(config, "z_loss_weight", None) is None else NormHead
        self.model = Body(config)
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        return self.lm_head(self.model(ids))
