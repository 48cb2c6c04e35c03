"""Plan: core checkpoint -> Hugging Face folder. The chunks may be cut along any axes, as any layout saves them."""

import itertools
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from megapatch.models import hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER, METADATA, Checkpoint, Chunk, Tensor, hf_config
from megapatch.models.rules import Placed
from megapatch.models.shapes import Layout
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import DTYPES, Copy, Literal, Part, Plan

_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # core may store more rows than the vocabulary
_STATE = re.compile(r"(?:^|\.)(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)(?:\.|/|$)")


class Piece(NamedTuple):
    """``rows`` rows of a core tensor (leading axes indexed by ``lead``) that become rows of a Hugging Face tensor."""

    tensor: Tensor
    lead: tuple[int, ...]
    core_row: int
    hf_row: int
    rows: int


class Weight(NamedTuple):
    """A Hugging Face tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]


def plan(source: Path, dtype: str, max_shard_bytes: int | None) -> Plan:
    """The copy list that makes the Hugging Face folder; ``dtype``: keep, bf16, fp16 or fp32."""
    layout = Layout(hf_config(source))
    made = Plan()
    with Checkpoint(source) as checkpoint:
        weights = _weights(layout, checkpoint, made)
        weights = [w._replace(dtype=DTYPES.get(dtype, w.dtype)) for w in weights]
        files = _files(source, weights, max_shard_bytes)
        by_name = {weight.name: weight for weight in weights}
        for file, names in files.items():
            described = hf_files.saved_order([by_name[name][:3] for name in names])
            header, offsets, _ = hf_files.header(described)
            made.entries.append(Literal(file, 0, header))
            for (name, _, _), offset in zip(described, offsets, strict=True):
                made.entries += copies(by_name[name], file, offset, checkpoint)
    if list(files) != [hf_files.SINGLE]:
        index = hf_files.index_json(files, {w.name: _bytes(w) for w in weights}, sum(prod(w.shape) for w in weights))
        made.entries.append(Literal(hf_files.INDEX, 0, index))
    for name, path in hf_files.side_files(source / HF_SUBFOLDER).items():
        made.add_file(path, name)
    return made.finish()


def _bytes(weight: Weight) -> int:
    return prod(weight.shape) * ITEM_BYTES[weight.dtype]


def _files(source: Path, weights: Sequence[Weight], max_shard_bytes: int | None) -> dict[str, list[str]]:
    """The weights of each file: as the model came, or by size."""
    original = hf_files.index(source / HF_SUBFOLDER) if max_shard_bytes is None else None
    names = [weight.name for weight in weights]
    if original is None or set(original) != set(names):
        return hf_files.shards({w.name: _bytes(w) for w in weights}, max_shard_bytes or 5 * 10**9)
    order = sorted(names, key=lambda name: original[name])  # stable: in the model's order within a file
    return {file: list(group) for file, group in itertools.groupby(order, key=lambda name: original[name])}


def _weights(layout: Layout, checkpoint: Checkpoint, made: Plan) -> list[Weight]:
    used, weights = set(), []
    for placed in layout.placed:
        tensor, stacked = _find(placed, checkpoint)
        used.add(tensor.key)
        shapes, axes = layout.parts(placed), layout.axes(placed, stacked)
        _check(placed, tensor, (*(size for _, size in axes), sum(s[0] for s in shapes), *shapes[0][1:]))
        pieces: list[list[Piece]] = [[] for _ in shapes]
        lead, at = tuple(place for place, _ in axes), 0
        for block in placed.rule.blocks([s[0] for s in shapes], layout.sizes):
            pieces[block.part].append(Piece(tensor, lead, at, block.start, block.rows))
            at += block.rows
        weights += [Weight(n, tensor.dtype, s, p) for n, s, p in zip(placed.hf, shapes, pieces, strict=True)]
    _account(checkpoint, used, layout.model_type, made)
    return weights


def _find(placed: Placed, checkpoint: Checkpoint) -> tuple[Tensor, bool]:
    """The tensor that holds a weight, and whether layers are an axis of it (both are in use)."""
    for stacked in (True, False):
        if placed.key(stacked) in checkpoint.tensors:
            return checkpoint.tensors[placed.key(stacked)], stacked
    raise UserError(
        f"{checkpoint.folder / METADATA}: no {placed.key(True)} and no {placed.key(False)}; "
        f"{HF_SUBFOLDER}/config.json asks for it: is it the right config.json?"
    )


def _check(placed: Placed, tensor: Tensor, expected: tuple[int, ...]) -> None:
    found = tensor.shape
    if placed.rule.core in _PADDED and len(found) == len(expected) and found[0] > expected[0]:
        found = (expected[0], *found[1:])
    if found != expected:
        raise UserError(
            f"{tensor.key}: shape {list(tensor.shape)} in the checkpoint, {list(expected)} in config.json; "
            "is this the right config.json?"
        )
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{tensor.key}: dtype {tensor.dtype} is not supported; supported: {', '.join(DTYPES.values())}")


def _account(checkpoint: Checkpoint, used: set[str], model_type: str, made: Plan) -> None:
    """Refuse tensors of the model that have no place in it; name the training state that is left out."""
    state = {key for key in checkpoint.tensors if _STATE.search(key)}
    for key in sorted(checkpoint.tensors.keys() - used - state):
        raise UserError(f"{key}: in the checkpoint, but has no place in a {model_type} model")
    left = state | {key for key in checkpoint.objects if "_extra_state" not in key}
    if left:
        made.notes.append(f"left out: {len(left)} tensors and objects of training state (such as {min(left)})")


def copies(weight: Weight, file: str, offset: int, checkpoint: Checkpoint) -> Iterator[Copy]:
    """The ranges that fill ``weight`` from byte ``offset`` of ``file``."""
    width = prod(weight.shape[1:])
    for piece in sorted(weight.pieces, key=lambda piece: piece.hf_row):
        chunks = [_Rectangle(piece, chunk) for chunk in piece.tensor.at(piece.lead) if 0 not in chunk.sizes]
        edges = {edge for chunk in chunks for edge in (chunk.row, chunk.row + chunk.rows)}
        first, last = piece.core_row, piece.core_row + piece.rows
        bands = sorted({first, last, *(edge for edge in edges if first < edge < last)})
        for row, end in itertools.pairwise(bands):
            across = sorted((c for c in chunks if c.row <= row < c.row + c.rows), key=lambda c: c.column)
            _refuse_gaps(across, width, piece, checkpoint)
            parts = tuple(chunk.part(row, checkpoint) for chunk in across)
            rows = end - row
            if len(parts) == 1:
                parts, rows = (parts[0]._replace(items=rows * width),), 1
            copy = Copy(weight.name, file, offset, parts, rows, piece.tensor.dtype, weight.dtype)
            yield copy
            offset += copy.size


def _refuse_gaps(across: Sequence["_Rectangle"], width: int, piece: Piece, checkpoint: Checkpoint) -> None:
    edges = list(itertools.accumulate((chunk.columns for chunk in across), initial=0))
    if [chunk.column for chunk in across] != edges[:-1] or edges[-1] != width:
        raise UserError(
            f"{checkpoint.folder / METADATA}: the chunks of {piece.tensor.key} leave a part of it out, or overlap, "
            f"at {[*piece.lead, piece.core_row]}; the checkpoint is incomplete"
        )


class _Rectangle:
    """The rows and columns of a chunk, at one index of the leading axes."""

    def __init__(self, piece: Piece, chunk: Chunk) -> None:
        depth = len(piece.lead)
        self.piece, self.chunk = piece, chunk
        self.row, self.column = (*chunk.offsets[depth:], 0)[:2]
        self.rows, self.columns = (*chunk.sizes[depth:], 1)[:2]

    def part(self, row: int, checkpoint: Checkpoint) -> Part:
        """Where the rows from ``row`` on are stored."""
        before = 0  # how many such rectangles the chunk stores before this one
        for at, start, size in zip(self.piece.lead, self.chunk.offsets, self.chunk.sizes, strict=False):
            before = before * size + at - start
        skip = (before * self.rows + row - self.row) * self.columns * ITEM_BYTES[self.piece.tensor.dtype]
        offset = checkpoint.locate(self.piece.tensor, self.chunk) + skip
        return Part(checkpoint.folder / self.chunk.file, offset, self.columns)
