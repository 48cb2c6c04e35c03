"""Which runs the inputs of a merge come from: counts are of runs, and shards of a run have an order."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Manifest = Mapping[str, Any]


def runs_of(manifest: Manifest) -> list[str]:
    """The runs whose counts a manifest holds; none where it names none."""
    found = manifest.get("runs") or [manifest.get("run")]
    return [one for one in found if one]


def counted_once(manifests: Sequence[Manifest]) -> list[int] | None:
    """Which of the inputs to add up, so that each run is counted once; None where runs cannot be told apart.

    All outputs of a run (shares, keys) have the counts of the whole run.
    """
    seen: set[str] = set()
    kept = []
    for number in sorted(range(len(manifests)), key=lambda i: -len(runs_of(manifests[i]))):
        runs = set(runs_of(manifests[number]))
        if runs and runs <= seen:
            continue
        if runs & seen:
            return None
        seen |= runs
        kept.append(number)
    return sorted(kept)


def shards_of(manifest: Manifest) -> list[list[int]]:
    """[number of shards, this one] of all that lies in a pair, in order."""
    if found := manifest.get("shards"):
        return [list(one) for one in found]
    said = manifest.get("options") or {}
    count, shard = said.get("shards"), said.get("shard")
    return [[count, shard]] if type(count) is int and count > 1 and type(shard) is int else []


def shard_warnings(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What keeps the shards of --input from being what one run makes; several whole sets one after another are."""
    entries = [one for manifest in manifests for one in shards_of(manifest) or [[0, 0]]]
    for count, group in groupby(entries, lambda one: one[0]):
        found = [shard for _, shard in group]
        if not count or found == list(range(count)) * (len(found) // count):
            continue
        times = Counter(found)
        missing = [shard for shard in range(count) if not times[shard]]
        doubled = [shard for shard in range(count) if times[shard] > max(1, min(times.values()))]
        told = [f"{_words(missing, count)} missing"] if missing else []
        told += [f"{_words(doubled, count)} there more often than others"] if doubled else []
        if found != sorted(found) and (not told or len(times) == len(found)):
            told.append(f"shards come as {' '.join(map(str, found))}, not in order")
        yield "; ".join(told or [f"shards come as {' '.join(map(str, found))}"]) + "; this is not what one run makes"


def _words(shards: Sequence[int], count: int) -> str:
    names = " ".join(map(str, shards))
    return f"shard {names} of {count} is" if len(shards) == 1 else f"shards {names} of {count} are"
