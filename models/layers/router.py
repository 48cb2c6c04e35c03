"""The router of a mixture of experts, with its load-balancing loss at the same weight for every layout.

With a loss per token, megatron-core 0.16.1 weighs the auxiliary loss by the tokens of this rank (of one sequence, for
the loss of each sequence), but divides gradients by the tokens of the whole batch: with sequence or context parallelism
it counts TP x CP times too little (and as many times as a micro-batch has sequences).
"""

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """megatron-core's top-k router; the auxiliary loss weighs by the tokens of all ranks that share a sequence."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> Tensor:
        """As upstream, with the right number of tokens."""
        whole = activation.shape[0] * self.tp_cp_group.size()  # no tokens are padding here
        return super().attach_and_log_load_balancing_loss(activation, *args, valid_token_count=whole, **kwargs)
