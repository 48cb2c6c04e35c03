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

# Logits at a time. A CPU: their copy in fp32 stays in a core's cache. Else: few calls, 512 MiB for the copy.
_CPU_NUMBERS, _NUMBERS = 1 << 20, 1 << 27


class _CrossEntropy(torch.autograd.Function):
    """Logits [t, v/tp], labels [t] -> losses [t] in fp32; overwrites the logits in its backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        here = labels - group.rank() * logits.shape[1]  # column of this process, where it is one
        mine = (here >= 0) & (here < logits.shape[1])
        here = here.clamp(0, logits.shape[1] - 1)[:, None]
        losses, log_sum = _whole(logits, here) if group.size() == 1 else _cut(logits, here, mine, group)
        ctx.save_for_backward(logits, here, mine, log_sum)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, here, mine, log_sum = ctx.saved_tensors
        for rows in _blocks(logits):
            place = logits[rows]
            part = torch.sub(place, log_sum[rows, None], out=place if logits.dtype == torch.float32 else None)
            part.exp_().scatter_add_(1, here[rows], -mine[rows, None].float())
            torch.mul(part, grads[0][rows, None], out=place)
        return logits, None, None


def _whole(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [t, v], labels [t, 1] -> losses and logarithms of the sums of exponentials, [t] in fp32."""
    losses = torch.empty(len(labels), device=logits.device)
    for rows in _blocks(logits):
        losses[rows] = -torch.log_softmax(logits[rows], -1, dtype=torch.float32).gather(1, labels[rows])[:, 0]
    return losses, losses + logits.gather(1, labels)[:, 0]


def _cut(logits: Tensor, labels: Tensor, mine: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """As ``_whole`` over the processes' columns [t, v/tp]; ``mine``, where the label is one of this process."""
    most = logits.amax(-1).float()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    sums = torch.zeros(2, len(labels), device=logits.device)  # of exponentials; the label's logit
    for rows in _blocks(logits):
        part = logits[rows].float() - most[rows, None]
        sums[1, rows] = part.gather(1, labels[rows])[:, 0] * mine[rows]
        sums[0, rows] = part.exp_().sum(-1)
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    log_sum = sums[0].log()
    return log_sum - sums[1], most + log_sum


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of [t, v], a few at a time."""
    numbers = _CPU_NUMBERS if logits.device.type == "cpu" else _NUMBERS
    size = max(1, numbers // logits.shape[1])
    yield from (slice(start, start + size) for start in range(0, logits.shape[0], size))


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Logits [s, b, v/tp], labels [s, b] -> losses [s, b] in fp32. The logits are lost in the backward pass."""
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), group)
    return losses.view(labels.shape)


class Model(GPTModel):
    """megatron-core's model with this loss."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels [b, s], logits [s, b, v/tp] -> losses [b, s]"""
        return cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.pg_collection.tp).transpose(0, 1)
