"""Weights of pairs for a blend, by how many tokens they have."""

from collections.abc import Sequence

from megapatch.models.cli import UserError
from megapatch.models.data_formats import described
from megapatch.models.indexed_data import read_index


def weights(prefixes: Sequence[str], temperature: float) -> dict[str, float]:
    """The share of each pair, by prefix, which add up to 1: tokens to the power 1 / ``temperature``."""
    made_with: dict[str, str] = {}  # tokenizer -> the first pair that names it
    tokens = {}
    for prefix in prefixes:
        if prefix in tokens:
            raise UserError(f"{prefix}: given twice; a pair has one weight")
        known = described(prefix)
        if known.form != "corpus":
            raise UserError(f"{known.path}: format {known.form}{known.part}; mp-pretrain blends corpora")
        if digest := ((known.manifest or {}).get("tokenizer") or {}).get("digest"):
            made_with.setdefault(digest, prefix)
        if len(made_with) > 1:
            first, other = made_with.values()
            raise UserError(f"{other}: made with another tokenizer than {first}; make both with one")
        tokens[prefix] = read_index(prefix).num_tokens
        if not tokens[prefix]:
            raise UserError(f"{prefix}: has no tokens; leave it out")
    raised = {prefix: (count / max(tokens.values())) ** (1 / temperature) for prefix, count in tokens.items()}
    return {prefix: value / sum(raised.values()) for prefix, value in raised.items()}
