"""Qwen 1, from its technical report (arXiv 2309.16609) and the hub's modeling_qwen.py, up to the trained length."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from references.parts import Reference, RMSNorm, angles, attend, heads, rotate_halves


class QwenConfig(PretrainedConfig):
    """Settings of Qwen-7B."""

    model_type = "qwen"

    def __init__(self, **settings: Any) -> None:
        defaults = {"vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
        defaults |= {"intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-6, "seq_length": 8192}
        defaults |= {"max_position_embeddings": 8192, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True}
        defaults |= {"scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True}
        defaults |= {"attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "initializer_range": 0.02}
        super().__init__(**{"tie_word_embeddings": False} | defaults | settings)


class Attention(nn.Module):
    """Queries, keys and values from one matrix, with a bias; rotary embedding on whole heads."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        size = c.kv_channels * c.num_attention_heads
        self.heads, self.base = c.num_attention_heads, c.rotary_emb_base
        self.c_attn = nn.Linear(c.hidden_size, 3 * size)
        self.c_proj = nn.Linear(size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.heads) for part in self.c_attn(x).chunk(3, -1))
        turn = angles(x.shape[1], q.shape[-1], self.base)
        return self.c_proj(attend(rotate_halves(q, turn), rotate_halves(k, turn), v))


class Mlp(nn.Module):
    """w1 x * silu(w2 x), each half of ``intermediate_size`` wide."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        inner = c.intermediate_size // 2
        self.w1 = nn.Linear(c.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(c.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Block(nn.Module):
    """Attention and feed-forward, each on the normed stream."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (RMSNorm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))
        self.attn, self.mlp = Attention(c), Mlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Body(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size)
        self.h = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.ln_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class Qwen(Reference):
    """The language model."""

    config_class = QwenConfig
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        self.transformer = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        assert ids.shape[1] <= self.config.seq_length, "longer sequences are computed in another way"
        return self.lm_head(self.transformer(ids))

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head
