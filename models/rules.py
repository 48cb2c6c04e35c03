"""Weight rules: how one megatron-core tensor is made of Hugging Face tensors, and back.

A rule is data. ``core`` is the name in a torch_dist checkpoint with ``{l}`` for the layer and ``{e}`` for the
expert; ``hf`` are the names of its parts. A fused tensor is its parts cut into blocks of rows, in some order:
``blocks`` gives that order, and serves tensors and byte ranges, in both directions.

Shape letters: v vocabulary, h hidden, g query groups, q query heads per group, d head size, f feed-forward size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Block(NamedTuple):
    """``rows`` rows of part number ``part``, from ``start``."""

    part: int
    start: int
    rows: int


Sizes = Mapping[str, int]  # the shape letters' values (shapes.sizes)
Blocks = Callable[[Sequence[int], Sizes], list[Block]]  # (rows of each part, sizes) -> order in the core tensor


def in_sequence(rows: Sequence[int], sizes: Sizes) -> list[Block]:
    """The parts whole, one after the other: a single tensor, or gate [f, h], up [f, h] -> [2*f, h]."""
    return [Block(part, 0, n) for part, n in enumerate(rows)]


def by_group(rows: Sequence[int], sizes: Sizes) -> list[Block]:
    """q [g*q*d, h], k [g*d, h], v [g*d, h] -> [g*(q+2)*d, h]: each query group's q, k and v together."""
    shares = [n // sizes["g"] for n in rows]
    return [Block(part, group * n, n) for group in range(sizes["g"]) for part, n in enumerate(shares)]


def fused_by_group(rows: Sequence[int], sizes: Sizes) -> list[Block]:
    """One part that is q, k and v whole, one after the other -> each query group's q, k and v together."""
    starts = (0, sizes["q"], sizes["q"] + sizes["k"])
    apart = by_group((sizes["q"], sizes["k"], sizes["k"]), sizes)
    return [Block(0, starts[block.part] + block.start, block.rows) for block in apart]


@dataclass(frozen=True)
class Rule:
    """One core tensor and the Hugging Face tensors it is made of."""

    core: str
    hf: tuple[str, ...]
    blocks: Blocks = in_sequence
    layers: tuple[int, ...] | None = None  # the layers that have it; None: every layer
    shapes: tuple[str, ...] = ()  # of each part, as in shapes.SHAPES; empty: what that table says of the core name
    transposed: bool = False  # the parts are stored [in, out]; blocks are of rows after transposition


@dataclass(frozen=True)
class Placed:
    """A rule at one layer and expert, with the names filled in (None where the rule has no such axis)."""

    rule: Rule
    layer: int | None
    expert: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face names."""
        return tuple(name.format(l=self.layer, e=self.expert) for name in self.rule.hf)

    def key(self, stacked: bool) -> str:
        """The name in a torch_dist checkpoint; with ``stacked``, layers are an axis of the tensor, not in the name.

        Experts are always an axis. Leading axes of the stored tensor: (layer if stacked), (expert if any).
        """
        layer = "" if stacked else f"{self.layer}."
        return self.rule.core.replace("{l}.", layer).replace("{e}.", "")


def expand(rules: Sequence[Rule], num_layers: int, num_experts: int) -> list[Placed]:
    """Every rule at every layer and expert that has it, layer by layer as Hugging Face orders them."""

    def at(layer: int | None, rule: Rule) -> list[Placed]:
        experts: Sequence[int | None] = range(num_experts) if "{e}" in rule.core else (None,)
        return [Placed(rule, layer, expert) for expert in experts]

    placed = [found for rule in rules if "{l}" not in rule.core for found in at(None, rule)]
    for layer in range(num_layers):
        for rule in (r for r in rules if "{l}" in r.core and (r.layers is None or layer in r.layers)):
            placed += at(layer, rule)
    return placed


def on_layers(rules: Sequence[Rule], layers: Sequence[int]) -> tuple[Rule, ...]:
    """The same rules, for some layers only."""
    return tuple(replace(rule, layers=tuple(layers)) for rule in rules)


def with_bias(*rules: Rule) -> tuple[Rule, ...]:
    """Each rule twice, for the weight and for the bias: ``{k}`` in its names is the kind."""
    return tuple(_of_kind(rule, kind) for rule in rules for kind in ("weight", "bias"))


def _of_kind(rule: Rule, kind: str) -> Rule:
    shapes, axis = rule.shapes, -1 if rule.transposed else 0
    if kind == "bias":
        shapes = tuple(shape.split()[axis] for shape in shapes)
    names = tuple(name.replace("{k}", kind) for name in rule.hf)
    transposed = rule.transposed and kind == "weight"
    return replace(rule, core=rule.core.replace("{k}", kind), hf=names, shapes=shapes, transposed=transposed)


def pack(rule: Rule, parts: Sequence["Tensor"], sizes: Sizes) -> "Tensor":
    """The core tensor made of its Hugging Face parts (a copy)."""
    import torch

    parts = [part.T for part in parts] if rule.transposed else parts
    blocks = rule.blocks([part.shape[0] for part in parts], sizes)
    return torch.cat([parts[b.part].narrow(0, b.start, b.rows) for b in blocks])


CORE, HF = "decoder.layers.{l}.", "model.layers.{l}."
PREDICTING = "transformer_layer."  # in core's names: what follows is as in a layer of the decoder


def embeddings() -> tuple[Rule, ...]:
    """Word embeddings, final norm and output layer (the output layer is absent where it is tied)."""
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("output_layer.weight", ("lm_head.weight",)),
    )


def attention(*, bias: bool = False, qk_norm: bool = False) -> tuple[Rule, ...]:
    """Input norm, fused QKV (with bias for ``bias``), output projection, and norms of q and k for ``qk_norm``."""
    core, hf = CORE + "self_attention.", HF + "self_attn."
    kinds = ("weight", "bias") if bias else ("weight",)
    norms = ("q", "k") if qk_norm else ()
    return (
        Rule(core + "linear_qkv.layer_norm_weight", (HF + "input_layernorm.weight",)),
        *(Rule(core + f"linear_qkv.{kind}", tuple(f"{hf}{p}_proj.{kind}" for p in "qkv"), by_group) for kind in kinds),
        Rule(core + "linear_proj.weight", (hf + "o_proj.weight",)),
        *(Rule(core + f"{n}_layernorm.weight", (hf + f"{n}_norm.weight",)) for n in norms),
    )


def latent_attention(*, query_latent: bool) -> tuple[Rule, ...]:
    """Multi-head latent attention, shapes in the letters of shapes.py; queries through a latent vector or not."""
    core, hf = CORE + "self_attention.", HF + "self_attn."
    from_latent = (
        Rule(core + "linear_q_down_proj.weight", (hf + "q_a_proj.weight",), shapes=("a h",)),
        Rule(core + "linear_q_up_proj.layer_norm_weight", (hf + "q_a_layernorm.weight",), shapes=("a",)),
        Rule(core + "linear_q_up_proj.weight", (hf + "q_b_proj.weight",), shapes=("q a",)),
    )
    direct = (Rule(core + "linear_q_proj.weight", (hf + "q_proj.weight",), shapes=("q h",)),)
    return (
        Rule(CORE + "input_layernorm.weight", (HF + "input_layernorm.weight",), shapes=("h",)),
        *(from_latent if query_latent else direct),
        Rule(core + "linear_kv_down_proj.weight", (hf + "kv_a_proj_with_mqa.weight",), shapes=("c+r h",)),
        Rule(core + "linear_kv_up_proj.layer_norm_weight", (hf + "kv_a_layernorm.weight",), shapes=("c",)),
        Rule(core + "linear_kv_up_proj.weight", (hf + "kv_b_proj.weight",), shapes=("u c",)),
        Rule(core + "linear_proj.weight", (hf + "o_proj.weight",), shapes=("h o",)),
    )


def predicting_layer(layer: Sequence[Rule], number: int, after: int) -> tuple[Rule, ...]:
    """Layer ``number`` for multi-token prediction, with these rules of a layer; files count it on from ``after``."""
    core, hf = f"mtp.layers.{number}.", f"model.layers.{after + number}."
    return (
        Rule(core + "enorm.weight", (hf + "enorm.weight",), shapes=("h",)),
        Rule(core + "hnorm.weight", (hf + "hnorm.weight",), shapes=("h",)),
        Rule(core + "eh_proj.weight", (hf + "eh_proj.weight",), shapes=("h h+h",)),
        *(
            replace(
                rule,
                core=rule.core.replace(CORE, core + PREDICTING),
                hf=tuple(name.replace(HF, hf) for name in rule.hf),
                layers=None,
            )
            for rule in layer
        ),
        Rule(core + "final_layernorm.weight", (hf + "shared_head.norm.weight",), shapes=("h",)),
    )


def dense_mlp() -> tuple[Rule, ...]:
    """Norm and gated MLP of a dense layer."""
    norm = Rule(CORE + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",))
    return norm, *gated_mlp("mlp.", "mlp.", ("gate_proj", "up_proj", "down_proj"))


def moe_mlp(
    block: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Norm, router and experts of a mixture-of-experts layer; ``block`` and ``names`` as Hugging Face calls them."""
    return (
        Rule(CORE + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",)),
        Rule(CORE + "mlp.router.weight", (HF + f"{block}.gate.weight",)),
        *gated_mlp("mlp.experts.experts.{e}.", block + ".experts.{e}.", names),
    )


def gated_mlp(core: str, hf: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """gate and up fused into fc1, down as fc2."""
    gate, up, down = (f"{HF}{hf}{name}.weight" for name in names)
    return Rule(f"{CORE}{core}linear_fc1.weight", (gate, up)), Rule(f"{CORE}{core}linear_fc2.weight", (down,))
