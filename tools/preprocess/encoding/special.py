"""Special tokens that documents spell out, such as <|endoftext|> in a text about tokenizers."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.reading.records import BadRecord

_GAP = 4096  # ids that lie no farther apart are looked for in one go


class Special:
    """The special tokens of a tokenizer under ``mode``: allow, literal or fail."""

    def __init__(self, tokenizer: Tokenizer, mode: str) -> None:
        self.literal, self.failing = mode == "literal", mode == "fail"
        self._tokenizer, self._tokens = tokenizer, tokenizer.special_tokens
        self._ranges = list(_ranges(sorted(self._tokens)))
        texts = sorted(self._tokens.values(), key=len, reverse=True)
        self._starts = [_shared(*group) for _, group in groupby(sorted(texts), lambda text: text[:2])]
        self._any = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._hidden = self._normalized()
        if self.literal and tokenizer.fast is None:
            raise UserError(
                f"{tokenizer.folder}: --special-in-text literal: its tokenizer is Python code, which cannot be told to "
                "take special tokens as text; use allow or fail"
            )

    def take_literally(self) -> None:
        """From now on the reference takes special tokens as text."""
        assert self._tokenizer.fast is not None
        self._tokenizer.fast.take_literally()

    def counts(self, ids: np.ndarray) -> dict[str, int]:
        """Special token -> how often it is in ``ids`` [tokens]; only those that are."""
        found: dict[str, int] = {}
        for low, span in self._ranges:
            numbers, times = np.unique(ids[_within(ids, low, span)], return_counts=True)
            pairs = zip(numbers.tolist(), times.tolist(), strict=True)
            found |= {self._tokens[number]: count for number, count in pairs if number in self._tokens}
        return found

    def holders(self, parts: Sequence[np.ndarray]) -> set[int]:
        """The numbers of the texts among whose ids, one array [tokens] a text, is a special token."""
        flat = np.concatenate([np.zeros(0, np.uint32), *parts], dtype=np.uint32, casting="unsafe")
        ends = np.cumsum([len(part) for part in parts])
        places = [np.flatnonzero(_within(flat, low, span)) for low, span in self._ranges]
        return {
            int(np.searchsorted(ends, place, "right"))
            for place in np.concatenate([np.zeros(0, np.int64), *places])
            if int(flat[place]) in self._tokens
        }

    def refuse(self, text: str) -> None:
        """Under ``fail``: a text in which the tokenizer finds a special token is a BadRecord."""
        if not self.failing or not self._may_hold(text):
            return
        token = next((self._tokens[number] for number in self._tokenizer.encode(text) if number in self._tokens), None)
        if token is not None:
            at = text.find(token)
            where = f" at character {at:,} of its text" if at >= 0 else ""
            raise BadRecord(f"spells out the special token {token!r}{where}")

    def _may_hold(self, text: str) -> bool:
        """Fast for texts without: a few searches for what tokens begin with, and only then for all of them."""
        if self._hidden:
            return True
        return any(start in text for start in self._starts) and self._any.search(text) is not None

    def _normalized(self) -> bool:
        """Whether a special token may be found in a text that does not have its characters: after normalization."""
        fast = self._tokenizer.fast
        if fast is None or fast.backend.normalizer is None:
            return False
        return any(token.special and token.normalized for token in fast.backend.get_added_tokens_decoder().values())


def _shared(first: str, *others: str) -> str:
    """What all of the sorted texts begin with."""
    last = others[-1] if others else first
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((at for at, (one, other) in pairs if one != other), len(first))]


def _ranges(ids: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Where ids lie: (lowest, highest - lowest) of groups without a wide gap."""
    low = high = None
    for number in ids:
        if low is not None and high is not None and number - high > _GAP:
            yield low, high - low
            low = None
        low, high = number if low is None else low, number
    if low is not None and high is not None:
        yield low, high - low


def _within(ids: np.ndarray, low: int, span: int) -> np.ndarray:
    unsigned = ids.view(f"u{ids.itemsize}")  # what is below ``low`` wraps around, so that one comparison does
    return unsigned - unsigned.dtype.type(low) <= span
