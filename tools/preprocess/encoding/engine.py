"""Engines turn texts into ids. `tokenizers` is the reference: what another one gives must be the same."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.encoding.adversarial import hard_texts
from megapatch.tools.preprocess.encoding.characters import outside, risky
from megapatch.tools.preprocess.encoding.gigatoken_engine import Gigatoken, Unusable
from megapatch.tools.preprocess.encoding.watch import REFERENCE

_LOG = logging.getLogger("megapatch.tools.preprocess")


class Engine(Protocol):
    """Adds no special tokens; those that a text spells out are tokens."""

    name: str
    version: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, of any integer dtype [tokens]."""


class Reference:
    """The tokenizer as models.tokenizer has it."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.version = tokenizer.engine_version

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens]."""
        ids, lengths = self.tokenizer.encode_flat(texts)
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:  # Python code of a folder may do so
            raise UserError(
                f"{self.tokenizer.folder}: gives id {ids.max()}, but its vocabulary ends before "
                f"{self.tokenizer.vocab_size}; correct the vocabulary: ids would be stored wrongly"
            )
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in pairwise([0, *ends])]


@dataclass(frozen=True)
class Choice:
    """The engine of a run: ``fast``, None for the reference alone, and then why; ``risky`` marks the characters,
    bool [0x110000], whose texts go to the reference in any case."""

    fast: Engine | None
    reason: str | None
    risky: np.ndarray
    compared: int = 0


def choose(reference: Reference, wanted: str) -> Choice:
    """The engine for ``wanted``: auto, tokenizers or gigatoken; where gigatoken cannot serve, auto says why and takes
    the reference, and gigatoken is a UserError."""
    fast = reference.tokenizer.fast
    table = risky(fast is not None and fast.backend.normalizer is not None)
    if wanted == REFERENCE:
        return Choice(None, "--engine tokenizers", table)
    try:
        engine = Gigatoken(reference.tokenizer)
        compared = compare(reference, engine, table)
        _LOG.info(
            "engine %s %s: the ids of %s on %s hard texts", engine.name, engine.version, REFERENCE, f"{compared:,}"
        )
        return Choice(engine, None, table, compared)
    except Unusable as error:
        if wanted != "auto":
            raise UserError(f"--engine {wanted}: {error}; use --engine auto or tokenizers") from None
        _LOG.info("engine tokenizers: %s", error)
        return Choice(None, str(error), table)


def compare(reference: Reference, engine: Engine, table: np.ndarray) -> int:
    """How many hard texts both engines gave the same ids for; a difference means that it is Unusable."""
    texts = hard_texts(reference.tokenizer)
    left_out = set(outside(texts, table))
    texts = [text for number, text in enumerate(texts) if number not in left_out]
    for text, ours, theirs in zip(texts, engine.encode(texts), reference.encode(texts), strict=True):
        if not np.array_equal(ours, theirs):
            raise Unusable(f"{engine.name} {engine.version} {difference(text, ours, theirs)}")
    return len(texts)


def difference(text: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """In words, where the ids of a text begin to differ from the reference's."""
    shared = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shared] != theirs[:shared])
    at = int(unequal[0]) if len(unequal) else shared
    return (
        f"gives ids {ours[at : at + 4].tolist()} where {REFERENCE} gives {theirs[at : at + 4].tolist()}, from token "
        f"{at} of a text that begins with {text[:40]!a}"
    )
