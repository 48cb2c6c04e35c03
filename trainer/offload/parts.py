"""megatron-core's optimizers with chunks in the place of their masters and moments.

What they know of gradients stays theirs: norm, clipping, reduction and gathering. Each keeps its class, and is one of
ours besides: a copy of the object made by ``get_megatron_optimizer``.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from torch import Tensor

from megapatch.trainer.offload.adam import ChunkedAdam


class Offloaded(MegatronOptimizer):
    """An optimizer whose ``optimizer`` is a ChunkedAdam, which also updates the weights."""

    optimizer: ChunkedAdam

    def _copy_main_params_to_model_params(self) -> None:
        """Chunks did."""

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        assert state_dict is None, "masters follow the weights"
        self.optimizer.take_weights()


class OffloadedDistributed(Offloaded, DistributedOptimizer):
    """Its state goes through checkpoints as megatron-core gathers and scatters it."""

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        return self.optimizer.tensors(model_param)

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Tensor]) -> None:
        self.optimizer.set_tensors(model_param, tensors)


class OffloadedHalf(Offloaded, Float16OptimizerWithFloat16Params):
    """Weights in bf16, not distributed."""


class OffloadedFull(Offloaded, FP32Optimizer):
    """Weights in fp32, not distributed."""


KINDS: dict[type, type[Offloaded]] = {
    DistributedOptimizer: OffloadedDistributed,
    Float16OptimizerWithFloat16Params: OffloadedHalf,
    FP32Optimizer: OffloadedFull,
}


def without_masters(config: OptimizerConfig, wrapped: list[Any], overrides: Any) -> Any:
    """megatron-core's optimizer, where masters are stand-ins without memory: only their gradients are used.

    A distributed one never makes them; another makes and drops them.
    """
    # what "precision-aware" means in 0.16.1: masters and moments are someone else's
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = config.use_distributed_optimizer
    made = get_megatron_optimizer(config, wrapped, overrides)
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
    for part in made.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            _stand_in_distributed(part)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for masters in part.fp32_from_float16_groups:
                for master in masters:
                    master.data = _no_memory(master)
    return made


def _stand_in_distributed(part: DistributedOptimizer) -> None:
    groups = zip(
        part.optimizer.param_groups,
        part.shard_fp32_groups,
        part.model_float16_groups,
        part.shard_float16_groups,
        part.shard_fp32_from_float16_groups,
        strict=True,
    )
    for group, native, parameters, weights, masters in groups:
        for i, (parameter, weight) in enumerate(zip(parameters, weights, strict=True)):
            masters[i] = _no_memory(weight)
            tensor_parallel.copy_tensor_model_parallel_attributes(masters[i], parameter)
            if hasattr(parameter, "shared"):
                masters[i].shared = parameter.shared
            parameter.main_param = masters[i]
        group["params"] = [*native, *masters]


def _no_memory(like: Tensor) -> Tensor:
    """fp32, of this shape and device, one number in all."""
    return torch.zeros((), dtype=torch.float32, device=like.device).expand(like.shape)


def take_over(part: MegatronOptimizer, adam: ChunkedAdam) -> Offloaded:
    """The same optimizer, ours."""
    taken = object.__new__(KINDS[type(part)])
    taken.__dict__.update(part.__dict__)
    taken.optimizer = adam
    return taken
