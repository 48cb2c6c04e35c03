"""What is kept of a conversation that is longer than the limit."""

from typing import Literal

import numpy as np

Truncate = Literal["drop", "left", "right", "turn", "split"]
Cut = tuple[int, int]  # tokens [start, end)


def cuts(weights: np.ndarray, most: int, how: Truncate) -> list[Cut]:
    """The parts to keep of a conversation whose tokens have ``weights`` [tokens], each of at most ``most`` tokens.

    Parts in which nothing is trained are left out.
    """
    found = [part for part in _parts(weights, most, how) if weights[slice(*part)].any()]
    return found


def _parts(weights: np.ndarray, most: int, how: Truncate) -> list[Cut]:
    size = len(weights)
    if size <= most:
        return [(0, size)]
    match how:
        case "drop":
            return []
        case "left":
            return [(size - most, size)]
        case "right":
            return [(0, most)]
        case "turn":
            trained = weights > 0
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False)) + 1
            fitting = ends[ends <= most]
            return [(0, int(fitting[-1]))] if fitting.size else []
        case "split":
            return [(start, min(start + most, size)) for start in range(0, size, most)]
