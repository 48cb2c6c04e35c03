"""Routing to experts of a few groups only, as DeepSeek's models choose the groups.

megatron-core 0.16.1 scores a group by the sum of its best (top-k // groups) experts, which is neither model's way:
DeepSeek-V2 takes the best expert of a group, V3 the sum of the best two (NVIDIA/Megatron-LM issue 1378). All else of
core's routing holds; it lets a ``router_replay`` object choose, and ours does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megapatch.models.layers.router import Router


class GroupChoice:
    """Chooses the top-k experts of the best groups, each scored by the sum of its ``best`` best experts."""

    def __init__(self, best: int) -> None:
        self.best = best

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int, group_topk: int, choose: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores of tokens [t, e] -> those of the chosen [t, topk], and which they are (called by megatron-core)."""
        return choose_in_groups(scores, topk, num_groups, group_topk, self.best)


def choose_in_groups(scores: Tensor, topk: int, groups: int, group_topk: int, best: int) -> tuple[Tensor, Tensor]:
    """[t, e] -> the top-k scores among experts of the best groups [t, topk], and their numbers."""
    by_group = scores.unflatten(1, (groups, -1))  # [t, groups, e/groups]
    of_groups = by_group.topk(best, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, of_groups.topk(group_topk, dim=-1).indices, True)
    allowed = by_group.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
    found = allowed.topk(topk, dim=-1)
    return found.values, found.indices


class BestOfGroupRouter(Router):
    """A group is worth its best expert (DeepSeek-V2)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = GroupChoice(1)


class BestTwoOfGroupRouter(Router):
    """A group is worth its two best experts (DeepSeek-V3)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = GroupChoice(2)
