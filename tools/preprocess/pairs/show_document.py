"""Documents as text: special tokens stand out, and so do the tokens that training counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.pairs import colours


@dataclass(frozen=True)
class Span:
    """Text of tokens of one kind: ``special`` ones, or those that are no token of the vocabulary, stand alone."""

    text: str
    special: bool
    trained: bool | None  # None: no mask


class Decoder:
    """Turns ids into spans; what is learned of an id is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names: dict[int, str | None] = {}

    def spans(self, ids: np.ndarray, mask: np.ndarray | None = None) -> list[Span]:
        """The spans of ``ids`` [tokens], whose trained ones are those with a ``mask`` [tokens] above 0."""
        trained = [None] * len(ids) if mask is None else (mask > 0).tolist()
        named = [(self._name(token), token, one) for token, one in zip(ids.tolist(), trained, strict=True)]
        found = []
        for (special, one), group in groupby(named, lambda item: (item[0] is not None, item[2])):
            run = list(group)
            if special:
                found += [Span(name or "", True, one) for name, _, _ in run]
            else:
                found.append(Span(self.tokenizer.decode([token for _, token, _ in run]), False, one))
        return found

    def _name(self, token: int) -> str | None:
        """What to call a special or unknown id, None for one that is text."""
        if token not in self._names:
            self._names[token] = self._asked(token)
        return self._names[token]

    def _asked(self, token: int) -> str | None:
        if not 0 <= token < self.tokenizer.vocab_size:
            return f"id {token}"
        shown = self.tokenizer.decode([token])
        if not shown:  # a hole in the vocabulary, or the blank of SentencePiece, which decodes to nothing at a start
            return None if token in self._known else f"id {token}"
        return shown if shown != self.tokenizer.decode([token], skip_special_tokens=True) else None

    @cached_property
    def _known(self) -> set[int]:
        return set(self.tokenizer.vocabulary.values())


def rendered(spans: list[Span], coloured: bool) -> str:
    """The text, special tokens in reverse video and trained ones green; without colours ⟦special⟧ and «trained»."""
    return "".join(_coloured(spans) if coloured else _bracketed(spans))


def _coloured(spans: list[Span]) -> Iterator[str]:
    for span in spans:
        codes = [colours.GREEN] * bool(span.trained) + [colours.REVERSE] * span.special
        codes = codes or ([colours.DIM] if span.trained is False else [])
        text = colours.printable(span.text)
        yield colours.paint(text, ";".join(codes)) if codes else text


def _bracketed(spans: list[Span]) -> Iterator[str]:
    for trained, group in groupby(spans, lambda span: span.trained):
        text = "".join(f"⟦{s.text}⟧" if s.special else s.text for s in group)
        yield colours.printable(f"«{text}»" if trained else text)


def as_json(spans: list[Span]) -> list[dict[str, Any]]:
    """The spans for --json; ``trained`` only where there is a mask."""
    return [
        {"text": span.text, "special": span.special} | ({} if span.trained is None else {"trained": span.trained})
        for span in spans
    ]
