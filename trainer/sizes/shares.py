"""Which rank owns what: layers, experts, heads, and how many parameters. Arithmetic; imports no torch.

Ranks are counted as megatron-core does ("tp-cp-ep-dp-pp"): tensor parallelism varies fastest, the pipeline slowest;
experts have a grid of their own over the same ranks, without context parallelism.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from megapatch.models.cuts import WHOLE, cut_of, padded_vocabulary
from megapatch.models.family import HfConfig, find, tied_embeddings
from megapatch.models.parallel import Parallel
from megapatch.models.rules import Rule
from megapatch.models.shapes import part_shapes, sizes

FIRST = ("embedding.",)
BUFFERS = ("router.expert_bias",)  # follows the load; no gradient, no optimizer state


@dataclass(frozen=True)
class Place:
    """Where a rank stands in each kind of parallelism."""

    rank: int
    pp: int
    dp: int
    cp: int
    tp: int
    expert_dp: int
    ep: int
    etp: int


def place(parallel: Parallel, world_size: int, rank: int) -> Place:
    """The place of a rank."""
    stage = world_size // parallel.pp
    pp, inside = divmod(rank, stage)
    dense, tp = divmod(inside, parallel.tp)
    dp, cp = divmod(dense, parallel.cp)
    experts, etp = divmod(inside, parallel.expert_tp)
    expert_dp, ep = divmod(experts, parallel.ep)
    return Place(rank, pp, dp, cp, tp, expert_dp, ep, etp)


def stage_layers(parallel: Parallel, num_layers: int, stage: int) -> list[range]:
    """The layers of a pipeline stage, counted from 0: one range for each of its chunks."""
    found, start = [], 0
    for counts in parallel.stage_layers(num_layers):
        first = start + sum(counts[:stage])
        found.append(range(first, first + counts[stage]))
        start += sum(counts)
    return found


@dataclass(frozen=True)
class Share:
    """Parameters of one rank: those that all of a stage's data-parallel ranks have, and those of its experts."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def share(hf: HfConfig, parallel: Parallel, stage: int, *, predicting: bool) -> Share:
    """What a rank of a pipeline stage holds; equal for all ranks of the stage."""
    config, letters = find(hf).transformer_config(hf), sizes(hf)
    letters = {**letters, "v": padded_vocabulary(letters["v"], 1, parallel.tp)}
    layers = {layer for chunk in stage_layers(parallel, config["num_layers"], stage) for layer in chunk}
    dense = experts = 0
    for rule in find(hf).model_rules(hf):
        count = _times(rule, hf, parallel, stage, layers, predicting)
        if not count or rule.core.endswith(BUFFERS):
            continue
        expert = "{e}" in rule.core
        size = parallel.expert_tp if expert else parallel.tp
        cut = cut_of(rule.core, config["gated_linear_unit"], size)
        numbers = sum(map(prod, part_shapes(rule, letters))) // (1 if cut == WHOLE else size)
        if expert:
            experts += count * numbers * (config["num_moe_experts"] // parallel.ep)
        else:
            dense += count * numbers
    return Share(dense, experts)


def _times(rule: Rule, hf: HfConfig, parallel: Parallel, stage: int, layers: set[int], predicting: bool) -> int:
    """How many of the weights of a rule, experts aside, a stage has."""
    first, last = stage == 0, stage == parallel.pp - 1
    if rule.core.startswith("mtp."):
        return int(last and predicting)
    if "{l}" in rule.core:
        return len(layers if rule.layers is None else layers.intersection(rule.layers))
    if not rule.core.startswith(FIRST):
        return int(last)
    again = predicting or (tied_embeddings(hf) and rule.core == "embedding.word_embeddings.weight")
    return int(first or (last and again))


def active_parameters(hf: HfConfig, sizes_of_model: Any, total: int) -> int:
    """Parameters that one token meets: of the experts of each layer, those that its router chooses."""
    experts = sizes_of_model.num_moe_experts or 0
    if not experts:
        return total
    letters, unused = sizes(hf), 0
    for rule in find(hf).model_rules(hf):
        if "{e}" in rule.core and (sizes_of_model.mtp_num_layers or not rule.core.startswith("mtp.")):
            where = 1 if "{l}" not in rule.core else _placed(rule, sizes_of_model.num_layers)
            idle = experts - sizes_of_model.moe_router_topk
            unused += where * idle * sum(map(prod, part_shapes(rule, letters)))
    return total - unused


def _placed(rule: Rule, num_layers: int) -> int:
    return num_layers if rule.layers is None else len(rule.layers)
