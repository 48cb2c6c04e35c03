"""Which documents are kept, and in which output: filters, duplicates, shares by hash, and a limit of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Optional

import numpy as np
import xxhash

from megapatch.models.cli import opt
from megapatch.tools.preprocess.reading.sources import Common

SHARES = ("train", "valid", "test")
KEPT, EMPTY, SHORT, LONG, CONTAMINATED, DUPLICATE, BEYOND = range(7)  # what becomes of a document
FATES = (  # in a ledger's words; those that are no kind of its own are reasons to be filtered
    "documents",
    "empty",
    "too_short",
    "too_long",
    "contaminated",
    "duplicate",
    "after_max_tokens",
)


@dataclass(frozen=True, kw_only=True)
class SelectOptions(Common):
    """Which documents to keep."""

    deduplicate: bool = opt(
        "leave out a document whose text came before, byte for byte (by xxh3-128; 21 to 32 bytes of memory for each)",
        False,
    )
    split: str = opt(
        "shares for training, validation and test, such as 98,1,1: PREFIX_train, PREFIX_valid and PREFIX_test; a "
        "document's share depends on its text and --split-seed alone; a share of 0 is not written",
        "",
        metavar="N,N,N",
    )
    split_seed: int = opt("another seed, other shares", 0, metavar="NUMBER")
    max_tokens: Optional[int] = opt(
        "stop after the document with which so many tokens are written, in all outputs together", None, metavar="TOKENS"
    )
    min_document_tokens: int = opt("leave out documents of fewer tokens, bos and eod not counted", 0, metavar="TOKENS")
    max_document_tokens: Optional[int] = opt("leave out documents of more tokens", None, metavar="TOKENS")

    def __post_init__(self) -> None:
        shares(self.split)
        if not 0 <= self.split_seed < 1 << 64:
            raise ValueError(f"--split-seed {self.split_seed}: expected 0 or more, below 2^64")
        if self.split_seed and not self.split:
            raise ValueError(f"--split-seed {self.split_seed} needs --split")
        for name in ("max_tokens", "max_document_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if not 0 <= self.min_document_tokens <= (self.max_document_tokens or self.min_document_tokens):
            raise ValueError(
                f"--min-document-tokens {self.min_document_tokens}: expected 0 or more, and at most "
                f"--max-document-tokens ({self.max_document_tokens})"
            )
        super().__post_init__()  # type: ignore[misc]


def shares(split: str) -> dict[str, int]:
    """Name -> weight of each share above 0, {'': 1} where nothing is split."""
    if not split:
        return {"": 1}
    words = split.split(",")
    if not 2 <= len(words) <= 3 or not all(word.strip().isdigit() for word in words) or not any(map(int, words)):
        raise ValueError(f"--split {split}: expected two or three whole numbers such as 98,1,1")
    return {name: int(word) for name, word in zip(SHARES, words, strict=False) if int(word)}


def hashes(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """xxh3-128 of each document's text, uint64 [documents, 2]; ``texts`` [keys][documents], of several keys that of
    their hashes in a row."""
    digest = xxhash.xxh3_128_digest
    raw = [[digest(text.encode()) for text in one] for one in texts]
    one = raw[0] if len(raw) == 1 else [digest(b"".join(each)) for each in zip(*raw, strict=True)]
    return np.frombuffer(b"".join(one), "<u8").reshape(-1, 2)


def share_of(found: np.ndarray, number: int, split: str, seed: int) -> np.ndarray:
    """Each document's share, int8 [number], from its hash, uint64 [number, 2]; 0 where nothing is split."""
    weights = list(shares(split).values())
    if len(weights) == 1:
        return np.zeros(number, np.int8)
    data = found.tobytes()
    values = [xxhash.xxh3_64_intdigest(data[i : i + 16], seed) for i in range(0, len(data), 16)]
    bounds = [(end << 64) // sum(weights) for end in accumulate(weights)][:-1]
    return np.searchsorted(np.array(bounds, np.uint64), np.array(values, np.uint64), side="right").astype(np.int8)


def filtered(lengths: np.ndarray, least: int, most: int | None) -> np.ndarray:
    """What becomes of documents of ``lengths`` tokens, int64 [keys, documents]: uint8 [documents]."""
    total = lengths.sum(axis=0)
    fate = np.where(total < least, SHORT, KEPT).astype(np.uint8)
    if most is not None:
        fate[total > most] = LONG
    fate[total == 0] = EMPTY
    return fate
