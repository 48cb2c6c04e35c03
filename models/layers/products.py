"""Products with weights on a CPU: fp32 by oneDNN, and gradients of weights added to megatron-core's buffers at once.

PyTorch multiplies fp32 matrices by MKL, which on an AMD processor (Zen 4) takes 1.12 times oneDNN's time; those in bf16
it gives to oneDNN itself. megatron-core makes each gradient of a weight, then adds it to ``main_grad``: one more tensor
of the weight's size, written and read again. Its own way around that is a kernel of Apex for GPUs.
Shape letters: t tokens, n outputs, k inputs, h hidden, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Upstream
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

upstream_lookup = VocabParallelEmbedding.forward


def steady(weight: Tensor) -> bool:
    """Whether a weight meets the same few numbers of rows again and again: in training, outside of experts.

    oneDNN compiles and keeps a kernel for each shape: 6,000 numbers of rows took 0.8 GB and 2.4 times MKL's time.
    """
    return hasattr(weight, "main_grad") and not getattr(weight, "rows_vary", False)


def product(x: Tensor, weight: Tensor, by_onednn: bool = True) -> Tensor:
    """[..., k] and [n, k] -> [..., n]"""
    by_onednn = by_onednn and torch.backends.mkldnn.is_available()
    if by_onednn and x.dtype == weight.dtype == torch.float32 and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # what compiled models call
    return torch.matmul(x, weight.t())


def _buffer(weight: Tensor) -> Tensor | None:
    """Where a weight's gradient goes, for the forward pass to keep: after hooks of saved tensors its name is gone."""
    return getattr(weight, "main_grad", None)


def add_gradient(buffer: Tensor | None, grad: Tensor, x: Tensor) -> Tensor | None:
    """grad [..., n] and x [..., k] -> the gradient of a weight [n, k]; None: it is in its ``main_grad``, ``buffer``."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if buffer is None:
        return grad.t() @ x
    if buffer.dtype == x.dtype:
        buffer.addmm_(grad.t(), x)
    else:
        buffer.add_(grad.t() @ x)
    return None


class Linear(Upstream):
    """megatron-core's product with a weight; with tensor parallelism, where it overlaps communication, its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """``rest``: fused accumulation, all-reduce, sequence parallelism, and what is put off."""
        ctx.upstream = any(rest[:4])
        if ctx.upstream:
            return Upstream.forward(ctx, x, weight, bias, *rest)
        ctx.save_for_backward(x, weight)
        ctx.steady = steady(weight)
        ctx.buffer = _buffer(weight)
        out = product(x, weight, ctx.steady)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        if ctx.upstream:
            return Upstream.backward(ctx, *grads)
        (x, weight), grad, (of_x, of_weight, of_bias, *rest) = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        return (
            product(grad, weight.t(), ctx.steady) if of_x else None,
            add_gradient(ctx.buffer, grad, x) if of_weight else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
            *(None for _ in rest),
        )


class _Lookup(torch.autograd.Function):
    """Rows of a table [v, h]; only the rows that were read are touched in the backward pass."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.buffer = _buffer(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        if ctx.buffer is None:
            return None, torch.ops.aten.embedding_dense_backward(grads[0], ids, len(weight), -1, False)
        ctx.buffer.index_add_(0, ids.flatten(), grads[0].flatten(0, -2).to(ctx.buffer.dtype))
        return None, None


def lookup(self: Any, ids: Tensor) -> Tensor:
    """Ids [b, s] -> [b, s, h]; a table that is cut over processes is left to upstream."""
    if self.tp_group.size() > 1 or self.reduce_scatter_embeddings:
        return upstream_lookup(self, ids)
    return _Lookup.apply(ids, self.weight)
