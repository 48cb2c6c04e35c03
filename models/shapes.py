"""The shape of every weight, from config.json: what the files must hold, and how fused tensors divide into parts.

Letters: v vocabulary, p positions, h hidden, g query groups, q all query heads, k all key heads, d one head,
f feed-forward, e experts, m feed-forward of an expert, s of the shared experts. An axis may be a sum: "q+k+k".
With latent attention: a latent vector of queries, c of keys and values, r rotated part of a key, u all that is made of
c: the other part of each head's key, and its value; o values of all heads.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig, find, max_positions, placed_rules, refuse_rope, stacked_layers, vocab_size
from megapatch.models.rules import CORE, PREDICTING, Block, Placed, Rule, Sizes

SHAPES: dict[str, tuple[str, ...]] = {  # core name without its layer -> shape of each Hugging Face part
    "embedding.word_embeddings.weight": ("v h",),
    "output_layer.weight": ("v h",),
    "decoder.final_layernorm.weight": ("h",),
    "self_attention.linear_qkv.layer_norm_weight": ("h",),
    "self_attention.linear_qkv.weight": ("q h", "k h", "k h"),
    "self_attention.linear_proj.weight": ("h q",),
    "self_attention.q_layernorm.weight": ("d",),
    "self_attention.k_layernorm.weight": ("d",),
    "pre_mlp_layernorm.weight": ("h",),
    "mlp.linear_fc1.layer_norm_weight": ("h",),
    "mlp.linear_fc1.weight": ("f h", "f h"),
    "mlp.linear_fc2.weight": ("h f",),
    "mlp.router.weight": ("e h",),
    "mlp.experts.experts.{e}.linear_fc1.weight": ("m h", "m h"),
    "mlp.experts.experts.{e}.linear_fc2.weight": ("h m",),
    "mlp.shared_experts.linear_fc1.weight": ("s h", "s h"),
    "mlp.shared_experts.linear_fc2.weight": ("h s",),
    "mlp.shared_experts.gate_weight": ("1 h",),
}


def sizes(hf: HfConfig) -> dict[str, int]:
    """The letters' values."""
    core = find(hf).transformer_config(hf)
    head, heads, groups = core["kv_channels"], core["num_attention_heads"], core["num_query_groups"]
    if heads % groups:
        raise UserError(f"config.json: {heads} attention heads do not divide into {groups} groups (key-value heads)")
    return {
        "v": vocab_size(hf),
        "h": core["hidden_size"],
        "q": heads * head,
        "k": groups * head,
        "g": groups,
        "d": head,
        "p": max_positions(hf) or 0,
        "f": core["ffn_hidden_size"],
        "e": core.get("num_moe_experts") or 0,
        "m": core.get("moe_ffn_hidden_size") or 0,
        "s": core.get("moe_shared_expert_intermediate_size") or 0,
        **(_latent(core) if core.get("multi_latent_attention") else {}),
        **find(hf).letters(hf),
    }


def _latent(core: Mapping[str, Any]) -> dict[str, int]:
    heads = core["num_attention_heads"]
    return {
        "a": core["q_lora_rank"] or 0,
        "c": core["kv_lora_rank"],
        "r": core["qk_pos_emb_head_dim"],
        "u": heads * (core["qk_head_dim"] + core["v_head_dim"]),
        "o": heads * core["v_head_dim"],
    }


def part_shapes(rule: Rule, letters: Sizes) -> list[tuple[int, ...]]:
    """The shape of each Hugging Face part of a rule, as in its files; ``letters`` from ``sizes``."""
    shapes = rule.shapes or _shapes(rule.core.removeprefix(CORE).rpartition(PREDICTING)[2])
    return [tuple(_length(axis, letters) for axis in shape.split()) for shape in shapes]


def _shapes(name: str) -> tuple[str, ...]:
    """By the table; a bias that is not in it has the rows of its weight."""
    if name in SHAPES or not name.endswith("bias"):
        return SHAPES[name]
    return tuple(shape.split()[0] for shape in SHAPES[name.removesuffix("bias") + "weight"])


def _length(axis: str, letters: Sizes) -> int:
    """An axis such as "h", "8" or "q+k+k"."""
    return sum(int(term) if term.isdigit() else letters[term] for term in axis.split("+"))


def num_parameters(hf: HfConfig) -> int:
    """How many weights the model has."""
    letters = sizes(hf)
    return sum(prod(shape) for placed in placed_rules(hf) for shape in part_shapes(placed.rule, letters))


class Layout:
    """What a config.json says of the weights, worked out once."""

    def __init__(self, hf: HfConfig) -> None:
        refuse_rope(hf)
        self.model_type = find(hf).model_type
        self.placed = placed_rules(hf)
        self.stacked = stacked_layers(hf)
        config = find(hf).transformer_config(hf)
        self._layers, self._experts = config["num_layers"], config.get("num_moe_experts")
        self.sizes = sizes(hf)

    def parts(self, placed: Placed) -> list[tuple[int, ...]]:
        """The shape of each Hugging Face part, as in its files."""
        return part_shapes(placed.rule, self.sizes)

    def packed(self, placed: Placed) -> tuple[tuple[int, ...], list[Block]]:
        """The shape of the core tensor (leading axes left out), and the blocks of rows that fill it in order."""
        parts = [shape[::-1] if placed.rule.transposed else shape for shape in self.parts(placed)]
        rows = [shape[0] for shape in parts]
        return (sum(rows), *parts[0][1:]), placed.rule.blocks(rows, self.sizes)

    def axes(self, placed: Placed, stacked: bool) -> list[tuple[int, int]]:
        """(index, size) of the core tensor's axes before those of the weight: layers where stacked, experts."""
        axes = [(placed.layer, self._layers)] if stacked and placed.layer is not None else []
        return axes + ([(placed.expert, self._experts)] if placed.expert is not None else [])
