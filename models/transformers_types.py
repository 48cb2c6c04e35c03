"""Which model types the installed transformers computes: the hub has some families as code of their own."""

from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig


def refuse_unknown(hf: HfConfig, instead: str) -> None:
    """A model type that transformers does not know is a UserError, which ends with what to do instead."""
    from transformers import CONFIG_MAPPING

    kind = hf["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model_type {kind!r}: transformers has no such model; {instead}")
