"""Embeddings of older families: a norm after the embedding, positions that start at row 2, dropout of their own.

Each function is called with a new GPTModel and config.json, and changes the stage that has the embedding.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megapatch.models.family import HfConfig
from megapatch.models.layers.norm import LayerNorm

_OFFSET = 2  # rows of OPT's table before position 0


def norm_embedding(model: GPTModel, hf: HfConfig) -> None:
    """A layer norm, ``embedding.norm``, between embedding and first layer (Bloom)."""
    if model.pre_process:
        config: Any = model.config
        model.embedding.norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        model.embedding.register_forward_hook(_norm)


def _norm(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """[s, b, h] -> [s, b, h], cut along the sequence where the layers are."""
    return embedding.get_submodule("norm")(output)


class _OffsetEmbedding(nn.Embedding):
    """Position p is row p + 2. The rows before are kept, for files to come back whole; nothing reads them."""

    def forward(self, positions: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]"""
        return super().forward(positions + _OFFSET)


def offset_positions(model: GPTModel, hf: HfConfig) -> None:
    """Learned positions of p + 2 rows (OPT), and no dropout of embeddings."""
    if model.pre_process:
        rows, size = model.embedding.position_embeddings.weight.shape
        model.embedding.position_embeddings = _OffsetEmbedding(rows + _OFFSET, size)
        with torch.no_grad():
            model.config.embedding_init_method(model.embedding.position_embeddings.weight)
        model.embedding.embedding_dropout.p = 0.0


def _drop(key: str, default: float, model: GPTModel, hf: HfConfig) -> None:
    """Dropout of embeddings as config.json's ``key`` says, which need not be that of the layers."""
    if model.pre_process:
        model.embedding.embedding_dropout.p = hf.get(key, default)


gpt2_dropout = partial(_drop, "embd_pdrop", 0.1)
starcoder2_dropout = partial(_drop, "embedding_dropout", 0.0)
