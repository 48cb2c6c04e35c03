"""What indexed data are for, and which .bin/.idx pairs lie together under one prefix."""

from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import IndexedDocuments, blocks, idx_path, manifest_path

PAIRS = {  # a manifest's word for its format -> what follows PREFIX in the names of the pairs that belong to it
    "corpus": ("",),
    "chat": ("", "_mask", "_weight"),
    "preference": ("_chosen", "_chosen_mask", "_rejected", "_rejected_mask"),
    "prompts": ("", "_answer"),
}
OPTIONAL = ("_weight", "_answer")
SIDES = ("_mask", "_weight", "_answer")  # pairs that hold no text


def format_of(prefix: str | Path, manifest: dict[str, Any] | None) -> str:
    """The manifest's word for its format; data without a manifest are a corpus."""
    found = "corpus" if manifest is None else manifest.get("format")
    if found not in PAIRS:
        raise UserError(f"{manifest_path(prefix)}: format {found!r}; expected one of {', '.join(PAIRS)}; make it again")
    return str(found)


def pairs_of(prefix: str | Path, form: str) -> list[str]:
    """What follows PREFIX in the names of its pairs, optional ones only where they are there."""
    return [end for end in PAIRS[form] if end not in OPTIONAL or idx_path(f"{prefix}{end}").exists()]


def pair_said(manifest: dict[str, Any] | None, end: str) -> dict[str, Any]:
    """What the manifest says of the pair PREFIX + ``end``."""
    found = manifest or {}
    return found if end == "" else (found.get("pairs") or {}).get(end) or {}


def parallel(data: IndexedDocuments, prefix: str | Path, end: str) -> IndexedDocuments:
    """The pair PREFIX + ``end`` ("_mask", say), which has a value for each token of ``data``, the pair PREFIX."""
    other = IndexedDocuments(f"{prefix}{end}")
    for name in ("lengths", "documents"):
        mine, theirs = getattr(data.index, name), getattr(other.index, name)
        if len(mine) != len(theirs) or not all(map(np.array_equal, blocks(mine), blocks(theirs))):
            raise UserError(
                f"{idx_path(f'{prefix}{end}')}: its documents are not as long as those of {idx_path(prefix)}; "
                "the two are not of one run: make them again"
            )
    return other
