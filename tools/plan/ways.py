"""What there is to choose from: ways to cut a model over GPUs, and what may be computed again."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.device import Device
from megapatch.models.family import HfConfig, find
from megapatch.models.layers import spec
from megapatch.models.parallel import Parallel
from megapatch.models.planning.stages import GRADIENT, WIDTH, Layout
from megapatch.models.planning.trace import layer_kinds
from megapatch.models.rules import Rule
from megapatch.models.shapes import num_parameters, part_shapes, sizes
from megapatch.tools.plan.machines import Machine

LEAST_TOKENS = 1024  # of a sequence on a rank with --cp
NARROWEST = 1024  # feed-forward of an expert on a rank with --etp


@dataclass(frozen=True)
class Asked:
    """A run to be planned, and what for. ``budget_bytes`` of a GPU's memory are there for tensors."""

    hf: HfConfig
    device: Device
    machine: Machine
    gpus: int
    node: int
    budget_bytes: float
    seq_length: int
    batch: int
    precision: Any = "bf16"
    load: float = 1.0
    slack: float = 0.0
    offload: bool = True
    host_bytes: float = math.inf  # of a GPU's share of its node

    @cached_property
    def config(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig."""
        return find(self.hf).transformer_config(self.hf)

    @cached_property
    def pipelines(self) -> bool:
        """Whether the layers divide into stages of any number of these GPUs."""
        return any(self.gpus % pp == 0 for pp in divisors(self.config["num_layers"])[1:])

    @cached_property
    def kinds(self) -> list[str]:
        """Of each layer."""
        return layer_kinds(self.hf)


@dataclass(frozen=True)
class Again:
    """What is computed again in the backward pass: parts of each layer, or whole layers, or nothing."""

    parts: tuple[str, ...] = ()
    full: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Of TransformerConfig."""
        if self.full:
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        return {"recompute_granularity": "selective", "recompute_modules": list(self.parts)} if self.parts else {}


def ways_again(asked: Asked) -> list[Again]:
    """From nothing to everything."""
    own = spec.resolve(find(asked.hf).modules(asked.hf)).layer is not spec.TransformerLayer
    light = () if own else ("layernorm",)
    if asked.config.get("multi_latent_attention"):
        light = (*light, "mla_up_proj")
    heavy = ("moe",) if asked.config.get("num_moe_experts") else () if own else ("mlp",)
    return list(dict.fromkeys([Again(), Again(light), Again((*light, *heavy)), Again(full=True)]))


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(asked: Asked) -> Iterator[Layout]:
    """Every way to cut the model over the GPUs that megatron-core can build."""
    experts, layers = asked.config.get("num_moe_experts") or 1, asked.config["num_layers"]
    for tp in (n for n in divisors(asked.gpus) if n <= asked.node):
        for pp in (n for n in divisors(asked.gpus // tp) if layers % n == 0):
            for cp in (n for n in divisors(asked.gpus // tp // pp) if _long_enough(asked, n, tp)):
                for ep in (n for n in divisors(experts) if asked.gpus // pp % n == 0):
                    for etp in {1, tp} if ep > 1 else {tp}:
                        if asked.gpus // pp % (etp * ep) == 0 and possible(asked, tp, pp, cp, ep, etp):
                            yield Layout(asked.gpus, tp, pp, 1, cp, ep, etp)


def _long_enough(asked: Asked, cp: int, tp: int) -> bool:
    tokens = asked.seq_length // cp
    return cp == 1 or (asked.seq_length % (2 * cp) == 0 and tokens >= LEAST_TOKENS and tokens % tp == 0)


def possible(asked: Asked, tp: int, pp: int, cp: int, ep: int, etp: int) -> bool:
    """Whether the layers' tensors divide, and the batch over the copies."""
    config = asked.config
    width = config.get("moe_ffn_hidden_size") or 0
    wide = width % etp == 0 and (etp == 1 or not width or width // etp >= NARROWEST)
    copies = asked.gpus // (tp * pp * cp)
    if not wide or asked.batch % copies or asked.seq_length % tp or config["ffn_hidden_size"] % tp:
        return False
    try:
        parallel(tp, cp, ep, etp, pp).check_model(config)
    except UserError:
        return False
    return True


def parallel(tp: int, cp: int, ep: int, etp: int, pp: int = 1) -> Parallel:
    """The same for models/."""
    return Parallel(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sequence_parallel=tp > 1)


def least_bytes(asked: Asked, layout: Layout) -> float:
    """Weights and gradients of an even share: what a layout needs at least, known without a trace."""
    letters, total = sizes(asked.hf), num_parameters(asked.hf)
    rules = [rule for rule in find(asked.hf).model_rules(asked.hf) if "{e}" in rule.core]
    experts = sum(_numbers(rule, letters, asked) for rule in rules)
    shared = (total - experts) / layout.tp + experts / (layout.ep * layout.etp)
    return shared / layout.pp * (WIDTH[asked.precision] + GRADIENT)


def _numbers(rule: Rule, letters: Any, asked: Asked) -> int:
    layers = len(asked.kinds) if rule.layers is None else len(rule.layers)
    return sum(map(math.prod, part_shapes(rule, letters))) * layers * (asked.config.get("num_moe_experts") or 0)


def groups(every: Iterable[Layout]) -> list[list[Layout]]:
    """Layouts that share their traces."""
    found: dict[tuple[int, ...], list[Layout]] = {}
    for layout in every:
        found.setdefault((layout.tp, layout.cp, layout.ep, layout.etp), []).append(layout)
    return list(found.values())
