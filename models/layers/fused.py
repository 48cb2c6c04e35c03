"""Elementwise parts of a layer with few passes over memory: what a CPU needs where a GPU has fused kernels.

Results are those of megatron-core's own code, bit for bit, forward and backward.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class _SwiGlu(torch.autograd.Function):
    """silu(a) * b of x = [a, b]; saves x alone, and writes both gradients to where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=to_gate)
        return out


def swiglu(x: Tensor) -> Tensor:
    """[..., 2f] -> [..., f]: silu of the first half times the second."""
    return _SwiGlu.apply(x)


def fuse_activations(model: torch.nn.Module) -> None:
    """Let the feed-forward parts of a model use ``swiglu`` where that is what they compute without a kernel."""
    for module in model.modules():
        if isinstance(module, MLP) and _is_swiglu(module.config):
            module.config = copy.copy(module.config)
            module.config.use_te_activation_func = True  # upstream's name for: a module does all of the activation
            module.activation_func = swiglu


def _is_swiglu(config: Any) -> bool:
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
        and not (config.bias_activation_fusion or config.use_te_activation_func)
    )


class _Rotary(torch.autograd.Function):
    """x * cos + rotated(x) * sin; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """[s, b, n, d] -> [s, b, n, d], the first r of d turned by ``cos`` and ``sin`` [s, 1, 1, r], or back (-1)."""
    size, half = cos.shape[-1], cos.shape[-1] // 2
    if size == x.shape[-1]:
        out = x * cos
    else:
        out = x.clone(memory_format=torch.contiguous_format)
        out[..., :size].mul_(cos)
    low, high = sin.split(half, dim=-1)
    if sign < 0:  # the transpose: what the first half got from the second by ``low``
        out[..., :half].add_(x[..., half:size] * high)
        out[..., half:size].sub_(x[..., :half] * low)
    else:
        out[..., :half].sub_(x[..., half:size] * low)
        out[..., half:size].add_(x[..., :half] * high)
    return out


def rotary(x: Tensor, freqs: Tensor, mscale: float = 1.0) -> Tensor:
    """[s, b, n, d] turned by the angles ``freqs`` [s, 1, 1, r], halves against each other; d beyond r is left."""
    cos, sin = ((function(freqs) * mscale).to(x.dtype) for function in (torch.cos, torch.sin))
    return _Rotary.apply(x, cos, sin)
