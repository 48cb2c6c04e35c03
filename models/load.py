"""Weights into a model, at any layout: from a core checkpoint, or straight from a Hugging Face folder.

Of a Hugging Face folder each process reads only its own slices. megatron-core's own sharding metadata says which part
of which tensor a process holds; the weight rules say which rows of which Hugging Face tensors those are. No rule about
tensor parallelism is written down twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors import safe_open

from megapatch.models import core_files, hf_files
from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig
from megapatch.models.held import as_held, copies, full_names
from megapatch.models.rules import Placed
from megapatch.models.shapes import Layout

Address = tuple[str, tuple[int, ...]]  # checkpoint key, place on its leading axes (layer, expert)


class HfWeights:
    """The weights of a folder, addressed by checkpoint key and region. Checked as a whole when opened (UserError)."""

    def __init__(self, folder: Path, hf: HfConfig) -> None:
        if "quantization_config" in hf:
            raise UserError(f"{folder}: quantised weights; make a core checkpoint of them with mp-convert first")
        stored = hf_files.tensors(folder)
        hf = as_held(hf, stored)
        layout = Layout(hf)
        self.layout, self.folder = layout, folder
        self.placed = {_address(placed, layout.stacked): placed for placed in layout.placed}
        self.shapes = {name: shape for p in layout.placed for name, shape in zip(p.hf, layout.parts(p), strict=True)}
        names = full_names(hf, stored, self.shapes)
        found = {name: stored[there] for there, name in names.items()}
        _refuse(folder, "is missing", set(self.shapes) - set(found))
        _refuse(folder, "has no rule: megapatch would drop it", set(found) - set(self.shapes) - copies(hf).keys())
        for name, shape in self.shapes.items():
            if found[name].shape != shape:
                there = f"shape {list(found[name].shape)} in {found[name].file.name}"
                raise UserError(f"{name}: {there}, {list(shape)} by config.json; is it the right config.json?")
        opened = {path: safe_open(path, framework="pt") for path in {tensor.file for tensor in found.values()}}
        self.files = {name: (opened[tensor.file], tensor.name) for name, tensor in found.items()}

    def full_shape(self, address: Address) -> tuple[int, ...]:
        """Shape of a core tensor as the folder has it (leading axes left out)."""
        if address not in self.placed:
            refuse_lack(self.folder, address[0])
            raise UserError(
                f"{address[0]}: the model has this weight, but the rules of its family have not; report this"
            )
        return self.layout.packed(self.placed[address])[0]

    def region(self, address: Address, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The part of a core tensor that starts at ``start`` and has ``shape`` (leading axes left out)."""
        placed = self.placed[address]
        pieces, at, stop = [], 0, start[0] + shape[0]
        for part, first, rows in self.layout.packed(placed)[1]:
            low, high = max(start[0], at), min(stop, at + rows)
            if low < high:
                file, name = self.files[placed.hf[part]]
                stored, place = file.get_slice(name), slice(first + low - at, first + high - at)
                pieces.append(stored[:, place].T if placed.rule.transposed else stored[place])
            at += rows
        region = torch.cat(pieces)
        for axis, (first, size) in enumerate(zip(start[1:], shape[1:], strict=True), start=1):
            region = region.narrow(axis, first, size)
        return region


def _address(placed: Placed, stacked: bool) -> Address:
    leading = (placed.layer if stacked else None, placed.expert)
    return placed.key(stacked), tuple(axis for axis in leading if axis is not None)


def refuse_lack(folder: Path, key: str) -> None:
    """Refuse a weight that is not there for multi-token prediction (UserError)."""
    if key.startswith("mtp."):
        raise UserError(f"{folder}: has no layers for multi-token prediction; leave out --mtp-loss-weight")


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(f"{folder}: {min(names)} {what}{more}; is this the folder that config.json belongs to?")


def sharded_state(model: Any, **content: Any) -> dict[str, Any]:
    """The model's state as megatron-core shards it, in the form that ``content`` says."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)  # read with multi-token prediction
    return model.sharded_state_dict(metadata={"dp_cp_group": group, **content})


def sharded_tensors(model: Any) -> Iterator[ShardedTensor]:
    """Every tensor of a model as megatron-core shards it; their data are views of the parameters."""
    state = sharded_state(model)
    apply_factories(state)
    yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def hf_folder(model: Path) -> Path:
    """Where config.json and the tokenizer of ``model`` lie: itself, or inside the core checkpoint that it means."""
    return core_files.resolve(model) / core_files.HF_SUBFOLDER if core_files.is_core(model) else model


def load_weights(chunks: Sequence[torch.nn.Module], model: Path, hf: HfConfig) -> None:
    """Fill this process's part of a model from a core checkpoint or a Hugging Face folder (UserError: no fit)."""
    if core_files.is_core(model):
        load_core(chunks, core_files.resolve(model))
    else:
        load_hf(chunks, model, hf)


def load_core(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fill this process's part of a model from a torch_dist checkpoint folder; every rank must call."""
    core_files.load_metadata_safely(folder)
    models = {f"model{i}": unwrapped(chunk) for i, chunk in enumerate(chunks)}
    state = {name: sharded_state(model) for name, model in models.items()}
    with core_files.Checkpoint(folder) as checkpoint:
        if any(key.endswith(".lora_A") for key in checkpoint.tensors):
            raise UserError(f"{folder}: holds adapters only; merge them with mp-convert --merge-lora first")
        for key in {tensor.key for model in models.values() for tensor in sharded_tensors(model)}:
            if key.startswith("mtp.") and key not in checkpoint.tensors:
                refuse_lack(folder, key)
    loaded = dist_checkpointing.load(state, str(folder))
    for name, model in models.items():
        model.load_state_dict(loaded.get(name, {}))  # a chunk of an uneven pipeline may be empty


def unwrapped(chunk: Any) -> Any:
    """The GPTModel inside the wrappers for bf16 and data parallelism."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@torch.no_grad()
def load_hf(chunks: Iterable[torch.nn.Module], folder: Path, hf: HfConfig) -> None:
    """Fill this process's part of a model from a Hugging Face folder (UserError when they do not fit)."""
    weights = HfWeights(folder, hf)
    for chunk in chunks:
        for tensor in sharded_tensors(unwrapped(chunk)):
            fill(tensor, weights)


def fill(tensor: ShardedTensor, weights: HfWeights) -> None:
    """Copy one shard; the rows that pad the vocabulary stay as they are."""
    leading = tensor.prepend_axis_num
    address = tensor.key, tuple(tensor.global_offset[:leading])
    start, whole = tensor.global_offset[leading:], weights.full_shape(address)
    shape = list(tensor.local_shape)
    if tensor.allow_shape_mismatch:
        shape[0] = max(0, min(shape[0], whole[0] - start[0]))
    else:
        assert tuple(tensor.global_shape[leading:]) == whole, (
            f"{tensor.key}: the model has another shape than config.json"
        )
    if shape[0]:
        tensor.data[: shape[0]].copy_(weights.region(address, start, shape))
