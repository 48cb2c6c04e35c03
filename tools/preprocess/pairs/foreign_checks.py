"""What other projects' formats have no place for, refused by name before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.packed_rows import Conversations, weight_prefix

UNTRAINED = -100  # the label that PyTorch's loss passes over


@dataclass
class Counts:
    """What was written or read: ``rows`` (lines, where nothing is packed) hold tokens + padding."""

    rows: int = 0
    conversations: int = 0
    tokens: int = 0
    trained: int = 0
    padding: int = 0
    untrained: int = 0  # conversations that were left out

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Count a conversation of ids [n] and mask [n]."""
        self.conversations += 1
        self.tokens += len(ids)
        self.trained += int(np.count_nonzero(mask))


def refuse_weights(data: Conversations, form: str) -> None:
    """For formats that tell only whether a token is trained."""
    if data.weights is not None:
        raise UserError(
            f"{weight_prefix(data.prefix)}: --format {form} has no place for weights of tokens; use --format jsonl, or "
            "make the data again without weights of messages"
        )


def refuse_short(data: Conversations, form: str, least: int) -> None:
    """For formats in which a conversation needs ``least`` tokens."""
    _refuse(data, data.lengths < least, f"have fewer than {least} tokens", form)


def refuse_first_trained(data: Conversations, form: str) -> None:
    """For formats that store labels: nothing comes before the first token, so it is no label."""
    starts = _starts(data)
    _refuse(data, data.mask.ids[starts] != 0, "have a trained first token, which is nobody's label", form)


def refuse_untrained(data: Conversations, form: str) -> None:
    """For readers that divide by the number of trained tokens."""
    sums = [np.add.reduceat(data.mask.ids, part, dtype=np.int64) for part in [_starts(data)] if len(part)]
    _refuse(data, np.concatenate([*sums, np.zeros(0, np.int64)]) == 0, "have no trained token", form)


def _starts(data: Conversations) -> np.ndarray:
    """Where each conversation begins among all tokens, int64 [n]; none may be empty."""
    return np.cumsum(data.lengths) - data.lengths


def _refuse(data: Conversations, wrong: np.ndarray, what: str, form: str) -> None:
    if (numbers := np.flatnonzero(wrong)).size:
        raise UserError(
            f"{data.prefix}: {numbers.size:,} of {len(data):,} conversations {what} (first: number {numbers[0]:,}); "
            f"--format {form} cannot hold them: leave them out, or use --format jsonl"
        )


def checked(form: str, place: str, ids: np.ndarray, trained: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mask uint8 [n] of a conversation of which label i [n - 1], where trained, must be token i + 1."""
    wrong = np.flatnonzero(trained & (labels != ids[1:]))
    if wrong.size:
        at = int(wrong[0])
        raise UserError(
            f"{place}: label {at:,} of a conversation is {labels[at]}, the token after it {ids[at + 1]}; these are not "
            f"data of --format {form}"
        )
    return np.concatenate([np.zeros(1, np.uint8), trained.astype(np.uint8)])


def segments(starts: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of ``size`` elements cut at ``starts`` [n]."""
    return zip(starts.tolist(), [*starts[1:].tolist(), size], strict=True)
