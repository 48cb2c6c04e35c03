"""Other names of core weights: rules give Transformer Engine's in a torch_dist checkpoint, all others follow here.

    canonical    decoder.layers.3.mlp.linear_fc1.layer_norm_weight    decoder.layers.3.mlp.experts.experts.5.linear_fc1
    local spec   decoder.layers.3.pre_mlp_layernorm.weight            decoder.layers.3.mlp.experts.local_experts.5. ...

Of megatron-core 0.16.1 (gpt_layer_specs, experts, sharded_state_dict of each module). Imports no torch.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from megapatch.models.rules import Placed

NORMS = (  # Transformer Engine fuses a norm with the linear layer after it; the local spec has it apart
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # may have more rows than the vocabulary
GATED = "linear_fc1."
_EXPERT = re.compile(r"^(.*mlp\.experts\.)experts\.(\d+)\.linear_(fc1|fc2)\.(\w+)$")


def local_spec(name: str) -> str:
    """A canonical name as megatron-core's spec without Transformer Engine has it."""
    for fused, apart in NORMS:
        name = name.replace("." + fused, "." + apart)
    return name


def _either_spec(name: str) -> list[str]:
    """The name, and what it may be called otherwise."""
    found = [name]
    for pair in NORMS:
        for one, other in (pair, pair[::-1]):
            found += [name.replace("." + one, "." + other)] if "." + one in name else []
    return found


class DistName(NamedTuple):
    """A name that a weight may have in a torch_dist checkpoint, and which leading axes its tensor has then."""

    key: str
    layers: bool
    experts: bool


def in_torch_dist(placed: Placed) -> Iterator[DistName]:
    """Every name in use: layers as an axis or in the name, experts likewise (``singleton_local_shards``)."""
    for stacked in (True, False) if placed.layer is not None else (False,):
        yield from (DistName(key, stacked, True) for key in _either_spec(placed.key(stacked)))
    yield from (DistName(key, False, False) for key in _either_spec(full(placed)) if placed.expert is not None)


def full(placed: Placed) -> str:
    """The canonical name with layer and expert in it."""
    return placed.rule.core.format(l=placed.layer, e=placed.expert)


class RankName(NamedTuple):
    """A name in the state_dict of a rank; for a tensor of all experts, each transposed, which expert and along which
    axis they follow each other there."""

    name: str
    expert: int | None = None
    axis: int = 0


def of_rank(canonical: str, spec: str, experts: str) -> RankName:
    """A canonical name (layer and expert counted from the rank's first) as GPTModel.state_dict() has it.

    ``spec``: te or local; ``experts``: sequential (SequentialMLP) or grouped (TEGroupedMLP; GroupedMLP when local).
    """
    found = _EXPERT.match(canonical)
    if found is None:
        return RankName(local_spec(canonical) if spec == "local" else canonical)
    block, expert, linear, kind = found.groups()
    if experts == "sequential":
        return RankName(f"{block}local_experts.{expert}.linear_{linear}.{kind}")
    if spec == "te":
        return RankName(f"{block}linear_{linear}.{kind}{expert}")
    first = linear == "fc1"
    return RankName(f"{block}weight{1 if first else 2}", int(expert), 1 if first else 0)


def any_of_rank(canonical: str) -> Iterator[RankName]:
    """Every name that it may have there."""
    found = [of_rank(canonical, spec, experts) for spec in ("te", "local") for experts in ("sequential", "grouped")]
    yield from dict.fromkeys(found)


def extra_states(names: list[str], spec: str) -> list[str]:
    """The ``_extra_state`` (None) that the modules of these weights have in a state_dict."""
    found: dict[str, None] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        linear = "linear_" in module.rpartition(".")[2] or module.endswith(("output_layer", "eh_proj"))
        norm = spec == "te" and module.endswith("norm")
        if (linear and kind.startswith("weight")) or norm:
            found[f"{module}._extra_state"] = None
        if spec == "te" and module.endswith("self_attention.linear_proj"):
            found[f"{module.replace('linear_proj', 'core_attention')}._extra_state"] = None
    return list(found)
