"""One shard of a model at a time from a core checkpoint's files: megatron-core's loader takes whole models."""

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megapatch.models import core_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import Checkpoint, Chunk
from megapatch.models.torch_save import ITEM_BYTES


class CoreWeights:
    """The tensors of a torch_dist folder. Its pickles pass the allow-list first (UserError)."""

    def __init__(self, folder: Path) -> None:
        core_files.load_metadata_safely(folder)
        self.folder, self.checkpoint = folder, Checkpoint(folder)

    def fill(self, tensor: ShardedTensor) -> None:
        """Copy one shard; rows that pad the vocabulary on either side stay as they are."""
        found = self.checkpoint.tensors.get(tensor.key)
        if found is None:
            raise UserError(
                f"{self.folder}: {tensor.key} is missing; is this a checkpoint of the model in config.json?"
            )
        if found.shape != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            said = f"shape {list(found.shape)} in the checkpoint, {list(tensor.global_shape)} by config.json"
            raise UserError(f"{self.folder}: {tensor.key}: {said}; is it the right config.json?")
        leading = tensor.prepend_axis_num
        lead, start = tuple(tensor.global_offset[:leading]), tensor.global_offset[leading:]
        filled = 0
        for chunk in found.at(lead):
            place, values = self._overlap(tensor.key, chunk, lead, start, tensor.local_shape)
            tensor.data[place].copy_(values)
            filled += values.numel()
        wanted = prod(
            min(n, whole - at) for n, whole, at in zip(tensor.local_shape, found.shape[leading:], start, strict=True)
        )
        if filled != wanted:
            raise UserError(f"{self.folder}: {tensor.key}: {filled} of {wanted} elements are there; it is incomplete")

    def _overlap(
        self, key: str, chunk: Chunk, lead: tuple[int, ...], start: Sequence[int], shape: Sequence[int]
    ) -> tuple[tuple[slice, ...], Tensor]:
        """Where in the shard the chunk's elements go, and their values."""
        there, here = [], []
        for first, size, at, wanted in zip(
            chunk.offsets[len(lead) :], chunk.sizes[len(lead) :], start, shape, strict=True
        ):
            low, high = max(first, at), max(first, at, min(first + size, at + wanted))
            there.append(slice(low - first, high - first))
            here.append(slice(low - at, high - at))
        return tuple(here), self._values(key, chunk, lead)[tuple(there)]

    def _values(self, key: str, chunk: Chunk, lead: tuple[int, ...]) -> Tensor:
        """The chunk at one layer and expert."""
        tensor, depth = self.checkpoint.tensors[key], len(lead)
        inner, index = chunk.sizes[depth:], 0
        for at, first, size in zip(lead, chunk.offsets, chunk.sizes, strict=False):
            index = index * size + at - first
        length = prod(inner) * ITEM_BYTES[tensor.dtype]
        offset = self.checkpoint.locate(tensor, chunk) + index * length
        with (self.folder / chunk.file).open("rb") as file:
            data = bytearray(os.pread(file.fileno(), length, offset))
        return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype)).reshape(inner)
