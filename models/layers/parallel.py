"""Layers whose attention and feed-forward read the same input and are added together (Falcon)."""

from dataclasses import replace
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

_PASSED_ON = ("inference_context", "rotary_pos_emb", "packed_seq_params")  # to attention
_UNUSED = ("dynamic_inference_decode_only",)  # a label of recorded graphs


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own. Dropout of the results is not supported."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """[s, b, h] -> [s, b, h], and the context, which decoders have none of."""
        given = {key: value for key, value in kwargs.items() if key in _PASSED_ON}
        unread = {key for key, value in kwargs.items() if value is not None} - {*_PASSED_ON, *_UNUSED}
        assert not unread, f"{unread} are not supported"
        normed = self.input_layernorm(hidden_states)
        other = self.mlp_input(hidden_states, normed)
        attended, mixed = self.self_attention(normed, attention_mask=attention_mask, **given), self.mlp(other)
        for result, bias in (attended, mixed):
            hidden_states = hidden_states + (result if bias is None else result + bias)
        return hidden_states, None

    def mlp_input(self, hidden_states: Tensor, normed: Tensor) -> Tensor:
        """What the feed-forward reads, [s, b, h]; ``normed`` is what attention reads."""
        return self.pre_mlp_layernorm(hidden_states)


class SharedNormLayer(ParallelLayer):
    """x + attention(n) + mlp(n) where n = norm(x)."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, replace(submodules, pre_mlp_layernorm=IdentityOp), *args, **kwargs)

    def mlp_input(self, hidden_states: Tensor, normed: Tensor) -> Tensor:
        """What attention reads, [s, b, h]."""
        return normed
