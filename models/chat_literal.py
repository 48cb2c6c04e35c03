"""Encoding of conversations in which a message spells a special token that shall stay text."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megapatch.models.chat import Sample
from megapatch.models.chat_mask import bytewise
from megapatch.models.chat_special import Special
from megapatch.models.chat_template import Span
from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer


class LiteralEncoder:
    """A second copy of the tokenizer, for which special tokens are text; the template's own are put in by id.

    `tokenizers` cuts a text at its special tokens before all else, so a text cut at the same places gives the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: Special, *, trust_remote_code: bool = False) -> None:
        plain = Tokenizer(tokenizer.folder, trust_remote_code=trust_remote_code).fast
        if plain is None or not bytewise(plain):
            raise UserError(
                f"--special-in-text literal: the tokenizer of {tokenizer.folder} is not a byte-level one, whose texts "
                "can be cut at special tokens; choose allow or fail"
            )
        added = plain.backend.get_added_tokens_decoder().values()
        greedy = [token.content for token in added if token.special and (token.lstrip or token.rstrip)]
        if greedy:
            raise UserError(
                f"--special-in-text literal: {greedy[0]!r} of the tokenizer takes blanks beside it along, so that "
                "texts cannot be cut there; choose allow or fail"
            )
        plain.take_literally()
        self._backend = plain.backend
        self._special = special
        self._ids = {text: number for number, text in tokenizer.special_tokens.items()}

    def encode(self, sample: Sample) -> tuple[list[int], list[Span]]:
        """The ids of a text, and the characters [start, end) of each."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for text, special in self._special.pieces(sample.text, sample.literal):
            if special:
                ids.append(self._ids[text])
                offsets.append((at, at + len(text)))
            else:
                one = self._backend.encode(text, add_special_tokens=False)
                ids += one.ids
                offsets += [(at + start, at + end) for start, end in one.offsets]
            at += len(text)
        return ids, offsets

    def replaced(
        self, samples: Sequence[Sample], ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths in which samples with literal parts are encoded anew."""
        if not any(sample.literal for sample in samples):
            return ids, lengths
        bounds = pairwise([0, *np.cumsum(lengths).tolist()])
        parts = [
            np.array(self.encode(sample)[0], ids.dtype) if sample.literal else ids[start:end]
            for sample, (start, end) in zip(samples, bounds, strict=True)
        ]
        return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)
