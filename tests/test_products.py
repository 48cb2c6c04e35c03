"""Products with weights on a CPU: megatron-core's results, and gradients that are added to the buffers that wait."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from megapatch.models import device

device.start()

from megapatch.models.layers import products  # noqa: E402

CASES = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that never change."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the order of sums, and in bf16 for the last bit of results."""
    return torch.allclose(found.double(), expected.double(), atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize(("dtype", "bias"), CASES)
@pytest.mark.parametrize("rows", [0, 7])
def test_a_product_and_its_gradients_are_those_of_upstream(rows, dtype, bias):
    results = []
    for function in (products.Upstream, products.Linear):
        x, weight = (drawn(*shape, dtype=dtype).requires_grad_() for shape in ((rows, 2, 24), (40, 24)))
        more = drawn(40, dtype=dtype).requires_grad_() if bias else None
        out = function.apply(x, weight, more, False, False, False, None, 0, None)
        leaves = [leaf for leaf in (x, weight, more) if leaf is not None]
        results.append([out, *torch.autograd.grad(out, leaves, drawn(rows, 2, 40, dtype=dtype))])
    assert all(near(found, expected, dtype) for expected, found in zip(*results, strict=True))


@pytest.mark.parametrize("hooked", [False, True])  # as --offload-activations does: what comes back is no parameter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_the_buffer_of_a_weight_and_nowhere_else(dtype, hooked):
    x, weight, ids = drawn(7, 24, dtype=dtype), drawn(40, 24, dtype=dtype).requires_grad_(), torch.tensor([[3, 5, 3]])
    out = products._Lookup.apply(ids, weight).sum() + F.linear(x, weight).sum()
    expected = 2 * torch.autograd.grad(out, weight)[0].float() + 1
    weight.main_grad = torch.ones(40, 24)
    hooks = saved_tensors_hooks(torch.clone, torch.clone) if hooked else nullcontext()
    for _ in range(2):
        with hooks:
            tied = products._Lookup.apply(ids, weight)
            product = products.Linear.apply(x, weight, None, False, False, False, None, 0, None)
        (tied.sum() + product.sum()).backward()
    assert weight.grad is None
    assert torch.allclose(weight.main_grad, expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = drawn(7, 24, dtype=torch.float32).requires_grad_(), drawn(40, 24, dtype=torch.float32)
    weight.main_grad = torch.zeros(40, 24)
    out = products.Linear.apply(x, weight, None, False, False, False, None, 0, None)
    assert near(out.detach(), (x @ weight.t()).detach(), torch.float32)
    out.sum().backward()
    assert torch.equal(weight.main_grad, torch.zeros(40, 24))
    assert x.grad is not None
    assert near(x.grad, weight.sum(0).expand(7, 24), torch.float32)


def test_onednn_is_not_asked_for_experts_nor_without_training():
    weight = drawn(4, 3, dtype=torch.float32)
    assert not products.steady(weight)  # a prompt has any length
    weight.main_grad = torch.zeros(4, 3)
    assert products.steady(weight)
    weight.rows_vary = True
    assert not products.steady(weight)


def test_a_table_without_a_buffer_gets_the_gradient_of_an_embedding():
    weight, ids = drawn(9, 4, dtype=torch.float32).requires_grad_(), torch.tensor([[0, 8, 8], [1, 0, 8]])
    grad = drawn(2, 3, 4, dtype=torch.float32)
    found, expected = (
        torch.autograd.grad(f(ids, weight), weight, grad)[0] for f in (products._Lookup.apply, F.embedding)
    )
    assert torch.equal(found, expected)
