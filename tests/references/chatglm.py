"""ChatGLM2 and ChatGLM3, from the hub's modeling_chatglm.py; ``rope_ratio`` as ChatGLM3 and GLM-4 take it.

With ``positions_divided`` it is taken as ChatGLM2-6B-32k does: positions are divided by it.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from references.parts import Reference, RMSNorm, angles, attend, heads, rotate_pairs


class ChatGlmConfig(PretrainedConfig):
    """Settings of ChatGLM3-6B."""

    model_type = "chatglm"
    attribute_map: ClassVar = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}

    def __init__(self, **settings: Any) -> None:
        defaults = {"num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696}
        defaults |= {"kv_channels": 128, "num_attention_heads": 32, "seq_length": 8192, "layernorm_epsilon": 1e-5}
        defaults |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
        defaults |= {"add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True}
        defaults |= {"apply_residual_connection_post_layernorm": False, "apply_query_key_layer_scaling": True}
        defaults |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "quantization_bit": 0, "pre_seq_len": None}
        super().__init__(**{"tie_word_embeddings": False} | defaults | settings)


class Attention(nn.Module):
    """Grouped queries; the first half of each head is rotated, neighbouring dimensions together."""

    def __init__(self, c: ChatGlmConfig) -> None:
        super().__init__()
        self.size, self.queries, self.groups = c.kv_channels, c.num_attention_heads, c.multi_query_group_num
        self.ratio = getattr(c, "rope_ratio", 1)
        self.divides = getattr(c, "positions_divided", False)  # a setting of this reference alone
        self.query_key_value = nn.Linear(
            c.hidden_size, (self.queries + 2 * self.groups) * self.size, bias=c.add_qkv_bias
        )
        self.dense = nn.Linear(self.queries * self.size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        counts = self.queries, self.groups, self.groups
        parts = self.query_key_value(x).split([n * self.size for n in counts], -1)
        q, k, v = (heads(part, n) for part, n in zip(parts, counts, strict=True))
        base, step = (10000.0, 1 / self.ratio) if self.divides else (10000.0 * self.ratio, 1.0)
        turn = angles(x.shape[1], self.size // 2, base, step)
        return self.dense(attend(rotate_pairs(q, turn), rotate_pairs(k, turn), v))


class Mlp(nn.Module):
    """silu(first half) * second half of one wide product."""

    def __init__(self, c: ChatGlmConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward, each on the normed stream."""

    def __init__(self, c: ChatGlmConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.self_attention = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.mlp = Mlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    """Layers and the last norm."""

    def __init__(self, c: ChatGlmConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.final_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.final_layernorm(x)


class Body(nn.Module):
    """Embedding, encoder and output layer."""

    def __init__(self, c: ChatGlmConfig) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(c.padded_vocab_size, c.hidden_size)})
        self.encoder = Encoder(c)
        self.output_layer = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output_layer(self.encoder(self.embedding["word_embeddings"](ids)))


class ChatGlm(Reference):
    """The language model."""

    config_class = ChatGlmConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__(config)
        self.transformer = Body(config)
        self.post_init()

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        return self.transformer(ids)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.transformer.embedding["word_embeddings"]

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.transformer.output_layer
