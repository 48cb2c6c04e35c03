"""megatron-core's side of a comparison: a model without storage, filled layer by layer from either kind of folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, apply_factories
from torch import Tensor

from megapatch.models import core_files, load
from megapatch.models.build import ModelOptions, build
from megapatch.models.device import Device, seed_everything
from megapatch.models.family import HfConfig
from megapatch.models.parallel import Parallel
from megapatch.models.shapes import Layout
from megapatch.tools.verify.core_weights import CoreWeights
from megapatch.tools.verify.points import Watch, Weight
from megapatch.tools.verify.stream import OUTER, Engine, Unit, empty_parameters


class CoreFolder:
    """Reads parameters of a megatron-core model from a Hugging Face folder or a core checkpoint."""

    def __init__(self, folder: Path, hf: HfConfig) -> None:
        if core_files.is_core(folder):
            self.fill = CoreWeights(core_files.resolve(folder)).fill
        else:
            self.fill = partial(load.fill, weights=load.HfWeights(folder, hf))

    def read(self, state: dict[str, Any]) -> Mapping[str, Tensor]:
        """Fill the sharded tensors of a state dictionary; returns the values by its names."""
        made = {name: entry.data for name, entry in state.items()}
        apply_factories(state)
        for tensor in nested_values(state):
            self.fill(tensor)
        return made


def engine(folder: Path, hf: HfConfig, ids: Tensor, device: Device, precision: Any, rounded: bool) -> Engine:
    """``folder`` on megatron-core; with ``rounded`` every weight is one that bf16 can hold."""
    seed_everything(0, 0)
    with empty_parameters():
        (chunk,) = build(hf, ModelOptions(Parallel(), device, precision, overrides={"perform_initialization": False}))
    model = load.unwrapped(chunk)
    entries = {name: entry for name, entry in load.sharded_state(model).items() if _is_weight(entry)}
    source = CoreFolder(folder, hf)
    _fill_buffers({name: entry for name, entry in entries.items() if not entry.data.is_meta}, source)
    meaning = _meaning(entries, Layout(hf))
    layers = {f"decoder.layers.{n}": n for n in range(len(model.decoder.layers))}
    units: dict[str, Unit] = {**layers, **{name: name for name in OUTER}}
    positions = ids.new_tensor(range(ids.shape[1])).expand_as(ids)
    b, s = ids.shape

    def batch_first(x: Tensor) -> Tensor:
        """[s, b, ...] or [s*b, n] -> [b, s, ...]"""
        return (x.unflatten(0, (s, b)) if x.dim() == 2 else x).transpose(0, 1)

    def values(names: Sequence[str]) -> Mapping[str, Tensor]:
        state = {n: replace(entries[n], data=torch.empty_like(entries[n].data, device=device.torch)) for n in names}
        read = source.read(state)
        return {name: read[name].bfloat16().to(read[name].dtype) if rounded else read[name] for name in names}

    watch = Watch(model, meaning, units, batch_first)
    return Engine(
        model=model,
        forward=lambda: chunk.eval()(ids, positions, None),
        units=units,
        load=values,
        watch=watch.layer,
        outward=lambda x, unit: x if unit == OUTER[0] else x.transpose(0, 1),  # [s, b, ...] -> [b, s, ...]
        inward=lambda x: x.transpose(0, 1).contiguous().to(model.config.params_dtype),
        about=f"{folder}: megatron-core, {precision}",
        leaves=watch.leaves,
    )


def _is_weight(entry: Any) -> bool:
    return isinstance(entry, ShardedTensor | ShardedTensorFactory) and not isinstance(entry, ShardedObject)


def _fill_buffers(entries: Mapping[str, Any], source: CoreFolder) -> None:
    buffers = {name: entry.data for name, entry in entries.items()}
    if buffers:
        for name, value in source.read(dict(entries)).items():
            buffers[name].copy_(value)


def _meaning(entries: Mapping[str, Any], layout: Layout) -> dict[str, list[Weight]]:
    """Parameter -> the rule that makes it, at its layer and expert."""
    places = {(p.key(layout.stacked), tuple(n for n, _ in layout.axes(p, layout.stacked))): p for p in layout.placed}
    found = {}
    for name, entry in entries.items():
        first = _first_tensor(entry)
        place = places.get((first.key, tuple(first.global_offset[: first.prepend_axis_num])))
        if place is not None:
            found[name] = [Weight(place, None, layout)]
    return found


def _first_tensor(entry: Any) -> ShardedTensor:
    if isinstance(entry, ShardedTensor):
        return entry
    return next(t for t in nested_values(entry.build()) if isinstance(t, ShardedTensor))


def whole(folder: Path, hf: HfConfig, ids: Tensor, device: Device) -> Tensor:
    """fp32 logits [b, s, v] of the whole model at once."""
    seed_everything(0, 0)
    (model,) = build(hf, ModelOptions(Parallel(), device))
    load.load_weights([model], folder, hf)
    positions = ids.new_tensor(range(ids.shape[1])).expand_as(ids)
    return model.eval()(ids, positions, None)
