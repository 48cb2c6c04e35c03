"""One pass over the ids of a pair and the lengths of its documents, in bounded memory whatever their number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import Index, bin_path

_DOCUMENTS = 1 << 18  # at a time
_BUFFER_BYTES = 1 << 20  # stays in the processor's cache
_EXACT = 1 << 18  # lengths below are counted each, longer documents are few: as many as fit in the .bin


@dataclass
class Lengths:
    """How many documents there are of each length."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_EXACT, np.int64))
    longer: list[np.ndarray] = field(default_factory=list)

    def add(self, lengths: np.ndarray) -> None:
        """Count documents of so many tokens, int64 [documents]."""
        short = lengths < _EXACT
        found = np.bincount(lengths[short])
        self.counts[: len(found)] += found
        if not short.all():
            self.longer.append(lengths[~short])

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths that occur, rising, and how many documents have each."""
        short = np.flatnonzero(self.counts)
        long, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self.longer]), return_counts=True)
        return np.concatenate([short, long]), np.concatenate([self.counts[short], counts])

    def summary(self) -> dict[str, Any]:
        """Smallest, median, mean, p99, largest, and a histogram by powers of 2: [from, to, documents] each."""
        lengths, counts = self.table()
        if not len(lengths):
            return {"min": None, "median": None, "mean": None, "p99": None, "max": None, "histogram": []}
        below = np.cumsum(counts)
        total = int(below[-1])

        def at(share: float) -> int:  # the smallest length that so many documents do not pass
            return int(lengths[np.searchsorted(below, max(1, int(np.ceil(share * total))))])

        bins = np.frexp(lengths)[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ...
        sums = np.bincount(bins, weights=counts, minlength=1)
        histogram = [
            [0 if not power else 1 << (power - 1), (1 << power) - 1, int(sums[power])]
            for power in range(int(bins[0]), int(bins[-1]) + 1)
        ]
        return {
            "min": int(lengths[0]),
            "median": at(0.5),
            "mean": float((lengths * counts).sum()) / total,
            "p99": at(0.99),
            "max": int(lengths[-1]),
            "histogram": histogram,
        }


@dataclass
class Scan:
    """What the pass found; ``ends``: documents whose last token is eod, ``eods``: eod tokens in all."""

    lengths: Lengths = field(default_factory=Lengths)
    smallest: Any = None
    largest: Any = None
    empty: int = 0
    eods: int = 0
    ends: int = 0
    digest: str = ""  # xxh3-128 of the .bin


def scan(prefix: str | Path, index: Index, eod_id: int | None, tell: Callable[[int], Any]) -> Scan:
    """Read the .bin once from start to end; ``tell`` hears of the bytes read."""
    found, state = Scan(), xxhash.xxh3_128()
    with bin_path(prefix).open("rb", buffering=0) as file:
        for first in range(0, index.num_documents, _DOCUMENTS):
            starts = index.starts(first, min(first + _DOCUMENTS, index.num_documents))
            index.release()
            lengths = np.diff(starts)
            found.lengths.add(lengths)
            found.empty += int((lengths == 0).sum())
            last = starts[1:][lengths > 0] - 1  # places of the last tokens
            for at, ids in _ids(file, prefix, index.dtype, int(starts[0]), int(starts[-1])):
                state.update(ids.data)
                _look(found, ids, at, last, eod_id)
                tell(ids.nbytes)
    found.digest = state.hexdigest()
    return found


def _ids(file: BinaryIO, prefix: str | Path, dtype: np.dtype, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, ids) in one buffer that is used again."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    step = _BUFFER_BYTES // dtype.itemsize
    for at in range(begin, end, step):
        view = buffer[: min(step, end - at) * dtype.itemsize]
        got = 0
        while got < len(view):
            more = file.readinto(view[got:])  # type: ignore[attr-defined]
            if not more:
                raise UserError(f"{bin_path(prefix)}: ended while it was read; it is being written: inspect it later")
            got += more
        yield at, np.frombuffer(view, dtype)


def _look(found: Scan, ids: np.ndarray, at: int, last: np.ndarray, eod_id: int | None) -> None:
    smallest, largest = ids.min().item(), ids.max().item()
    found.smallest = smallest if found.smallest is None else min(found.smallest, smallest)
    found.largest = largest if found.largest is None else max(found.largest, largest)
    if eod_id is not None:
        found.eods += int(np.count_nonzero(ids == eod_id))
        here = last[np.searchsorted(last, at) : np.searchsorted(last, at + len(ids))]
        found.ends += int(np.count_nonzero(ids[here - at] == eod_id))
