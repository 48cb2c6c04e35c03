"""From texts to ids: the engine and its control, special tokens that texts spell out, and bos and eod."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import xxhash

from megapatch.models.cli import opt
from megapatch.models.indexed_data import dtype_for
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.encoding.around import Around
from megapatch.tools.preprocess.encoding.characters import outside
from megapatch.tools.preprocess.encoding.engine import Engine, Reference, choose, difference
from megapatch.tools.preprocess.encoding.special import Special
from megapatch.tools.preprocess.encoding.watch import REFERENCE, Report, Watch

_ONE_IN = 1000  # texts compared with the reference, chosen by the hash of their beginning
_HASHED = 4096  # characters of it
_FIRST_TEXTS, _FIRST_CHARACTERS = 200, 1 << 20  # of the run, all compared


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How texts become ids."""

    bos: Optional[str] = opt(
        "yes: begin each document with the tokens that the tokenizer's model expects before a text, or with its bos "
        "token; no: do not (default: no, and it must be said when the tokenizer's own configuration says yes)",
        None,
        choices=("yes", "no"),
    )
    eod: Literal["yes", "no"] = opt("yes: end each document with the tokenizer's eos token", "yes")
    special_in_text: Literal["allow", "literal", "fail"] = opt(
        "special tokens that a document spells out, such as <|endoftext|>: allow: become that token, counted; literal: "
        "stay text; fail: make it a bad line",
        "allow",
    )
    engine: Literal["auto", "tokenizers", "gigatoken"] = opt(
        "tokenizers: the reference; gigatoken: tens of times faster for byte-level BPE, compared with the reference at "
        "the start and on 1 document in 1,000; auto: gigatoken where it is installed and gives the same ids",
        "auto",
    )


@dataclass(frozen=True)
class Encoded:
    """``ids`` [tokens] of all texts one after another, without bos and eod; ``lengths`` int64 [texts] of each."""

    ids: np.ndarray
    lengths: np.ndarray
    report: Report


class Encoder:
    """Texts to ids as EncodeOptions say; made before workers are forked, and then used in them."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions, around: Around | None = None) -> None:
        self.around = around or Around.of(tokenizer, options.bos, options.eod == "yes")
        self.special = Special(tokenizer, options.special_in_text)
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.reference = Reference(tokenizer)
        self.choice = choose(self.reference, options.engine)
        self.fast = self.choice.fast
        if self.special.literal:
            self.special.take_literally()

    def __call__(self, texts: Sequence[str], *, first: bool = False) -> Encoded:
        """Ids and lengths of ``texts``; ``first`` for the first texts of the run, which are compared."""
        report = Report(self.fast is not None, len(texts))
        fast = self.fast
        parts = self._compared(fast, texts, first, report) if fast else self.reference.encode(texts)
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.concatenate([np.zeros(0, self.dtype), *parts], dtype=self.dtype, casting="unsafe")
        if not self.special.literal:
            report.special = self.special.counts(ids)
        return Encoded(ids, lengths, report)

    def obey(self, order: Any) -> None:
        """In a worker: from now on encode with the engine that Watch orders."""
        assert order == REFERENCE, order
        self.fast = None

    def framed(self, encoded: Encoded, keep: np.ndarray | None = None) -> np.ndarray:
        """The ids to write: each text with ``keep``, bool [texts] (all with a token by default), in bos and eod."""
        kept = encoded.lengths > 0 if keep is None else keep
        ids, lengths = encoded.ids, encoded.lengths
        if not kept.all():
            ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
        return self.around.put(ids, lengths)

    def watch(self) -> Watch:
        """The parent's object that takes the reports, in input order."""
        engine = self.fast or self.reference
        return Watch(engine.name, engine.version, self.reference.version, self.choice.reason, self.choice.compared)

    def _compared(self, fast: Engine, texts: Sequence[str], first: bool, report: Report) -> list[np.ndarray]:
        """The ids of each text [tokens], the reference's where both are known to differ or might."""
        parts = fast.encode(texts)
        direct = set(outside(texts, self.choice.risky))
        if self.special.literal:
            direct |= self.special.holders(parts)
        checked = sorted((_chosen(texts) | (_first(texts) if first else set())) - direct)
        numbers = [*checked, *sorted(direct)]
        for number, ids in zip(numbers, self.reference.encode([texts[number] for number in numbers]), strict=True):
            if number not in direct and not np.array_equal(parts[number], ids):
                report.differed += 1
                report.example = report.example or difference(texts[number], parts[number], ids)
            parts[number] = ids
        report.compared, report.by_reference = len(checked), len(direct)
        return parts


def _first(texts: Sequence[str]) -> set[int]:
    ends = np.cumsum([len(text) for text in texts[:_FIRST_TEXTS]])
    return set(range(int((ends <= _FIRST_CHARACTERS).sum())))


def _chosen(texts: Sequence[str]) -> set[int]:
    digest = xxhash.xxh3_64_intdigest
    return {number for number, text in enumerate(texts) if digest(text[:_HASHED].encode()) % _ONE_IN == 0}
