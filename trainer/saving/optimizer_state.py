"""The optimizer's part of a checkpoint, the same for every layout, and for a distributed and a plain optimizer.

Per parameter, named and cut like the parameter: Adam's two moments and, where the parameter is not fp32, its fp32
master. megatron-core 0.16.1 stores the two kinds of optimizer differently, cannot load a distributed one without
Transformer Engine or Apex, and brings back the old run's settings over the options of the new one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megapatch.trainer.offload.parts import Offloaded

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
Parameter = torch.nn.Parameter


def allocate(optimizer: Any) -> None:
    """Give every parameter of this rank Adam's state, as before the first step; PyTorch's Adam runs fused."""
    for part in _parts(optimizer):
        if isinstance(part, Offloaded):
            continue  # chunks have it from the beginning
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups if isinstance(part.optimizer, TORCH_ADAM) else ():
            group |= {"fused": True, "foreach": False}  # one pass over memory; megatron-core leaves it unset
    set_updates(optimizer, 0)


def set_updates(optimizer: Any, updates: int) -> None:
    """Tell Adam how many updates its moments have seen."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if isinstance(part, Offloaded):
            part.optimizer.updates = updates
            continue
        for group in inner.param_groups:
            if not isinstance(inner, TORCH_ADAM):  # Transformer Engine's counts by group
                group["step"] = updates
                continue
            for parameter in group["params"]:
                inner.state[parameter]["step"] = torch.tensor(float(updates), device=parameter.device)


def sharded(optimizer: Any, models: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """megatron-core's description of the state: which part of which tensor of the checkpoint lies where.

    ``models``: sharded state dicts of all chunks. Every rank must call: a distributed optimizer gathers its shards.
    """
    return {str(i): _sharded(part, models, loading) for i, part in enumerate(_parts(optimizer))}


def _sharded(part: Any, models: dict[str, Any], loading: bool) -> dict[str, Any]:
    if isinstance(part, DistributedOptimizer):
        return _gathered(part, models, loading)
    pairs = list(_masters(part))
    by_number = get_param_id_to_sharded_param_map(models, iter([parameter for parameter, _ in pairs]))
    return {
        str(i): {
            name: make_sharded_optimizer_tensor(by_number[i], tensor, f"optimizer.state.{name}")
            for name, tensor in _tensors(part, *pair).items()
        }
        for i, pair in enumerate(pairs)
    }


def _gathered(part: DistributedOptimizer, models: dict[str, Any], loading: bool) -> dict[str, Any]:
    with _without_gaps(part):
        found = part.sharded_param_state_fully_reshardable(models, loading, {})
    for i, parameter in enumerate(_in_buffers(part)):
        master = found[i].pop("param")
        if parameter.dtype != torch.float32:
            key = master.key.replace("optimizer.state.param.", f"optimizer.state.{MASTER}.", 1)
            found[i][MASTER] = replace(master, key=key)
    return {str(i): tensors for i, tensors in found.items()}


@contextmanager
def _without_gaps(part: DistributedOptimizer) -> Iterator[None]:
    """Places of parameters in their buffers without the padding that ends buckets.

    megatron-core 0.16.1 leaves it out of what it gathers, but looks parameters up at their places with it
    (distrib_optimizer.py:1116 and :1484). A shared embedding is a bucket of its own, so --pp 2 is enough to meet it.
    """
    kept = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        lengths = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
        gaps = [bucket.offset - start for bucket, start in zip(buffer.buckets, lengths, strict=False)]
        buffer.param_index_map = {
            parameter: (start - gaps[bucket], end - gaps[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(part.buffers, kept, strict=True):
            buffer.param_index_map = places


@torch.no_grad()
def fill(optimizer: Any, loaded: dict[str, Any], updates: int) -> None:
    """Take over what was loaded as ``sharded`` described it; the models' parameters must be loaded before."""
    for i, part in enumerate(_parts(optimizer)):
        if isinstance(part, Offloaded):
            part.optimizer.take_weights(native=True)  # the others' masters are in the checkpoint
        if isinstance(part, DistributedOptimizer):
            _scatter(part, loaded[str(i)])
            continue
        for n, pair in enumerate(_masters(part)):
            found = loaded[str(i)][str(n)]
            if isinstance(part, Offloaded):
                part.optimizer.set_tensors(
                    pair[0], {"param" if name == MASTER else name: found[name] for name in found}
                )
                continue
            for name, tensor in _tensors(part, *pair).items():
                tensor.copy_(found[name])
    set_updates(optimizer, updates)


def _scatter(part: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Whole tensors into this rank's shards."""
    for state in part.optimizer.state.values():
        state.pop("step", None)  # upstream would look for it among the loaded tensors
    whole = {i: {MASTER: parameter.detach()} | loaded[str(i)] for i, parameter in enumerate(_in_buffers(part))}
    part.load_parameter_state_from_fully_reshardable(whole)


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that hold parameters: dense ones, experts."""
    return [part for part in optimizer.chained_optimizers if part.optimizer is not None]


def _in_buffers(part: DistributedOptimizer) -> list[Parameter]:
    """Parameters in the order in which a distributed optimizer numbers them."""
    return [parameter for buffer in part.buffers for parameter in buffer.param_index_map]


def _masters(part: Any) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Each parameter of a plain optimizer with what the optimizer updates: itself, or its fp32 master."""
    if not isinstance(part, Float16OptimizerWithFloat16Params):
        yield from ((parameter, parameter) for parameter in part.get_parameters())
        return
    for parameters, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(parameters, masters, strict=True)
    for group in part.fp32_from_fp32_groups:
        yield from ((parameter, parameter) for parameter in group)


def _tensors(part: Any, parameter: Parameter, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a plain optimizer keeps for a parameter, by name."""
    own = {} if master is parameter else {MASTER: master.detach()}
    if isinstance(part, Offloaded):
        found = {name: tensor.view(parameter.shape) for name, tensor in part.optimizer.tensors(parameter).items()}
        return {name: found["param" if name == MASTER else name] for name in (*own, *MOMENTS)}
    return own | {name: part.optimizer.state[master][name] for name in MOMENTS}
