"""Which texts were seen: a compact table of 128-bit hashes, filled a chunk at a time."""

from pathlib import Path

import numpy as np

SEEN = "seen.hashes"  # a run's note with the hashes of all that it kept
_LEAST_SLOTS = 1 << 16
_BLOCK = 1 << 16  # hashes inserted at a time when the table is made again
_MAX_LOAD, _MIN_LOAD = 0.75, 0.5  # 16 bytes a slot: 21 to 32 bytes a hash


class Seen:
    """An open-addressing table of the hashes in the file ``path`` (16 bytes each), and of those added since.

    The file is appended to by the caller, before the next ``add``: the table grows by being made again from it, so
    that no second table is in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_hashes = 0
        self._make(path.stat().st_size // 16 if path.exists() else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._slots.nbytes

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Take hashes uint64 [n, 2]; which of them are new (also within these, the first of equals), bool [n]."""
        if self.num_hashes + len(hashes) > len(self._slots) * _MAX_LOAD:
            self._make(self.num_hashes + len(hashes))
        return self._insert(hashes)

    def _make(self, room: int) -> None:
        self._slots = np.zeros((0, 2), np.uint64)  # the old one goes first
        self._slots = np.zeros((max(_LEAST_SLOTS, int(room / _MIN_LOAD)), 2), np.uint64)
        self.num_hashes = 0
        with self._path.open("rb") if self._path.exists() else open("/dev/null", "rb") as file:
            while block := file.read(_BLOCK * 16):
                self._insert(np.frombuffer(block, np.uint64).reshape(-1, 2))

    def _insert(self, hashes: np.ndarray) -> np.ndarray:
        keys = np.where(hashes.any(axis=1, keepdims=True), hashes, np.uint64(1))  # zeros mark a free slot
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equals comes first
        ordered = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        candidates = order[first]
        new = np.zeros(len(keys), bool)
        new[candidates] = self._place(keys[candidates])
        self.num_hashes += int(new.sum())
        return new

    def _place(self, keys: np.ndarray) -> np.ndarray:
        """Put distinct keys [n, 2] where there is room; which of them were not there, bool [n]."""
        size = np.uint64(len(self._slots))
        slots = ((keys[:, 0] >> np.uint64(32)) * size) >> np.uint64(32)
        new = np.zeros(len(keys), bool)
        pending = np.arange(len(keys))
        while pending.size:
            at, mine = slots[pending], keys[pending]
            held = self._slots[at]
            free = ~held.any(axis=1)
            self._slots[at[free]] = mine[free]  # of several at one slot the last stays
            placed = free & (self._slots[at] == mine).all(axis=1)
            new[pending[placed]] = True
            pending = pending[~placed & (free | (held != mine).any(axis=1))]
            slots[pending] = (slots[pending] + np.uint64(1)) % size
        return new
