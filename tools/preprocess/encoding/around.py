"""What stands around each document: bos and eod, as the user says and the tokenizer's own configuration allows."""

import logging
from dataclasses import dataclass

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer

_LOG = logging.getLogger("megapatch.tools.preprocess")


@dataclass(frozen=True)
class Around:
    """The ids put before and after each document."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """How many tokens each document gains."""
        return len(self.before) + len(self.after)

    @classmethod
    def of(cls, tokenizer: Tokenizer, bos: str | None, eod: bool) -> "Around":
        """What --bos (None: not given) and --eod mean for a tokenizer; what its files contradict is a UserError."""
        made = cls(_before(tokenizer, bos), _after(tokenizer) if eod else ())
        begin, end = _shown(tokenizer, made.before), _shown(tokenizer, made.after)
        _LOG.info("each document begins with %s, ends with %s", begin or "no token", end or "no token")
        return made

    def put(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """``ids`` [tokens] of documents of ``lengths`` int64 [documents] -> [tokens + documents * num_tokens]."""
        if not self.num_tokens:
            return ids
        out = np.empty(len(ids) + len(lengths) * self.num_tokens, ids.dtype)
        is_text = np.ones(len(out), bool)
        ends = np.cumsum(lengths + self.num_tokens)
        starts = ends - lengths - self.num_tokens
        places = [(starts + number, token) for number, token in enumerate(self.before)]
        places += [(ends - len(self.after) + number, token) for number, token in enumerate(self.after)]
        for place, token in places:
            out[place], is_text[place] = token, False
        out[is_text] = ids
        return out


def _before(tokenizer: Tokenizer, bos: str | None) -> tuple[int, ...]:
    expected = tokenizer.prefix_ids
    if bos is None and expected:
        raise UserError(
            f"{tokenizer.folder}: begins every text with {_shown(tokenizer, expected)} by its own configuration; give "
            "--bos yes to begin each document so, or --bos no to do without"
        )
    if bos != "yes":
        return ()
    if not expected and tokenizer.bos_id is None:
        raise UserError(
            f"{tokenizer.folder}: --bos yes, but it has no bos_token and puts nothing before a text; give --bos no, "
            "or name bos_token in tokenizer_config.json"
        )
    return expected or (int(tokenizer.bos_id or 0),)


def _after(tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        eod, expected = tokenizer.eod_id, tokenizer.suffix_ids
    except UserError as error:
        raise UserError(f"{error}, or give --eod no") from error
    if expected and expected[-1] != eod:
        raise UserError(
            f"{tokenizer.folder}: ends every text with {_shown(tokenizer, expected)} by its own configuration, but its "
            f"eos token is {_shown(tokenizer, (eod,))}; correct eos_token in tokenizer_config.json, or give --eod no"
        )
    return (eod,)


def _shown(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return " ".join(f"{tokenizer.special_tokens.get(one) or tokenizer.decode([one])} ({one})" for one in ids)
