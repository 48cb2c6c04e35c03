"""One rank's part of a model at full scale, built without memory: meta tensors, a process group that sends nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megapatch.models.build import ModelOptions, build
from megapatch.models.device import Device, seed_everything
from megapatch.models.family import HfConfig
from megapatch.models.parallel import Parallel


class Meta(Device):
    """The same device, whose tensors have shapes and no content."""

    @property
    def torch(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def pretending(parallel: Parallel, world_size: int, rank: int) -> Iterator[None]:
    """megatron-core's groups as ``rank`` of ``world_size`` would have them, in this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.expert_tp,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def parameters(hf: HfConfig, made: ModelOptions, world_size: int, rank: int) -> int:
    """How many parameters ``rank`` builds of the model that ``made`` describes."""
    device = Meta(made.device.kind, made.device.transformer_engine, made.device.flash_attention, made.device.reason)
    empty = replace(made, device=device, overrides=made.overrides | {"perform_initialization": False})
    with pretending(made.parallel, world_size, rank):
        seed_everything(0, 0)
        with torch.device("meta"):
            chunks = build(hf, empty)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
