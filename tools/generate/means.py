"""Means and their standard errors."""

import math
from collections.abc import Sequence


def share(hits: Sequence[bool]) -> tuple[float, float | None]:
    """The share of hits and its standard error; None for fewer than two."""
    mean = sum(hits) / len(hits)
    return mean, math.sqrt(mean * (1 - mean) / (len(hits) - 1)) if len(hits) > 1 else None


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Sum over count of all units together, and its standard error when units, not what they hold, are drawn."""
    total, number = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if number < 2:
        return mean, None
    spread = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * number / (number - 1)) / total
