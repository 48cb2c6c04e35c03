"""From trained characters to trained tokens, by the bytes that each token stands for where that is exact."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from megapatch.models.chat import Sample
from megapatch.models.chat_template import ChatError, Span
from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.models.tokenizer_engine import Fast

_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # normalizers that leave ASCII as it is


class Masker:
    """Masks for one tokenizer: a token is trained when it stands for any character of a span.

    ``literal``: ids and offsets of a sample with parts that spell special tokens and are to be text.
    """

    def __init__(
        self, tokenizer: Tokenizer, literal: Callable[[Sample], tuple[list[int], list[Span]]] | None = None
    ) -> None:
        self._tokenizer, self._literal = tokenizer, literal
        if tokenizer.fast is None:
            raise UserError(
                f"{tokenizer.folder}: its tokenizer is Python code, which does not say which characters a token stands "
                "for; conversations need a tokenizer.json"
            )
        self._fast = tokenizer.fast
        kinds = _kinds(self._fast.backend.normalizer)
        self._bytewise = bytewise(self._fast)
        self._ascii_kept, self._all_kept = kinds <= _UNICODE_FORMS, not kinds

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        """Bytes of each id, int64 [vocab]; 0 for ids that stand for none or are not made of bytes."""
        found = np.zeros(self._tokenizer.vocab_size, np.int64)
        for number, data in self._contents.items():
            found[number] = len(data)
        return found

    @cached_property
    def _contents(self) -> dict[int, bytes]:
        """Id -> the bytes it stands for."""
        table = str.maketrans(_byte_letters())
        added = {number: token.content for number, token in self._fast.backend.get_added_tokens_decoder().items()}
        found = {}
        for token, number in self._tokenizer.vocabulary.items():
            if number in added:
                continue
            try:
                found[number] = token.translate(table).encode("latin-1")
            except UnicodeEncodeError:  # not in the byte alphabet: such a token cannot occur
                continue
        return found | {number: text.encode() for number, text in added.items()}

    def masks(self, samples: Sequence[Sample], ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``ids`` [tokens] of all texts, ``lengths`` [texts] -> weights float32 [tokens], 0 where not trained, and
        whether each text's tokens were found by their bytes, bool [texts] (else by the tokenizer's own offsets)."""
        token_ends = np.cumsum(lengths)
        if not self._bytewise:
            exact = np.zeros(len(samples), bool)
            return self._by_offsets(np.zeros(len(ids), np.float32), samples, ids, token_ends, lengths, exact), exact
        ends = np.cumsum(self._token_bytes[ids])
        total = np.concatenate([np.zeros(1, np.int64), ends])[np.concatenate([np.zeros(1, np.int64), token_ends])]
        plain = [sample.text.isascii() for sample in samples]
        sizes = [
            len(sample.text) if ascii else len(sample.text.encode())
            for sample, ascii in zip(samples, plain, strict=True)
        ]
        exact = np.diff(total) == np.array(sizes, np.int64)
        self._check_bytes(exact, samples, plain, ids, token_ends - lengths, token_ends)
        weights = _painted(samples, plain, exact, total, ends)
        return self._by_offsets(weights, samples, ids, token_ends, lengths, exact), exact

    def _check_bytes(
        self,
        exact: np.ndarray,
        samples: Sequence[Sample],
        plain: Sequence[bool],
        ids: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
    ) -> None:
        """Where a normalizer may have changed a text, bytes that add up are not enough: they must be the text's."""
        if self._all_kept:
            return
        for number, sample in enumerate(samples):
            if exact[number] and not (plain[number] and self._ascii_kept):
                tokens = ids[starts[number] : stops[number]].tolist()
                exact[number] = b"".join(map(self._contents.__getitem__, tokens)) == sample.text.encode()

    def _by_offsets(
        self,
        weights: np.ndarray,
        samples: Sequence[Sample],
        ids: np.ndarray,
        token_ends: np.ndarray,
        lengths: np.ndarray,
        exact: np.ndarray,
    ) -> np.ndarray:
        for number in np.flatnonzero(~exact).tolist():
            first, last = int(token_ends[number] - lengths[number]), int(token_ends[number])
            found, offsets = self._with_offsets(samples[number])
            if found != ids[first:last].tolist():
                raise ChatError("its tokens and those of the tokenizer's own offsets are not the same")
            for (start, end), weight in zip(samples[number].spans, samples[number].weights, strict=True):
                inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
                if inside.size:
                    weights[first + inside[0] : first + inside[-1] + 1] = weight
        return weights

    def _with_offsets(self, sample: Sample) -> tuple[list[int], np.ndarray]:
        """The reference's ids of a text, and the characters [start, end) of each, int64 [tokens, 2]."""
        if sample.literal and self._literal is not None:
            ids, offsets = self._literal(sample)
            return ids, np.array(offsets, np.int64).reshape(-1, 2)
        prepared = self._fast.prepared(sample.text)
        one = self._fast.backend.encode(prepared, add_special_tokens=False)
        bounds = np.array(one.offsets, np.int64).reshape(-1, 2) - (len(prepared) - len(sample.text))
        return one.ids, np.maximum(bounds, 0)


def _painted(
    samples: Sequence[Sample], plain: Sequence[bool], exact: np.ndarray, total: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The weights of tokens that end at the bytes ``ends`` [tokens]; texts begin at the bytes ``total``."""
    bounds: list[int] = []
    values: list[list[float]] = []
    for sample, ascii, right, start in zip(samples, plain, exact.tolist(), total.tolist(), strict=False):
        if right:
            spans = sample.spans if ascii else _in_bytes(sample.text, sample.spans)
            bounds += [start + at for at in chain.from_iterable(spans)]
            values.append(sample.weights)
    pairs = np.array(bounds, np.int64).reshape(-1, 2)
    first = np.searchsorted(ends, pairs[:, 0], "right")
    last = np.searchsorted(ends, pairs[:, 1], "left") + 1
    weights = np.zeros(len(ends), np.float32)
    for a, b, weight in zip(first.tolist(), last.tolist(), chain.from_iterable(values), strict=True):
        weights[a:b] = weight
    return weights


def _in_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of characters, in order, as spans of UTF-8 bytes."""
    found, characters, size = [], 0, 0
    for start, end in spans:
        first = size + len(text[characters:start].encode())
        size = first + len(text[start:end].encode())
        characters = end
        found.append((first, size))
    return found


def bytewise(fast: Fast) -> bool:
    """Whether each token stands for some bytes of the text, which its letters tell."""
    return _kinds(fast.backend.decoder) == {"ByteLevel"}


def _kinds(part: Any) -> set[str]:
    """The types of a normalizer or decoder of `tokenizers`, also of those in a sequence."""
    if part is None:
        return set()
    said = json.loads(part.__getstate__())  # the JSON of tokenizer.json
    listed = [one for key in ("normalizers", "decoders") for one in said.get(key, ())]
    return {one["type"] for one in listed} if listed else {said["type"]}


def _byte_letters() -> dict[str, str]:
    """Letter of the byte-level alphabet -> the character with that byte's number: GPT-2 moves unprintable bytes up."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): chr(byte) for byte in shown} | {chr(256 + n): chr(byte) for n, byte in enumerate(hidden)}
