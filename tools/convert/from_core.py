"""A torch_dist checkpoint as a source of core weights. Its chunks may be cut along any axes, as any layout saves."""

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from megapatch.models import core_files, core_names, hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER, METADATA, Checkpoint, Chunk, Tensor
from megapatch.models.cuts import Region
from megapatch.models.held import lacking
from megapatch.models.rules import Placed
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.matrix import Matrix, Rectangle, stack
from megapatch.tools.convert.source import check_dtype, model_of, named

_STATE = re.compile(r"(?:^|\.)(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)(?:\.|/|$)")
_HALVES = ("_w", "_v")  # gate and up of fc1 apart, as singleton_local_shards has them


class CoreSource:
    """The weights of a checkpoint, with the config.json in it or in the Hugging Face folder ``config``."""

    def __init__(self, checkpoint: Checkpoint, config: Path | None) -> None:
        self.checkpoint = checkpoint
        self.model = model_of(*described_by(checkpoint.folder, config), checkpoint.tensors)
        self.notes = lacking(self.model.written, self.model.config)
        self._found = {placed: self._find(placed) for placed in self.model.layout.placed}
        self._account()

    def weight(self, placed: Placed) -> Matrix:
        """A core weight, made of the checkpoint's chunks."""
        tensors, lead = self._found[placed]
        (rows, *rest), _ = self.model.layout.packed(placed)
        share, columns = rows // len(tensors), prod(rest)
        halves = [matrix_of(self.checkpoint, tensor, lead) for tensor in tensors]
        return stack(tensors[0].key, [half.take([Region(0, 0, share, columns)]) for half in halves])

    def _find(self, placed: Placed) -> tuple[list[Tensor], tuple[int, ...]]:
        """The tensor that holds a weight, or its two halves; the weight's place on their leading axes."""
        tensors, layout = self.checkpoint.tensors, self.model.layout
        for key, layers, experts in core_names.in_torch_dist(placed):
            axes = layout.axes(placed, layers) if experts else []
            halves = [tensors.get(key + half) for half in _HALVES]
            found = [tensors[key]] if key in tensors else [half for half in halves if half]
            if found and (len(found) == 2 or key in tensors):
                shape, _ = layout.packed(placed)
                share = (shape[0] // len(found), *shape[1:])
                for tensor in found:
                    _check(placed, tensor, (*(size for _, size in axes), *share))
                return found, tuple(place for place, _ in axes)
        raise UserError(
            f"{self.checkpoint.folder / METADATA}: no {placed.key(True)} and no {placed.key(False)}; "
            f"{HF_SUBFOLDER}/config.json asks for it: is it the right config.json?"
        )

    def _account(self) -> None:
        """Refuse tensors of the model that have no place in it; name the training state that is left out."""
        used = {tensor.key for tensors, _ in self._found.values() for tensor in tensors}
        state = {key for key in self.checkpoint.tensors if _STATE.search(key)}
        if unknown := self.checkpoint.tensors.keys() - used - state:
            kind = self.model.layout.model_type
            raise UserError(f"{named(unknown)}: in the checkpoint, but has no place in a {kind} model")
        left = state | {key for key in self.checkpoint.objects if "_extra_state" not in key}
        if left:
            self.notes.append(f"left out: {len(left)} tensors and objects of training state (such as {min(left)})")


def matrix_of(checkpoint: Checkpoint, tensor: Tensor, lead: tuple[int, ...]) -> Matrix:
    """What a tensor holds at these indices of its first axes."""
    rows, *rest = (*tensor.shape[len(lead) :], 1)
    chunks = (chunk for chunk in tensor.at(lead) if 0 not in chunk.sizes)
    found = tuple(_rectangle(checkpoint, tensor, chunk, lead) for chunk in chunks)
    return Matrix(f"{checkpoint.folder / METADATA}: the chunks of {tensor.key}", rows, prod(rest), found)


def _rectangle(checkpoint: Checkpoint, tensor: Tensor, chunk: Chunk, lead: tuple[int, ...]) -> Rectangle:
    row, column, *_ = (*chunk.offsets[len(lead) :], 0, 0)
    rows, columns, *_ = (*chunk.sizes[len(lead) :], 1, 1)
    before = 0  # how many such rectangles the chunk stores before this one
    for at, start, size in zip(lead, chunk.offsets, chunk.sizes, strict=False):
        before = before * size + at - start
    item = ITEM_BYTES[tensor.dtype]
    offset = checkpoint.locate(tensor, chunk) + before * rows * columns * item
    return Rectangle(row, column, rows, columns, tensor.dtype, checkpoint.folder / chunk.file, offset, columns * item)


def described_by(checkpoint: Path, config: Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder with config.json and tokenizer, and the config.json (UserError: there is none)."""
    if config is not None:
        return config, hf_files.config(config)
    own = checkpoint / HF_SUBFOLDER
    if not (own / hf_files.CONFIG).is_file():
        raise UserError(f"{own / hf_files.CONFIG}: missing; name the model's Hugging Face folder with --config")
    return own, core_files.hf_config(checkpoint)


def _check(placed: Placed, tensor: Tensor, expected: Sequence[int]) -> None:
    found, wanted = tensor.shape, tuple(expected)
    if placed.rule.core in core_names.PADDED and len(found) == len(wanted) and found[0] > wanted[0]:
        found = (wanted[0], *found[1:])
    if found != wanted:
        raise UserError(
            f"{tensor.key}: shape {list(tensor.shape)} in the checkpoint, {list(wanted)} in config.json; "
            "is this the right config.json?"
        )
    check_dtype(tensor.key, tensor.dtype)
