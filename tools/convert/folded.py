"""Tensors as a table that a terminal can show: one line for all layers and experts of a kind."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from megapatch.tools.convert.found import Item

WIDTH = 120
_NUMBER = re.compile(  # of a layer, an expert, a shard
    r"(?<=\.)[0-9]{1,9}(?=\.|$)|(?<=weight)[0-9]{1,9}$|(?<=bias)[0-9]{1,9}$|(?<=shard_)[0-9]{1,9}(?![0-9])"
)


@dataclass(frozen=True)
class Kind:
    """Tensors of one shape and type whose names differ in numbers only."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    parts: int
    size: int
    file: str  # empty where they lie in several

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return self.count * prod(self.shape)


def fold(items: Iterable[Item], whole: bool = False) -> list[Kind]:
    """The kinds of tensors in the order of their first; with ``whole`` every tensor for itself."""
    groups: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        name = (item.name, item.file) if whole else _NUMBER.sub("*", item.name)
        groups.setdefault((name, item.dtype, item.shape), []).append(item)
    return [_kind(group, whole) for group in groups.values()]


def _kind(group: Sequence[Item], whole: bool) -> Kind:
    first = group[0]
    columns = list(zip(*(_NUMBER.findall(item.name) for item in group), strict=True))
    spans = iter([spans_of({int(number) for number in column}) for column in columns])
    name = first.name if whole else _NUMBER.sub(lambda _: next(spans), first.name)
    parts, size = sum(item.parts for item in group), sum(item.size for item in group)
    file = first.file if all(item.file == first.file for item in group) else ""
    return Kind(printable(name), len(group), first.dtype, first.shape, parts, size, printable(file))


def spans_of(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "{0-2,5}"; a single number is itself."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return str(ordered[0])
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    shown = spans if len(spans) <= 6 else [*spans[:3], "...", spans[-1]]
    return "{" + ",".join(shown) + "}"


def printable(text: str) -> str:
    """Names come from files of others: no control characters reach the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def table(kinds: Sequence[Kind], whole: bool = False) -> list[str]:
    """Lines of at most 120 columns; with ``whole`` the file of each tensor too."""
    head = ["tensor", "count", "dtype", "shape", "parts", "bytes", "file"]
    rows = [[k.name, f"{k.count:,}", k.dtype, str(list(k.shape)), f"{k.parts:,}", f"{k.size:,}", k.file] for k in kinds]
    lines = [row if whole else row[:-1] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], max(20, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines.insert(1, ["-" * width for width in widths])
    return ["  ".join(_cells(line, widths)).rstrip() for line in lines]


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The cells of a line in their widths: numbers to the right, a name that is too long without its middle."""
    name, width = row[0], widths[0]
    shown = name if len(name) <= width else f"{name[: width // 2 - 2]}...{name[-(width - width // 2 - 1) :]}"
    sides = (str.ljust, str.rjust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
    return [side(cell, width) for side, cell, width in zip(sides, [shown, *row[1:]], widths, strict=False)]


def by_dtype(items: Iterable[Item]) -> Mapping[str, dict[str, int]]:
    """dtype -> tensors, parameters and bytes."""
    found: dict[str, dict[str, int]] = {}
    for item in items:
        sums = found.setdefault(item.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += prod(item.shape)
        sums["bytes"] += item.size
    return found
