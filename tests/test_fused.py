"""Elementwise parts with few passes over memory: the results of the code they replace, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megapatch.models import device

device.start()

from megapatch.models.layers import norm  # noqa: E402
from megapatch.models.layers.fused import rotary, swiglu  # noqa: E402
from megapatch.models.patches import rotary as rotary_patch  # noqa: E402

Function = Callable[..., torch.Tensor]
DTYPES = [torch.float32, torch.bfloat16]


def results(function: Function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What a function gives, and the gradients of its inputs for a gradient that is drawn."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, drawn)]


def randoms(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that never change."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    """As megatron-core's MLP has it."""
    gate, up = torch.chunk(x, 2, dim=-1)
    return F.silu(gate) * (up + 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_that_of_megatron_core_bit_for_bit(dtype):
    x = randoms(5, 3, 2 * 24, dtype=dtype)
    for found, expected in zip(results(swiglu, x), results(plain_swiglu, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("strided", [False, True])
def test_rotary_is_that_of_megatron_core_bit_for_bit(part, dtype, strided):
    x = randoms(7, 2, 3, 16, dtype=dtype)
    x = x.transpose(0, 2).contiguous().transpose(0, 2) if strided else x
    freqs = torch.outer(torch.arange(7.0), torch.rand(int(16 * part))).float()[:, None, None]
    found = results(lambda t: rotary(t, freqs, 1.3), x)
    expected = results(lambda t: rotary_patch._upstream(t, freqs, False, False, 1.3), x)
    assert all(map(torch.equal, found, expected))


def test_rotary_leaves_layouts_of_pairs_to_megatron_core():
    x, freqs = randoms(4, 1, 2, 8, dtype=torch.float32), torch.rand(4, 1, 1, 8)
    for interleaved, latent in ((True, False), (False, True)):
        found = rotary_patch.apply_rotary(x, freqs, interleaved, latent)
        assert torch.equal(found, rotary_patch._upstream(x, freqs, interleaved, latent))
        assert not torch.equal(found, rotary(x, freqs))


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("shape", [(6, 2, 48), (6, 2, 3, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_exact_and_its_gradients_are_as_near_to_the_truth_as_those_of_autograd(dtype, shape):
    x, weight = randoms(*shape, dtype=dtype), 1 + randoms(shape[-1], dtype=dtype) / 4
    found = results(lambda x, w: norm._RMSNorm.apply(x, w, 1e-6), x, weight)
    plain = results(plain_norm, x, weight)
    assert torch.equal(found[0], plain[0])
    truth = results(
        lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x.double(), weight.double()
    )
    for ours, theirs, exact in zip(found[1:], plain[1:], truth[1:], strict=True):
        errors = [float((each.double() - exact).abs().max()) for each in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1], errors  # of other roundings: the mean is that of another order of products
