"""Losses by the source that tokens are of, for the log; nothing of it reaches what is trained."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


class BySource:
    """Sums of weight x loss and of weights since the last ``said``, float64 [2, sources]."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.sums = torch.zeros((2, len(self.names)), dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Forget what was met."""
        self.sums.zero_()

    def watching(self, source: Tensor) -> Callable[[Tensor, Tensor], None] | None:
        """What takes in a forward pass's losses and weights [b, s]; ``source`` [b, s] or, of whole rows, [b, 1]."""
        return partial(self._watch, source) if len(self.names) > 1 else None

    def _watch(self, source: Tensor, output: Tensor, mask: Tensor) -> None:
        if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others hold the same
            weights = mask.double()
            for part, values in zip(self.sums, (output.double() * weights, weights), strict=True):
                part.index_add_(0, source.flatten(), values.sum_to_size(source.shape).flatten())

    @property
    def said(self) -> dict[str, Any]:
        """For the log: the mean of each source that was met, of all ranks (collective); nothing for a single one."""
        if len(self.names) < 2:
            return {}
        torch.distributed.all_reduce(self.sums)
        found: dict[str, list[float]] = {}
        for name, total, weight in zip(self.names, *self.sums.tolist(), strict=True):
            earlier = found.get(name, [0.0, 0.0])  # a blend may name a source twice
            found[name] = [earlier[0] + total, earlier[1] + weight]
        self.clear()
        return {"loss_of": {name: total / weight for name, (total, weight) in found.items() if weight}}
