"""Sandwich norms: what attention and feed-forward give is normed too, before it is added."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer import TransformerConfig, TransformerLayer
from torch import Tensor

from megapatch.models.layers.norm import NORMS

WithBias = tuple[Tensor, Tensor | None]
Add = Callable[[WithBias, Tensor, float], Tensor]


class SandwichLayer(TransformerLayer):
    """megatron-core's layer with a norm after attention and one after the feed-forward, each before the sum."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        norm, eps = NORMS[config.normalization], config.layernorm_epsilon
        self.post_self_attn_layernorm = norm(config, config.hidden_size, eps)
        self.post_mlp_layernorm = norm(config, config.hidden_size, eps)
        self.self_attn_bda: Any = _after(self.post_self_attn_layernorm, self.self_attn_bda)
        self.mlp_bda: Any = _after(self.post_mlp_layernorm, self.mlp_bda)


def _after(norm: Callable[[Tensor], Tensor], make: Callable[..., Add]) -> Callable[..., Add]:
    """``make`` gives the function that adds bias, dropout and residual; the norm comes before it."""

    def made(*switches: bool) -> Add:
        add = make(*switches)

        def normed(output: WithBias, residual: Tensor, dropout: float) -> Tensor:
            x, bias = output
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return normed

    return made
