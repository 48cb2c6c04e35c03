"""Rows of packed conversations as arrays for a trainer: tokens, labels, what is trained, positions, boundaries."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.data_formats import CHATS
from megapatch.models.indexed_data import IndexedDocuments, bin_path, idx_path
from megapatch.models.packing import Plan, document_lengths, refuse_long


def mask_prefix(prefix: str | Path) -> str:
    """The pair beside PREFIX that says which tokens are trained: uint8, 0 or 1."""
    return f"{prefix}_mask"


def weight_prefix(prefix: str | Path) -> str:
    """The pair beside PREFIX, where there is one, that says how much each trained token counts: float32."""
    return f"{prefix}_weight"


@dataclass(frozen=True)
class Conversation:
    """One conversation: ``ids`` [n], ``mask`` uint8 [n], 1 where trained; ``weights`` float32 [n] or None: all 1."""

    ids: np.ndarray
    mask: np.ndarray
    weights: np.ndarray | None


class Conversations:
    """PREFIX, PREFIX_mask and, where it is there, PREFIX_weight, mapped into memory and of one shape."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.ids = IndexedDocuments(prefix, CHATS)
        self.lengths = document_lengths(self.ids.index)
        self.mask = self._beside(mask_prefix(prefix), np.uint8)
        weighted = idx_path(weight_prefix(prefix)).exists() or bin_path(weight_prefix(prefix)).exists()
        self.weights = self._beside(weight_prefix(prefix), np.float32) if weighted else None

    def _beside(self, prefix: str, dtype: type) -> IndexedDocuments:
        found = IndexedDocuments(prefix, CHATS)
        if found.index.dtype != dtype:
            expected = np.dtype(dtype).name
            raise UserError(f"{idx_path(prefix)}: {found.index.dtype} found, expected {expected}; make the data again")
        if not np.array_equal(document_lengths(found.index), self.lengths):
            raise UserError(
                f"{idx_path(prefix)}: not of the same conversations as {idx_path(self.prefix)}; make both again"
            )
        return found

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Conversation:
        mask = self.mask[number]
        if mask.size and mask.max() > 1:
            raise UserError(f"{bin_path(self.mask_name)}: {mask.max()} in conversation {number:,}; expected 0 or 1")
        return Conversation(self.ids[number], mask, None if self.weights is None else self.weights[number])

    @property
    def mask_name(self) -> str:
        """The prefix of the mask."""
        return mask_prefix(self.prefix)


@dataclass(frozen=True)
class Row:
    """A row of ``s`` tokens, padded; segment i is ``cu_seqlens[i] : cu_seqlens[i + 1]``, the last may be padding."""

    tokens: np.ndarray  # int64 [s]
    labels: np.ndarray  # int64 [s]: the token after each one; the pad id where there is none
    loss_mask: np.ndarray  # float32 [s]: what the label's loss counts, 0 where it is not trained
    position_ids: np.ndarray  # int64 [s], from 0 in each segment
    cu_seqlens: np.ndarray  # int32 [segments + 1], from 0 to s
    max_seqlen: int  # of the longest segment: megatron-core resets rotary positions only if it is exact
    conversations: np.ndarray  # int32, numbers of the conversations in the data, in their order in the row


class PackedRows:
    """``rows[i]`` is row i of a plan: the conversations of PREFIX one after another, none seeing another.

    Each is padded to a multiple of ``plan.multiple`` and, with ``full``, the row to ``plan.seq_length``.
    """

    def __init__(self, prefix: str | Path, plan: Plan, *, pad_id: int = 0, full: bool = True) -> None:
        self.plan, self.pad_id, self.full = plan, pad_id, full
        self.data = Conversations(prefix)
        if plan.order.size and int(plan.order.max()) >= len(self.data):
            raise UserError(f"{prefix}: {len(self.data):,} conversations, the plan names more; make it again")
        longest = f"the {plan.seq_length} tokens of a row"
        refuse_long(prefix, self.data.lengths, plan.seq_length, longest)

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, number: int) -> Row:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        members = self.plan.row(number % len(self))
        lengths, multiple = self.data.lengths[members], self.plan.multiple
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-lengths // multiple) * multiple)])
        if self.full and bounds[-1] < self.plan.seq_length:
            bounds = np.append(bounds, self.plan.seq_length)  # what is left is a segment of padding
        size = int(bounds[-1])
        tokens, mask = np.full(size, self.pad_id, np.int64), np.zeros(size, np.float32)
        for at, member in zip(bounds.tolist(), members.tolist(), strict=False):
            one = self.data[member]
            tokens[at : at + len(one.ids)] = one.ids
            counts = one.mask if one.weights is None else one.mask * one.weights
            mask[at : at + len(one.ids) - 1] = counts[1:]
        labels = np.append(tokens[1:], self.pad_id)
        labels[bounds[: len(members)] + lengths - 1] = self.pad_id  # nothing follows the last token
        labels[bounds[1:] - 1] = self.pad_id
        sizes = np.diff(bounds)
        places = np.arange(size) - np.repeat(bounds[:-1], sizes)
        return Row(tokens, labels, mask, places, bounds.astype(np.int32), int(sizes.max()), members)


def one_by_one(lengths: np.ndarray, seq_length: int, *, multiple: int = 1, seed: int | None = None) -> Plan:
    """A plan with one conversation a row, shuffled by ``seed`` (None: in the order of the data)."""
    order = np.flatnonzero(lengths).astype(np.int32)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    return Plan(seq_length, multiple, seed or 0, np.arange(len(order) + 1), order)


def share_of_rank(cu_seqlens: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Places of a row that a rank of context parallelism holds, int64 [s/size]: two of 2 x size pieces of each segment.

    Rank r takes pieces r and 2 x size - 1 - r, as megatron-core does, so that all ranks have as much to attend to.
    """
    bounds = cu_seqlens.astype(np.int64)
    assert not (bounds % (2 * size)).any(), f"segments are padded to multiples of {2 * size} tokens: see Plan.multiple"
    piece = np.diff(bounds) // (2 * size)
    starts = np.stack([bounds[:-1] + rank * piece, bounds[:-1] + (2 * size - 1 - rank) * piece], 1).ravel()
    sizes = np.repeat(piece, 2)
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
