"""Cross-entropy over a vocabulary cut by tensor parallelism, that keeps nothing but the logits themselves.

megatron-core keeps probabilities in fp32 beside them. Here rows are taken a few at a time, and in the backward pass
gradients take the place of the logits, which nobody needs any more (autograd reports one who does).
Shape letters: t tokens, v vocabulary of all processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

_NUMBERS = 1 << 20  # of logits at a time: their copy in fp32 stays in a core's cache


class _CrossEntropy(torch.autograd.Function):
    """Logits [t, v/tp], labels [t] -> losses [t] in fp32; overwrites the logits in its backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        here = labels - group.rank() * logits.shape[1]  # column of this process, where it is one
        mine = (here >= 0) & (here < logits.shape[1])
        here = here.clamp(0, logits.shape[1] - 1)[:, None]
        most = logits.amax(-1).float()
        _over(group, most, dist.ReduceOp.MAX)
        sums = torch.zeros(2, len(labels), device=logits.device)  # of exponentials; the label's logit
        for rows in _blocks(logits):
            part = logits[rows].float() - most[rows, None]
            sums[1, rows] = part.gather(1, here[rows])[:, 0] * mine[rows]
            sums[0, rows] = part.exp_().sum(-1)
        _over(group, sums, dist.ReduceOp.SUM)
        log_sum = sums[0].log()
        ctx.save_for_backward(logits, here, mine, most + log_sum)
        return log_sum - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, here, mine, log_sum = ctx.saved_tensors
        for rows in _blocks(logits):
            part = (logits[rows].float() - log_sum[rows, None]).exp_()
            part.scatter_add_(1, here[rows], -mine[rows, None].float())
            logits[rows] = part.mul_(grads[0][rows, None])
        return logits, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of [t, v], a few at a time."""
    size = max(1, _NUMBERS // logits.shape[1])
    yield from (slice(start, start + size) for start in range(0, logits.shape[0], size))


def _over(group: dist.ProcessGroup, x: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Logits [s, b, v/tp], labels [s, b] -> losses [s, b] in fp32. The logits are lost in the backward pass."""
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), group)
    return losses.view(labels.shape)


class Model(GPTModel):
    """megatron-core's model with this loss."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels [b, s], logits [s, b, v/tp] -> losses [b, s]"""
        return cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.pg_collection.tp).transpose(0, 1)
