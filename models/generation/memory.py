"""What an engine takes of one process's memory, and whether packed copies of weights fit beside the rest."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from megapatch.models.space import free_bytes, short

_SHARE = 0.9  # of what is free, for keys, values and copies; the rest is for activations and logits


class Memory(NamedTuple):
    """Bytes on this process."""

    weights: int
    copies: int  # of weights, packed for the CPU's kernels
    cache: int  # keys and values, when all sequences have the longest length

    def __str__(self) -> str:
        copies = f", packed copies of them {short(self.copies)}B" if self.copies else ""
        return f"weights {short(self.weights)}B{copies}, keys and values up to {short(self.cache)}B"

    @property
    def crowded(self) -> str:
        """Why copies cannot be kept: the numbers; empty when they can."""
        free = free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's word
        if not self.copies or self.copies + self.cache <= free * _SHARE:
            return ""
        return (
            f"packed copies of weights would take {short(self.copies)}B beside {short(self.cache)}B for keys and "
            f"values, and {short(free)}B are free: going on without, slower"
        )


def weights_bytes(chunks: Sequence[Any]) -> int:
    """Of all parameters, each counted once."""
    return sum(one.nbytes for one in {id(one): one for chunk in chunks for one in chunk.parameters()}.values())
