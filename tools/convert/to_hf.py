"""Plan: a Hugging Face folder."""

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from megapatch.models import hf_files
from megapatch.models.cuts import Region
from megapatch.models.rules import Placed
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.matrix import Matrix
from megapatch.tools.convert.plan import Literal, Plan
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
    files = _files(source.model, weights, max_shard_bytes)
    for file, names in files.items():
        described = hf_files.saved_order([weights[name][:3] for name in names])
        header, offsets, _ = hf_files.header(described)
        made.entries.append(Literal(file, 0, header))
        for (name, kind, _), offset in zip(described, offsets, strict=True):
            made.entries += weights[name].matrix.copies(name, file, offset, kind)
    if list(files) != [hf_files.SINGLE]:
        sizes = {name: weight.size for name, weight in weights.items()}
        index = hf_files.index_json(files, sizes, sum(prod(weight.shape) for weight in weights.values()))
        made.entries.append(Literal(hf_files.INDEX, 0, index))
    add_side_files(source.model, made)
    return made.finish()


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
