"""What is merged, whether it may be, and what the manifest of the whole says."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megapatch.models.cli import UserError, versions
from megapatch.models.data_formats import PAIRS, SIDES, described, refuse_part
from megapatch.models.indexed_data import Index, manifest_path, read_index
from megapatch.tools.preprocess.pairs.merge_runs import counted_once, runs_of, shards_of

_LOG = logging.getLogger("megapatch.tools.preprocess")


@dataclass(frozen=True)
class Input:
    """One prefix with its pairs, by what follows it in their names; ``implied``: those that are not on the disk."""

    prefix: str
    manifest: dict[str, Any] | None
    form: str
    pairs: dict[str, Index]
    implied: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What must be the same in all: all of the manifest's tokenizer but its place."""
        said = (self.manifest or {}).get("tokenizer") or {}
        return {name: said[name] for name in said if name != "folder"}

    @property
    def num_bytes(self) -> int:
        """Bytes of all .bin files."""
        return sum(index.num_tokens * index.dtype.itemsize for index in self.pairs.values())

    @property
    def num_documents(self) -> int:
        """Documents of the first pair: others have as many."""
        return next(iter(self.pairs.values())).num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of the pairs of texts."""
        return sum(index.num_tokens for end, index in self.pairs.items() if not end.endswith(SIDES))


def read_inputs(prefixes: Sequence[str]) -> list[Input]:
    """Every input, checked; those that are not alike are a UserError that names two of them and what differs."""
    found: list[Input] = []
    for prefix in prefixes:
        known = described(prefix)
        refuse_part(known)
        form = known.form
        if found and found[0].form != form:
            first = found[0]
            raise UserError(f"{prefix}: format {form}, but {first.prefix} has {first.form}; merge those of one format")
        pairs = {end: read_index(f"{prefix}{end}", known.tool) for end in known.ends}
        found.append(Input(prefix, known.manifest, form, pairs))
    found = _completed(found)
    for one in found[1:]:
        refuse_unlike(found[0], one)
    _refuse_tokenizers([one for one in found if one.tokenizer])
    return found


def _completed(inputs: Sequence[Input]) -> list[Input]:
    """The inputs, each with all pairs that one of them has: without weights a token counts as its mask says, without
    answers they are empty; so shards become what one run would have written."""
    ends = [end for end in PAIRS[inputs[0].form] if any(end in one.pairs for one in inputs)]
    found = []
    for one in inputs:
        implied = tuple(end for end in ends if end not in one.pairs)
        pairs = {end: one.pairs[end] if end in one.pairs else _implied(one, end) for end in ends}
        found.append(replace(one, pairs=pairs, implied=implied))
    return found


def _implied(one: Input, end: str) -> Index:
    if end == "_weight":
        return replace(one.pairs["_mask"], dtype=np.dtype(np.float32))
    empty = np.broadcast_to(np.int32(0), one.pairs[""].num_sequences)
    return replace(one.pairs[""], dtype=np.dtype(np.uint8), lengths=empty, num_tokens=0)


def refuse_unlike(first: Input, one: Input) -> None:
    """Refuse a pair that cannot follow the first in one file."""
    for end, index in one.pairs.items():
        other = first.pairs[end]
        names = f"{one.prefix}{end}", f"{first.prefix}{end}"
        if index.dtype != other.dtype:
            raise UserError(f"{names[0]}: {index.dtype}, but {names[1]} is {other.dtype}; make both with one tokenizer")
        if (index.modes is None) != (other.modes is None):
            raise UserError(f"{names[0]} and {names[1]}: one is multimodal, the other is not; they cannot be one")


def _refuse_tokenizers(named: Sequence[Input]) -> None:
    for one in named[1:]:
        first = named[0]
        names = sorted(first.tokenizer.keys() | one.tokenizer.keys())
        for name in [name for name in names if first.tokenizer.get(name) != one.tokenizer.get(name)]:
            raise UserError(
                f"{manifest_path(one.prefix)}: tokenizer {name} {one.tokenizer.get(name)}, but {first.prefix} has "
                f"{first.tokenizer.get(name)}; merge what one tokenizer made in one way"
            )


_ADDED = ("runs", "shards", "engine", "counts", "sources", "special_in_text", "truncation", "inputs")
_OF_ONE = (
    "bin_bytes",
    "xxh3_128",
    "dtype",
    "pairs",
    "tokenizer",
    "run",
    "outputs",
)  # not of the whole, even where all say the same


def merged(inputs: Sequence[Input], pairs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of the whole; ``pairs``: what is said of each pair written."""
    manifests = [one.manifest or {} for one in inputs]
    said = {name: value for name, value in _common(manifests).items() if name not in (*_OF_ONE, *_ADDED)}
    said |= {"tool": "mp-merge-data", "format": inputs[0].form, "versions": versions()}
    if all(one.tokenizer for one in inputs):
        said["tokenizer"] = manifests[0]["tokenizer"]
    said["options"] = _common([manifest.get("options") or {} for manifest in manifests])
    said |= _of_runs(inputs)
    said["merged"] = [_told(one) for one in inputs]
    said |= {"documents": sum(one.num_documents for one in inputs), "tokens": sum(one.num_tokens for one in inputs)}
    side = {end: about for end, about in pairs.items() if end}
    return {**said, **pairs.get("", {}), **({"pairs": side} if side else {})}


def _of_runs(inputs: Sequence[Input]) -> dict[str, Any]:
    """What is added up, each run once: an output of a run has the counts of all of it."""
    manifests = [one.manifest or {} for one in inputs]
    said: dict[str, Any] = {"shards": shards} if (shards := [one for m in manifests for one in shards_of(m)]) else {}
    if runs := list(dict.fromkeys(run for manifest in manifests for run in runs_of(manifest))):
        said["runs"] = runs
    if (numbers := counted_once(manifests)) is None:
        _LOG.warning("inputs share some of their runs: counts are left out; merge what was not merged before")
        return said
    kept = [manifests[number] for number in numbers]
    if any("engine" in manifest for manifest in kept):
        said["engine"] = [manifest.get("engine") for manifest in kept]  # a verdict of each
    said["counts"] = _added([_counted(inputs[number]) for number in numbers])
    for name in ("sources", "special_in_text", "truncation"):
        if any(name in manifest for manifest in kept):
            said[name] = _added([manifest.get(name) or {} for manifest in kept])
    return said | {"inputs": [entry for manifest in kept for entry in manifest.get("inputs") or ()]}


def _counted(one: Input) -> dict[str, Any]:
    given = (one.manifest or {}).get("counts")
    return given or {"documents": one.num_documents, "tokens": one.num_tokens}


def _told(one: Input) -> dict[str, Any]:
    """What stays known of an input."""
    said = {"prefix": one.prefix, "documents": one.num_documents, "tokens": one.num_tokens}
    kept = ("bin_bytes", "xxh3_128", "run", "counts", "engine")
    return said | {name: one.manifest[name] for name in kept if one.manifest and name in one.manifest}


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say alike."""
    return {name: value for name, value in options[0].items() if all(one.get(name) == value for one in options)}


def _added(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whole numbers of the same name added up, also inside objects, and lists joined; shares are left out."""
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            before = total.get(name)
            if isinstance(value, Mapping):
                total[name] = _added([before or {}, value])
            elif isinstance(value, list):
                total[name] = [*(before or []), *value]
            elif isinstance(value, int):
                total[name] = (before or 0) + value
    return total
