"""DeepSeek-MoE 16B, from the paper (arXiv 2401.06066) and the hub's modeling_deepseek.py, without its losses."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from references.parts import GatedMlp, Reference, RMSNorm, angles, attend, heads, rotate_halves


class DeepseekConfig(PretrainedConfig):
    """Settings of deepseek-moe-16b."""

    model_type = "deepseek"

    def __init__(self, **settings: Any) -> None:
        defaults = {"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 28}
        defaults |= {"num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
        defaults |= {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "scoring_func": "softmax"}
        defaults |= {"moe_intermediate_size": 1408, "first_k_dense_replace": 1, "moe_layer_freq": 1}
        defaults |= {"norm_topk_prob": False, "seq_aux": True, "aux_loss_alpha": 0.001, "rope_theta": 10000.0}
        defaults |= {"attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096}
        super().__init__(**{"tie_word_embeddings": False, "initializer_range": 0.02} | defaults | settings)


class Attention(nn.Module):
    """Llama's."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.counts, self.base = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), c.rope_theta
        size = c.hidden_size // c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, n * size, bias=False) for n in self.counts)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = zip((self.q_proj, self.k_proj, self.v_proj), self.counts, strict=True)
        q, k, v = (heads(project(x), n) for project, n in projections)
        turn = angles(x.shape[1], q.shape[-1], self.base)
        return self.o_proj(attend(rotate_halves(q, turn), rotate_halves(k, turn), v))


class Mixture(nn.Module):
    """The sum of the k likeliest experts by their probability, and of the shared experts."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.k, self.normed = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedMlp(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts)
        )
        if c.n_shared_experts:
            self.shared_experts = GatedMlp(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chances, chosen = self.gate(tokens).softmax(-1, dtype=torch.float32).topk(self.k, -1)
        if self.normed:
            chances = chances / chances.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * chances[rows, places, None].to(x.dtype))
        shared = self.shared_experts(x) if hasattr(self, "shared_experts") else 0
        return out.view_as(x) + shared


class Layer(nn.Module):
    """Attention and feed-forward, each on the normed stream; the first layers are dense."""

    def __init__(self, c: DeepseekConfig, number: int) -> None:
        super().__init__()
        mixed = number >= c.first_k_dense_replace and number % c.moe_layer_freq == 0
        self.self_attn = Attention(c)
        self.mlp = Mixture(c) if mixed else GatedMlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, number) for number in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class DeepseekMoe(Reference):
    """The language model."""

    config_class = DeepseekConfig
    base_model_prefix = "model"

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        return self.lm_head(self.model(ids))
