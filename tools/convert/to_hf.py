"""Plan: a Hugging Face folder."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from megapatch.models import hf_files
from megapatch.models.cuts import Region
from megapatch.models.family import find
from megapatch.models.rules import Placed
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.matrix import Matrix
from megapatch.tools.convert.plan import Entry, Literal, Plan
from megapatch.tools.convert.source import Model, Source, add_side_files, choose_dtype

_SHARD_BYTES = 5 * 10**9


class Weight(NamedTuple):
    """A Hugging Face tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: Matrix

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def plan(source: Source, dtype: str, max_shard_bytes: int | None) -> Plan:
    """The copy list that makes the folder; ``max_shard_bytes``: None as the model came, else by size."""
    made = Plan(notes=list(source.notes))
    weights = {w.name: w for placed in source.model.layout.placed for w in _weights(source, placed, dtype)}
    weights |= _repeated(source.model, weights)
    files = _files(source.model, weights, max_shard_bytes)
    for file, names in files.items():
        made.entries += file_of(file, weights, names)
    if list(files) != [hf_files.SINGLE]:
        sizes = {name: weight.size for name, weight in weights.items()}
        index = hf_files.index_json(files, sizes, sum(prod(weight.shape) for weight in weights.values()))
        made.entries.append(Literal(hf_files.INDEX, 0, _as_it_came(source.model, index)))
    add_side_files(source.model, made)
    return made.finish()


def file_of(file: str, weights: Mapping[str, Weight], names: Sequence[str]) -> Iterator[Entry]:
    """A .safetensors file with these weights, byte for byte as the library lays it out."""
    described = hf_files.saved_order([weights[name][:3] for name in names])
    header, offsets, _ = hf_files.header(described)
    yield Literal(file, 0, header)
    for (name, kind, _), offset in zip(described, offsets, strict=True):
        yield from weights[name].matrix.copies(name, file, offset, kind)


def _as_it_came(model: Model, index: bytes) -> bytes:
    """The model's own index.json where it says the same: tools differ in its form, and in what a parameter is."""
    original = model.index.read_bytes() if model.index else b"{}"
    said, made = json.loads(original), json.loads(index)
    same = said.get("weight_map") == made["weight_map"]
    return original if same and said.get("metadata", {}).get("total_size") == made["metadata"]["total_size"] else index


def _repeated(model: Model, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The copies of weights that files of this model hold: those in index.json, or all where there is none."""
    original = hf_files.index(model.index.parent) if model.index else None
    twins = find(model.config).copies(model.config)
    names = (copy for copy in twins if original is None or copy in original)
    return {copy: weights[twins[copy]]._replace(name=copy) for copy in names}


def _weights(source: Source, placed: Placed, dtype: str) -> list[Weight]:
    """The Hugging Face tensors that a core weight is made of."""
    layout, core = source.model.layout, source.weight(placed)
    taken: list[list[tuple[int, Region]]] = [[] for _ in placed.hf]
    row = 0
    for part, start, rows in layout.packed(placed)[1]:
        taken[part].append((start, Region(row, 0, rows, core.columns)))
        row += rows
    found = []
    for name, shape, regions in zip(placed.hf, layout.parts(placed), taken, strict=True):
        matrix = core.take([region for _, region in sorted(regions)])
        matrix = matrix.transposed() if placed.rule.transposed else matrix
        found.append(Weight(name, choose_dtype(dtype, matrix, name, placed.rule.core), shape, matrix))
    return found


def _files(model: Model, weights: Mapping[str, Weight], max_shard_bytes: int | None) -> dict[str, list[str]]:
    """The weights of each file: as the model came, or by size."""
    original = hf_files.index(model.index.parent) if model.index and max_shard_bytes is None else None
    names: Sequence[str] = list(weights)
    if original is None or set(original) != set(names):
        return hf_files.shards({w.name: w.size for w in weights.values()}, max_shard_bytes or _SHARD_BYTES)
    order = sorted(names, key=lambda name: original[name])  # stable: in the model's order within a file
    return {file: list(group) for file, group in itertools.groupby(order, key=lambda name: original[name])}
