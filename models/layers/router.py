"""The router of a mixture of experts: its losses weigh the same at every layout, and it counts where tokens go.

With a loss per token, megatron-core 0.16.1 weighs auxiliary losses by the tokens of this rank (of one sequence, for the
loss of each sequence), but divides gradients by the tokens of the whole batch: with sequence or context parallelism
it counts TP x CP times too little (and as many times as a micro-batch has sequences). In bf16 it counts the tokens of
experts in bf16, too, which is right up to 256 of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


@dataclass
class Load:
    """What a router has done on this rank since the load was last taken."""

    tokens: Tensor  # that each expert got, [e] int64
    routed: int = 0  # tokens x experts per token that were asked for
    z_loss: float | Tensor = 0.0  # sum over tokens of the square of the log-sum-exp of logits


class Router(TopKRouter):
    """megatron-core's top-k router; auxiliary losses weigh by the tokens of all ranks that share a sequence."""

    load: Load | None = None
    last_bias: Tensor  # of the experts, before its last update

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> Tensor:
        """As upstream, with the right number of tokens."""
        whole = activation.shape[0] * self.tp_cp_group.size()  # what pads a row is routed too
        return super().attach_and_log_load_balancing_loss(activation, *args, valid_token_count=whole, **kwargs)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """[t, e] -> the same, whose gradient has that of coeff * logsumexp^2, summed over tokens."""
        assert padding_mask is None, "padding among tokens is not supported"
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self._training_pass():
            return logits
        loss = torch.logsumexp(logits.float(), dim=-1).square().sum()
        self._load(logits).z_loss += loss.detach()
        return MoEAuxLossAutoScaler.apply(logits, loss * coefficient)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As upstream: logits [s, b, e] -> weights and choices [s*b, e]; what was chosen is counted."""
        weights, chosen = super().routing(logits, padding_mask)
        if self._training_pass():
            load = self._load(logits)
            load.tokens += chosen.sum(0)
            load.routed += chosen.shape[0] * self.topk
        return weights, chosen

    def take_load(self) -> Load | None:
        """The load since the last call; None where no token was routed in training."""
        found, self.load = self.load, None
        return found

    def _load(self, logits: Tensor) -> Load:
        if self.load is None:
            experts = self.config.num_moe_experts
            self.load = Load(torch.zeros(experts, dtype=torch.int64, device=logits.device))
        return self.load

    def _training_pass(self) -> bool:
        """False in evaluation, and in a forward pass that is computed again later."""
        return self.training and torch.is_grad_enabled()

    def _maintain_float32_expert_bias(self) -> None:
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()
