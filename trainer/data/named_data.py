"""What the flags for data name: prefixes of indexed data, or files of which such data are made; blends of either."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import manifest_path
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer.data.made_data import Maker, make, prefix_for, refuse_missing
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import first, together

FLAGS = {  # what the data are for -> options that name prefixes, or files
    "training": ("data_path", "data"),
    "validation": ("valid_data_path", "valid_data"),
    "test": ("test_data_path", "test_data"),
}


@dataclass(frozen=True)
class Named:
    """What one flag names: groups of names that belong together, and the weights of these groups where given."""

    flag: str
    groups: list[list[str]]
    weights: list[float] | None
    direct: bool  # files, not prefixes


def named(options: TrainOptions, part: str) -> Named:
    """What is named for a part of FLAGS; no groups where nothing is."""
    words, files = (list(getattr(options, name, [])) for name in FLAGS[part])
    flag = f"--{FLAGS[part][bool(files)].replace('_', '-')}"
    names, weights = parse_blend(files or words, flag)
    joined = bool(files) and weights is None  # without weights, files are one set
    return Named(flag, [names] if joined else [[name] for name in names], weights, bool(files))


def parse_blend(words: list[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """Prefixes and their weights, None where none are given, from 'PREFIX ...' or 'WEIGHT PREFIX WEIGHT PREFIX ...'."""

    def weight(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    weights = [weight(word) for word in words[::2]]
    if len(words) < 2 or any(w is None for w in weights):
        return list(words), None
    if len(words) % 2:
        raise UserError(f"{flag}: {len(words)} words; a blend needs WEIGHT PREFIX pairs")
    numbers = [w for w in weights if w is not None]
    for number, prefix in zip(numbers, words[1::2], strict=True):
        if not 0 < number < float("inf"):
            raise UserError(f"{flag}: weight {number} of {prefix}; a weight is a number above 0")
    return words[1::2], numbers


def refuse_missing_files(parts: Iterable[Named]) -> None:
    """UserError where any file that is named is not there: before the first is read, which may take hours."""
    for what in parts:
        for files in what.groups if what.direct else []:
            refuse_missing(files, what.flag)


def checkable(options: TrainOptions, what: Named, maker: Maker, tokenizer: Tokenizer) -> list[str]:
    """The prefixes, before processes meet. What files name, the first process makes; the others see only the files."""
    if not what.direct:
        return _flat(what.groups)
    if options.dry_run or not first():
        return []
    return [str(make(options, maker, files, tokenizer.folder)) for files in what.groups]


def agreed(options: TrainOptions, what: Named, maker: Maker, tokenizer: Tokenizer) -> list[str]:
    """The prefixes, those that the first process made told to all (every rank must call)."""
    import torch.distributed as dist

    if not what.direct:
        return _flat(what.groups)
    found: list[Any] = [None]
    with together():
        if first():
            found = [[str(prefix_for(options, maker, files, tokenizer.folder)) for files in what.groups]]
    dist.broadcast_object_list(found)
    with together():
        for prefix in found[0]:
            if not manifest_path(prefix).exists():
                raise UserError(f"{prefix}: not there; all nodes must share --save, or --data-cache-path")
    return list(found[0])


def _flat(groups: list[list[str]]) -> list[str]:
    return [name for group in groups for name in group]
