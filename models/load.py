"""Weights into a model, at any layout: from a core checkpoint, or straight from a Hugging Face folder.

Of a Hugging Face folder each process reads only its own slices. megatron-core's own sharding metadata says which part
of which tensor a process holds; the weight rules say which rows of which Hugging Face tensors those are. No rule about
tensor parallelism is written down twice.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors import SafetensorError, safe_open

from megapatch.models import core_files
from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig, find, placed_rules, stacked_layers
from megapatch.models.rules import Placed

Address = tuple[str, tuple[int, ...]]  # checkpoint key, place on its leading axes (layer, expert)


class HfWeights:
    """The weights of a folder, addressed by checkpoint key and region. Checked as a whole when opened."""

    def __init__(self, folder: Path, hf: HfConfig) -> None:
        self.folder = folder
        self.groups = find(hf).transformer_config(hf)["num_query_groups"]
        stacked = stacked_layers(hf)
        self.rules = {_address(placed, stacked): placed for placed in placed_rules(hf)}
        self.files = _open_files(folder)
        wanted = {name for placed in self.rules.values() for name in placed.hf}
        _refuse(folder, "is missing", wanted - set(self.files))
        _refuse(folder, "has no rule: megapatch would drop it", set(self.files) - wanted - _tied_copies(hf))

    def region(self, address: Address, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The part of a core tensor that starts at ``start`` and has ``shape`` (leading axes left out)."""
        placed = self.rules.get(address)
        if placed is None:
            raise UserError(
                f"{address[0]}: the model has this weight, but config.json describes none; unsupported setting?"
            )
        slices = [self.files[name].get_slice(name) for name in placed.hf]
        blocks = placed.rule.blocks([s.get_shape()[0] for s in slices], self.groups)
        pieces, at, stop = [], 0, start[0] + shape[0]
        for part, first, rows in blocks:
            low, high = max(start[0], at), min(stop, at + rows)
            if low < high:
                pieces.append(slices[part][first + low - at : first + high - at])
            at += rows
        rows_read = torch.cat(pieces)
        for axis, (first, size) in enumerate(zip(start[1:], shape[1:], strict=True), start=1):
            rows_read = rows_read.narrow(axis, first, size)
        return rows_read

    def full_shape(self, address: Address) -> tuple[int, ...]:
        """Shape of a core tensor as the folder has it (leading axes left out)."""
        placed = self.rules[address]
        shapes = [self.files[name].get_slice(name).get_shape() for name in placed.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _address(placed: Placed, stacked: bool) -> Address:
    leading = (placed.layer if stacked else None, placed.expert)
    return placed.key(stacked), tuple(axis for axis in leading if axis is not None)


def _tied_copies(hf: HfConfig) -> set[str]:
    """Weights that a folder may hold although they are the same as another one."""
    return {"lm_head.weight"} if hf.get("tie_word_embeddings") else set()


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(f"{folder}: {min(names)} {what}{more}; is this the folder that config.json belongs to?")


def _open_files(folder: Path) -> dict[str, Any]:
    """Open safetensors file by tensor name."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    opened: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; a Hugging Face folder with safetensors weights is needed")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path}: not a complete safetensors file ({error}); copy or download it again") from error
        opened |= dict.fromkeys(file.keys(), file)
    return opened


def sharded_tensors(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every tensor of a model as megatron-core shards it; their data are views of the parameters."""
    state = model.sharded_state_dict()
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
    state = {name: model.sharded_state_dict() for name, model in models.items()}
    loaded = dist_checkpointing.load(state, str(folder))
    for name, model in models.items():
        model.load_state_dict(loaded[name])


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
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
            _fill(tensor, weights)


def _fill(tensor: ShardedTensor, weights: HfWeights) -> None:
    """Copy one shard; the rows that pad the vocabulary stay as they are."""
    leading = tensor.prepend_axis_num
    address = tensor.key, tuple(tensor.global_offset[:leading])
    start, want = tensor.global_offset[leading:], tuple(tensor.global_shape[leading:])
    shape = list(tensor.local_shape)
    found = weights.full_shape(address) if address in weights.rules else want
    if found != want and not (tensor.allow_shape_mismatch and found[1:] == want[1:] and found[0] <= want[0]):
        names = ", ".join(weights.rules[address].hf)
        raise UserError(
            f"{names}: shape {list(found)} in the files, {list(want)} by config.json; is it the right config.json?"
        )
    shape[0] = max(0, min(shape[0], found[0] - start[0]))
    if shape[0]:
        tensor.data[: shape[0]].copy_(weights.region(address, start, shape))
