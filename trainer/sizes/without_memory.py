"""One rank's part of a model at full scale, built without memory: meta tensors, a process group that sends nothing."""

from dataclasses import replace

import torch

from megapatch.models.build import ModelOptions, build
from megapatch.models.device import Device, seed_everything
from megapatch.models.family import HfConfig
from megapatch.models.planning.groups import pretending


class Meta(Device):
    """The same device, whose tensors have shapes and no content."""

    @property
    def torch(self) -> torch.device:
        return torch.device("meta")


def parameters(hf: HfConfig, made: ModelOptions, world_size: int, rank: int) -> int:
    """How many parameters ``rank`` builds of the model that ``made`` describes."""
    device = Meta(made.device.kind, made.device.transformer_engine, made.device.flash_attention, made.device.reason)
    empty = replace(made, device=device, overrides=made.overrides | {"perform_initialization": False})
    with pretending(made.parallel, world_size, rank):
        seed_everything(0, 0)
        with torch.device("meta"):
            chunks = build(hf, empty)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
