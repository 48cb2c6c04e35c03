"""What is merged, whether it may be, and what the manifest of the whole says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megapatch.models.cli import UserError, versions
from megapatch.models.data_formats import SIDES, format_of, pairs_of
from megapatch.models.indexed_data import Index, idx_path, manifest_path, read_index, read_manifest


@dataclass(frozen=True)
class Input:
    """One prefix with its pairs, by what follows it in their names."""

    prefix: str
    manifest: dict[str, Any] | None
    form: str
    pairs: dict[str, Index]

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
        manifest = read_manifest(prefix)
        form = format_of(prefix, manifest)
        one = Input(prefix, manifest, form, {end: read_index(f"{prefix}{end}") for end in pairs_of(prefix, form)})
        for first in found[:1]:
            refuse_unlike(first, one)
        found.append(one)
    _refuse_tokenizers([one for one in found if one.tokenizer])
    return found


def refuse_unlike(first: Input, one: Input) -> None:
    """Refuse a pair that cannot follow the first in one file."""
    if first.form != one.form:
        raise UserError(
            f"{one.prefix}: format {one.form}, but {first.prefix} has {first.form}; merge those of one format"
        )
    if missing := [end for end in first.pairs if end not in one.pairs]:
        raise UserError(
            f"{idx_path(f'{one.prefix}{missing[0]}')}: no such file, but {first.prefix}{missing[0]} is there"
        )
    if missing := [end for end in one.pairs if end not in first.pairs]:
        raise UserError(
            f"{idx_path(f'{first.prefix}{missing[0]}')}: no such file, but {one.prefix}{missing[0]} is there"
        )
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


_OF_ONE = ("bin_bytes", "xxh3_128", "dtype", "pairs", "tokenizer")  # not of the whole, even where all say the same


def merged(inputs: Sequence[Input], pairs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of the whole; ``pairs``: what is said of each pair written."""
    manifests = [one.manifest or {} for one in inputs]
    said = {name: value for name, value in _common(manifests).items() if name not in _OF_ONE}
    said |= {"tool": "mp-merge-data", "format": inputs[0].form, "versions": versions()}
    if all(one.tokenizer for one in inputs):
        said["tokenizer"] = manifests[0]["tokenizer"]
    said["options"] = _common([manifest.get("options") or {} for manifest in manifests])
    for name in ("engine", "special_in_text"):
        if verdicts := _different([manifest[name] for manifest in manifests if name in manifest]):
            said[name] = verdicts[0] if len(verdicts) == 1 else verdicts
    said["counts"] = _counts([_counted(one) for one in inputs])
    said["sources"] = _counts([manifest.get("sources") or {} for manifest in manifests])
    said["inputs"] = [entry for manifest in manifests for entry in manifest.get("inputs") or ()]
    said["merged"] = [_told(one) for one in inputs]
    said |= {"documents": sum(one.num_documents for one in inputs), "tokens": sum(one.num_tokens for one in inputs)}
    side = {end: about for end, about in pairs.items() if end}
    return {**said, **pairs.get("", {}), **({"pairs": side} if side else {})}


def _counted(one: Input) -> dict[str, Any]:
    given = (one.manifest or {}).get("counts")
    return given or {"documents": one.num_documents, "tokens": one.num_tokens}


def _told(one: Input) -> dict[str, Any]:
    """What stays known of an input."""
    said = {"prefix": one.prefix, "documents": one.num_documents, "tokens": one.num_tokens}
    kept = ("bin_bytes", "xxh3_128", "counts", "engine")
    return said | {name: one.manifest[name] for name in kept if one.manifest and name in one.manifest}


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say alike."""
    return {name: value for name, value in options[0].items() if all(one.get(name) == value for one in options)}


def _different(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _counts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of the same name added up, also inside objects; other values of the first that has them."""
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            before = total.get(name)
            if isinstance(value, Mapping):
                total[name] = _counts([before if isinstance(before, Mapping) else {}, value])
            elif isinstance(value, int | float) and isinstance(before, int | float):
                total[name] = before + value
            else:
                total.setdefault(name, value)
    return total
