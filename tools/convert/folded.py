"""Tensors as a table that a terminal can show: one line for all layers and experts of a kind."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from megapatch.tools.convert.found import Item

WIDTH = 120
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=weight)\d+$|(?<=bias)\d+$|(?<=mp_rank_)\d+|(?<=shard_)\d+")


@dataclass(frozen=True)
class Kind:
    """Tensors of one shape and type whose names differ in numbers only."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    parts: int
    size: int

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return self.count * prod(self.shape)


def fold(items: Iterable[Item], whole: bool = False) -> list[Kind]:
    """The kinds of tensors in the order of their first; with ``whole`` every tensor for itself."""
    groups: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        name = f"{item.file}: {item.name}" if whole else _NUMBER.sub("*", item.name)
        groups.setdefault((name, item.dtype, item.shape), []).append(item)
    return [_kind(group, whole) for group in groups.values()]


def _kind(group: Sequence[Item], whole: bool) -> Kind:
    first = group[0]
    columns = list(zip(*(_NUMBER.findall(item.name) for item in group), strict=True))
    spans = iter([spans_of({int(number) for number in column}) for column in columns])
    name = first.name if whole else _NUMBER.sub(lambda _: next(spans), first.name)
    parts, size = sum(item.parts for item in group), sum(item.size for item in group)
    return Kind(printable(name), len(group), first.dtype, first.shape, parts, size)


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


def table(kinds: Sequence[Kind]) -> list[str]:
    """Lines of at most 120 columns (unless a name alone is longer)."""
    head = ("tensor", "count", "dtype", "shape", "parts", "bytes")
    rows = [(k.name, f"{k.count:,}", k.dtype, str(list(k.shape)), f"{k.parts:,}", f"{k.size:,}") for k in kinds]
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    widths[0] = min(widths[0], max(20, WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)))
    return [_line(row, widths) for row in [head, tuple("-" * width for width in widths), *rows]]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name = (
        row[0]
        if len(row[0]) <= widths[0]
        else f"{row[0][: widths[0] // 2 - 2]}...{row[0][-(widths[0] - widths[0] // 2 - 1) :]}"
    )
    left = (name.ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3].ljust(widths[3]))
    return "  ".join([*left, row[4].rjust(widths[4]), row[5].rjust(widths[5])]).rstrip()


def by_dtype(items: Iterable[Item]) -> Mapping[str, dict[str, int]]:
    """dtype -> tensors, parameters and bytes."""
    found: dict[str, dict[str, int]] = {}
    for item in items:
        sums = found.setdefault(item.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += prod(item.shape)
        sums["bytes"] += item.size
    return found
