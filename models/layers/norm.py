"""Layer norms that work with sequence parallelism and without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """RMS norm that saves its input and one number per token; F.rms_norm saves three fp32 copies on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        out = wide.pow(2)
        scale = torch.rsqrt(out.mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = torch.mul(wide, scale, out=out).to(x.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n the normed x and g the gradient: scale * (g * w - n * mean(g * w * n)), two temporaries."""
        x, weight, scale = ctx.saved_tensors
        grad, wide_weight = grads[0].float(), weight.float()
        normed = x.float() * scale
        product = grad * normed.to(x.dtype)
        grad_weight = product.reshape(-1, x.shape[-1]).sum(0)
        if x.dtype != torch.float32:
            torch.mul(grad, normed, out=product)  # not of what was rounded
        mean = torch.matmul(product, wide_weight).div_(x.shape[-1]).unsqueeze(-1)
        normed.mul_(mean)
        torch.mul(grad, wide_weight, out=product).sub_(normed).mul_(scale)
        return product.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32, as transformers orders them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]"""
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class BareLayerNorm(torch.nn.LayerNorm):
    """Layer norm without weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, elementwise_affine=False)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
