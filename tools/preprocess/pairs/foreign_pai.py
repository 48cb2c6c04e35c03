"""Pai-Megatron-Patch's packed SFT data (idxmap): a row is one document of 2 x seq_length int32, tokens and labels.

The end of each conversation is marked by storing its last token as -1 - id. What is left of a row is padding, labelled
-100. Facts from its toolkits/sft_data_preprocessing and megatron_patch/{data/utils,template/helper}.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import idx_path, read_index, write_index
from megapatch.models.packed_rows import Conversation, Conversations
from megapatch.models.packing import make_plan, refuse_long
from megapatch.tools.preprocess.pairs.foreign_checks import (
    UNTRAINED,
    Counts,
    checked,
    refuse_first_trained,
    refuse_short,
    refuse_untrained,
    refuse_weights,
)

FORMAT = "pai"
_DTYPE = np.dtype(np.int32)  # whatever the vocabulary: uint16 has no negative numbers


def refuse(data: Conversations, seq_length: int) -> None:
    """Refuse what the format cannot hold, and what its reader fails on."""
    refuse_weights(data, FORMAT)
    refuse_short(data, FORMAT, 1)
    fills = f"{seq_length - 1} tokens (one that fills a row ends Pai's trainer, its pull request 663)"
    refuse_long(data.prefix, data.lengths, seq_length - 1, fills)
    refuse_first_trained(data, FORMAT)
    refuse_untrained(data, FORMAT)  # its reader asserts that something is


def write(
    data: Conversations, binary: Path, index: Path, *, seq_length: int, seed: int, pad_id: int, tell: Callable
) -> Counts:
    """Write packed rows; ``tell`` is called with the bytes and tokens of each."""
    plan, counts = make_plan(data.lengths, seq_length, seed=seed), Counts()
    with binary.open("wb") as file:
        for number in range(plan.num_rows):
            row = np.full((2, seq_length), pad_id, _DTYPE)
            row[1] = UNTRAINED
            at, before = 0, counts.tokens
            for one in map(data.__getitem__, plan.row(number).tolist()):
                end = at + len(one.ids)
                row[0, at:end] = one.ids
                row[0, end - 1] = -1 - row[0, end - 1]
                row[1, at : end - 1] = np.where(one.mask[1:], one.ids[1:].astype(_DTYPE), UNTRAINED)
                counts.add(one.ids, one.mask)
                at = end
            file.write(row.tobytes())
            counts.padding += seq_length - at
            tell(row.nbytes, counts.tokens - before)
    counts.rows = plan.num_rows
    write_index(index, np.full(plan.num_rows, 2 * seq_length), _DTYPE)
    return counts


def read(prefix: str, counts: Counts) -> Iterator[tuple[str, Conversation]]:
    """The conversations of PREFIX.bin/.idx, row by row, each after its place."""
    from megapatch.models.indexed_data import IndexedDocuments

    index = read_index(prefix)
    if index.dtype.kind != "i":
        raise UserError(
            f"{idx_path(prefix)}: {index.dtype} found, expected int32: the negative marks of ends are lost; make the "
            "data again with a vocabulary of 65,500 or more"
        )
    lengths = np.unique(index.lengths)
    if len(lengths) > 1 or (lengths % 2).any():
        raise UserError(
            f"{idx_path(prefix)}: sequences of {lengths[0]:,} to {lengths[-1]:,} elements, expected all of 2 x "
            f"seq_length; these are not data of --format {FORMAT}"
        )
    for number, values in enumerate(IndexedDocuments(prefix)):
        tokens, labels = values.astype(np.int64).reshape(2, -1)
        counts.rows += 1
        yield from _conversations(f"{prefix}: row {number:,}", tokens, labels, counts)


def _conversations(
    place: str, tokens: np.ndarray, labels: np.ndarray, counts: Counts
) -> Iterator[tuple[str, Conversation]]:
    """The conversations of one row, tokens and labels [s]."""
    ends = np.flatnonzero(tokens < 0) + 1
    rest = int(ends[-1]) if ends.size else 0
    if not ends.size or (labels[rest:] != UNTRAINED).any():
        found = "tokens that are trained after the last" if ends.size else "no"
        raise UserError(f"{place}: {found} mark of an end (-1 - id); these are not data of --format {FORMAT}")
    counts.padding += len(tokens) - rest
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        ids, here = tokens[begin:end].copy(), labels[begin:end]
        ids[-1] = -1 - ids[-1]
        if here[-1] != UNTRAINED:
            raise UserError(f"{place}: label {here[-1]} at the end of a conversation, expected {UNTRAINED}")
        yield place, Conversation(ids, checked(FORMAT, place, ids, here[:-1] != UNTRAINED, here[:-1]), None)
