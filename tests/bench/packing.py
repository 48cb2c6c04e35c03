"""Compare mp-pack-data's plan with next-fit, first-fit-decreasing and the `binpacking` package, run in turns.

Lengths are log-normal, as of conversations. Next-fit in the order of the data is what Pai-Megatron-Patch does;
first-fit-decreasing over a tree of rooms is what Megatron-Bridge does (written anew here); `binpacking`, where it is
installed, is what ms-swift calls, on at most --slow-count conversations. Prints how full the rows are, and the best and
median processor seconds. "pack" is the whole of mp-pack-data: index read and checked, plan made and stored.

    python tests/bench/packing.py --rounds 5
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megapatch.models import packing
from megapatch.models.indexed_data import bin_path, idx_path, write_index

Packer = Callable[[np.ndarray, int], int]  # lengths [n], tokens of a row -> rows


def ours(lengths: np.ndarray, row: int) -> int:
    """The plan, shuffled."""
    return packing.make_plan(lengths, row).num_rows


def next_fit(lengths: np.ndarray, row: int) -> int:
    """One row open at a time."""
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, row
        room -= length
    return rows


def first_fit_decreasing(lengths: np.ndarray, row: int) -> int:
    """Longest first, each into the first row that takes it; a tree holds the largest room below each node."""
    leaves = 1 << max(len(lengths) - 1, 1).bit_length()
    tree, opened = [row] * (2 * leaves), 0
    for length in sorted(lengths.tolist(), reverse=True):
        node = 1
        while node < leaves:
            node *= 2
            if tree[node] < length:
                node += 1
        opened = max(opened, node - leaves + 1)
        tree[node] -= length
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return opened


def by_package(lengths: np.ndarray, row: int) -> int:
    """`binpacking`'s rows of constant volume."""
    import binpacking

    return len(binpacking.to_constant_volume(lengths.tolist(), row))


def installed() -> bool:
    """Is `binpacking` there?"""
    try:
        import binpacking  # noqa: F401
    except ImportError:
        print("binpacking: not installed, left out (pip install binpacking)")
        return False
    return True


def conversations(count: int, row: int) -> np.ndarray:
    """Lengths of conversations, int32 [n]."""
    found = np.random.default_rng(0).lognormal(6.0, 1.0, count)
    return np.clip(found.astype(np.int32), 8, row)


def stored(folder: Path, lengths: np.ndarray, row: int) -> tuple[Packer, float]:
    """The whole of mp-pack-data on data of these lengths, and what writing them took."""
    prefix, started = folder / f"data{len(lengths)}", time.process_time()
    np.zeros(int(lengths.sum()), np.uint16).tofile(bin_path(prefix))
    write_index(idx_path(prefix), lengths, np.dtype(np.uint16))

    def pack(_: np.ndarray, row: int) -> int:
        plan = packing.pack(prefix, row)
        packing.write_plan(prefix, plan)
        return packing.read_plan(prefix, row).num_rows

    return pack, time.process_time() - started


def compare(folder: Path, count: int, row: int, rounds: int, slow_count: int) -> None:
    """One table."""
    lengths = conversations(count, row)
    packers: dict[str, Packer] = {"plan": ours, "pack": stored(folder, lengths, row)[0], "next-fit": next_fit}
    packers["first-fit-decreasing"] = first_fit_decreasing
    if count <= slow_count and installed():
        packers["binpacking"] = by_package
    seconds: dict[str, list[float]] = {name: [] for name in packers}
    full = {}
    for _ in range(rounds):
        for name, packer in packers.items():
            started = time.process_time()
            rows = packer(lengths, row)
            seconds[name].append(time.process_time() - started)
            full[name] = int(lengths.sum()) / (rows * row)
    print(f"{count:,} conversations, rows of {row:,}")
    for name, times in seconds.items():
        best, median = min(times), statistics.median(times)
        print(f"  {name:22} {100 * full[name]:7.3f} % full {best:8.3f} s best {median:8.3f} s median")


def main() -> None:
    """Compare for every number of conversations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[200_000, 1_000_000], help="conversations")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 32768], help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run")
    parser.add_argument("--slow-count", type=int, default=20_000, help="most conversations for `binpacking`")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in words.rows:
            for count in words.counts:
                compare(Path(folder), count, row, words.rounds, words.slow_count)


if __name__ == "__main__":
    main()
