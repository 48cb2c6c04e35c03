"""The table of hashes agrees with a set, whatever comes in whatever order, and is made again from its file."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megapatch.tools.preprocess.run import seen
from megapatch.tools.preprocess.run.seen import Seen

NUMBERS = st.integers(0, 3) | st.integers(0, (1 << 64) - 1)
BATCHES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40), max_size=8)


def table(batch: list[tuple[int, int]]) -> np.ndarray:
    return np.array(batch, np.uint64).reshape(-1, 2)


def add_all(path: Path, batches: list[np.ndarray], found: Seen | None = None) -> list[bool]:
    """Add batches as a run does, which appends what is new to the file."""
    found, news = found or Seen(path), []
    for batch in batches:
        new = found.add(batch)
        with path.open("ab") as file:
            file.write(batch[new].tobytes())
        news += new.tolist()
    return news


def told_by_a_set(batches: list[np.ndarray]) -> list[bool]:
    known: set[tuple[int, ...]] = set()
    news = []
    for key in (tuple(row) for batch in batches for row in batch.tolist()):
        key = key if any(key) else (1, 1)  # zeros are no hash of xxh3; they stand for free slots
        news.append(key not in known)
        known.add(key)
    return news


@settings(max_examples=150, deadline=None)
@given(batches=BATCHES, slots=st.sampled_from([4, 16, 64]), cut=st.integers(0, 8))
def test_new_is_what_a_set_says_at_any_size_and_after_a_resume(
    batches: list[list[tuple[int, int]]], slots: int, cut: int
) -> None:
    arrays = [table(batch) for batch in batches]
    least, seen._LEAST_SLOTS = seen._LEAST_SLOTS, slots  # so that it grows
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "hashes"
            news = add_all(path, arrays[:cut]) + add_all(path, arrays[cut:])
    finally:
        seen._LEAST_SLOTS = least
    assert news == told_by_a_set(arrays)


def test_equal_halves_do_not_make_equal_hashes(tmp_path: Path) -> None:
    batch = table([(5, 1), (5, 2), (6, 1), (5, 1), (0, 7), (7, 0)])
    assert Seen(tmp_path / "none").add(batch).tolist() == [True, True, True, False, True, True]


def test_a_million_hashes_take_at_most_32_bytes_each(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).integers(0, 1 << 64, (1_000_000, 2), np.uint64)
    numbers[900_000:] = numbers[:100_000]
    path = tmp_path / "hashes"
    table_, per_hash = Seen(path), []
    new = 0
    for start in range(0, len(numbers), 20_000):
        new += sum(add_all(path, [numbers[start : start + 20_000]], table_))
        if table_.nbytes > seen._LEAST_SLOTS * 16:
            per_hash.append(table_.nbytes / table_.num_hashes)
    assert new == table_.num_hashes == 900_000
    assert 21 < min(per_hash) <= max(per_hash) <= 33
