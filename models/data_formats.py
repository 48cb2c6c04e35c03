"""What indexed data are for, and which .bin/.idx pairs lie together under one prefix."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import IndexedDocuments, blocks, idx_path, manifest_path, read_manifest

PAIRS = {  # a manifest's word for its format -> what follows PREFIX in the names of the pairs that belong to it
    "corpus": ("",),
    "chat": ("", "_mask", "_weight"),
    "preference": ("_chosen", "_chosen_mask", "_rejected", "_rejected_mask"),
    "prompts": ("", "_answer"),
}
OPTIONAL = ("_weight", "_answer")
HELD = {  # pairs that hold no text -> what they hold
    "_mask": "for each token of {text} 1 where it is trained, else 0",
    "_weight": "for each token of {text} how much it counts",
    "_answer": "the UTF-8 bytes of the answers to {text}",
}
SIDES = tuple(HELD)
CORPUS, CHATS = "mp-preprocess", "mp-preprocess-chat"


@dataclass(frozen=True)
class Described:
    """What a manifest says of PREFIX: of all of its pairs, or of the one of ``whole`` whose name ends with ``end``."""

    prefix: str
    whole: str
    end: str
    form: str
    manifest: dict[str, Any] | None

    @property
    def path(self) -> Path:
        """The manifest, also of a part."""
        return manifest_path(self.whole)

    @property
    def ends(self) -> list[str]:
        """What follows PREFIX in the names of its pairs; those of a part are its own."""
        ends = pairs_of(self.whole, self.form)
        return (
            [""] + [end.removeprefix(self.end) for end in ends if end.startswith(f"{self.end}_")] if self.end else ends
        )

    @property
    def part(self) -> str:
        """In words for an error: which part of what this is, nothing for a whole."""
        return f", of which {self.prefix} is a part" if self.end else ""

    @property
    def tool(self) -> str:
        """The command that makes such data."""
        return CORPUS if self.form == "corpus" else CHATS

    def said(self, end: str) -> dict[str, Any]:
        """What the manifest says of the pair PREFIX + ``end``."""
        return pair_said(self.manifest, self.end + end)

    def held(self, end: str) -> str | None:
        """What the pair PREFIX + ``end`` holds, None for text."""
        name = next((name for name in SIDES if f"{self.end}{end}".endswith(name)), None)
        return name and HELD[name].format(text=f"{self.whole}{self.end}{end}".removesuffix(name))


def described(prefix: str | Path) -> Described:
    """What is known of PREFIX: by its manifest, or by that of the set that names it as one of its pairs."""
    manifest = read_manifest(prefix)
    for end in [end for ends in PAIRS.values() for end in ends if end and manifest is None]:
        whole = str(prefix).removesuffix(end)
        if whole == str(prefix) or not manifest_path(whole).is_file():
            continue
        found = read_manifest(whole)
        if pair_said(found, end):
            return Described(str(prefix), whole, end, format_of(whole, found), found)
    return Described(str(prefix), str(prefix), "", format_of(prefix, manifest), manifest)


def refuse_part(known: Described) -> None:
    """Refuse one pair of a set, where all of them must stay together."""
    if known.end:
        raise UserError(f"{known.path}: format {known.form}{known.part}; give {known.whole}, which has all of it")


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
    """What the manifest of PREFIX says of the pair PREFIX + ``end``."""
    found = manifest or {}
    return found if end == "" else (found.get("pairs") or {}).get(end) or {}


def parallel(data: IndexedDocuments, prefix: str | Path, end: str) -> IndexedDocuments:
    """The pair PREFIX + ``end`` ("_mask", say), which has a value for each token of ``data``, the pair PREFIX."""
    other = IndexedDocuments(f"{prefix}{end}", CHATS)
    for name in ("lengths", "documents"):
        mine, theirs = getattr(data.index, name), getattr(other.index, name)
        if len(mine) != len(theirs) or not all(map(np.array_equal, blocks(mine), blocks(theirs))):
            raise UserError(
                f"{idx_path(f'{prefix}{end}')}: its documents are not as long as those of {idx_path(prefix)}; "
                "the two are not of one run: make them again"
            )
    return other
