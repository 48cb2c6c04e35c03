"""Core attention against attention written out, and its kernels against each other."""

import itertools
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megapatch.models import device

device.start()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from megapatch.models.layers import attention  # noqa: E402

S, B, N, G, D = 12, 2, 4, 2, 8


def module(dtype: torch.dtype = torch.float64, **changes: Any) -> attention.SdpaAttention:
    fields = {"context_parallel_size": 1, "kv_channels": D, "attention_dropout": 0.0, "params_dtype": dtype}
    fields |= {"window_size": None, "window_attn_skip_freq": None} | changes
    groups = SimpleNamespace(tp=None, cp=None)
    return attention.SdpaAttention(SimpleNamespace(**fields), 1, AttnMaskType.causal, "self", pg_collection=groups)


def inputs(length: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, B, heads, D) for heads in (N, G, G)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one head at a time."""
    out = torch.empty_like(q)
    for b, n in itertools.product(range(q.shape[1]), range(N)):
        g = n // (N // G)
        scores = q[:, b, n] @ k[:, b, g].T / math.sqrt(D)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        if window is not None:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril(-window), -math.inf)
        out[:, b, n] = scores.softmax(-1) @ v[:, b, g]
    return out.flatten(2)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_what_the_formula_says(causal: bool) -> None:
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    found = module()(*inputs(), attn_mask_type=kind)
    torch.testing.assert_close(found, written_out(*inputs(), causal=causal), rtol=0, atol=1e-12)


def test_packed_sequences_do_not_see_each_other() -> None:
    q, k, v = (x[:, :1] for x in inputs())
    bounds = [0, 5, 6, S]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds), cu_seqlens_kv=torch.tensor(bounds))
    found = module()(q[:, 0], k[:, 0], v[:, 0], packed_seq_params=packed)
    alone = [written_out(q[a:b], k[a:b], v[a:b])[:, 0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 5, 300, 301, 400])
def test_a_window_hides_what_lies_further_back(window: int) -> None:
    made = module(window_size=(window - 1, 0))
    found = made(*inputs(301))  # longer than the blocks that are attended at once
    torch.testing.assert_close(found, written_out(*inputs(301), window=window), rtol=0, atol=1e-12)
    flash = module(window_size=(window - 1, 0))
    flash.flash = as_flash_attn
    torch.testing.assert_close(flash(*inputs(301)), found, rtol=0, atol=1e-12)


def test_layers_without_a_window_see_everything() -> None:
    made = module(window_size=(2, 0), window_attn_skip_freq=[0, 1, 1, 1])
    torch.testing.assert_close(made(*inputs()), written_out(*inputs()), rtol=0, atol=1e-12)


def test_packed_sequences_have_windows() -> None:
    q, k, v = (x[:, :1] for x in inputs())
    bounds = torch.tensor([0, 5, S])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    found = module(window_size=(1, 0))(q[:, 0], k[:, 0], v[:, 0], packed_seq_params=packed)
    alone = [written_out(q[a:b], k[a:b], v[a:b], window=2)[:, 0] for a, b in itertools.pairwise(bounds.tolist())]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)


def test_a_given_mask_hides_what_it_marks() -> None:
    q, k, v = inputs()
    hidden = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    found = module()(q, k, v, hidden, AttnMaskType.arbitrary)
    torch.testing.assert_close(found, written_out(q, k, v), rtol=0, atol=1e-12)


def test_dropout_drops_only_in_training() -> None:
    from megatron.core.tensor_parallel import random

    made = module(attention_dropout=0.5)
    with mock.patch.object(attention, "get_cuda_rng_tracker") as tracker:
        made.eval()
        torch.testing.assert_close(made(*inputs()), written_out(*inputs()), rtol=0, atol=1e-12)
        assert not tracker.called
        tracker.return_value = random.CudaRNGStatesTracker()
        tracker.return_value.add("model-parallel-rng", 7)
        made.train()
        assert not torch.allclose(made(*inputs()), written_out(*inputs()))


def as_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """flash-attn's interface [b, s, n, d], by other means; a window is (keys before, keys after), -1: all."""
    assert (dropout_p, softmax_scale) == (0.0, 1 / math.sqrt(D))
    window = None if window_size == (-1, -1) else window_size[0] + 1
    out = written_out(*(x.transpose(0, 1) for x in (q, k, v)), causal=causal, window=window)
    return out.unflatten(2, (N, D)).transpose(0, 1)


def test_flash_attn_is_called_as_its_interface_says_and_only_in_half_precision() -> None:
    with mock.patch.object(attention, "flash_function", lambda: as_flash_attn):
        half, full = module(torch.bfloat16), module(torch.float32)
    assert full.flash is None
    found = half(*inputs(dtype=torch.bfloat16))
    torch.testing.assert_close(found.double(), written_out(*inputs()), rtol=0, atol=3e-2)  # bf16 has 8 bits


def as_flash_attn_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """flash-attn's interface for packed sequences [s, n, d], by other means."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == max(cu_seqlens_q.diff())
    words: Any = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    parts = itertools.pairwise(cu_seqlens_q.tolist())
    return torch.cat([as_flash_attn(q[None, a:b], k[None, a:b], v[None, a:b], **words)[0] for a, b in parts])


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_go_through_one_flash_attn_kernel_where_it_is(window: int | None) -> None:
    q, k, v = (x[:, 0] for x in inputs())
    bounds = torch.tensor([0, 5, 6, S], dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=6, max_seqlen_kv=6)
    made = module(window_size=window and (window - 1, 0))
    alone = made(q, k, v, packed_seq_params=packed)
    made.flash = as_flash_attn
    with mock.patch.object(attention, "flash_packed_function", lambda: as_flash_attn_packed):
        torch.testing.assert_close(made(q, k, v, packed_seq_params=packed), alone, rtol=0, atol=1e-12)


def test_bounds_with_padding_are_taken_where_both_are_given() -> None:
    q, k, v = (x[:, 0] for x in inputs())
    real, padded = torch.tensor([0, 5, 9]), torch.tensor([0, 6, S])
    both = PackedSeqParams("thd", real, real, padded, padded)
    one = PackedSeqParams("thd", padded, padded)
    assert torch.equal(module()(q, k, v, packed_seq_params=both), module()(q, k, v, packed_seq_params=one))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_a_gpu_computes_packed_sequences_as_the_cpu(window: int | None) -> None:
    made = module(torch.bfloat16, window_size=window and (window - 1, 0))
    q, k, v = (x[:, 0].to("cuda", torch.bfloat16) for x in inputs())
    bounds = torch.tensor([0, 5, 6, S], dtype=torch.int32, device="cuda")
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=6, max_seqlen_kv=6)
    found = made(q, k, v, packed_seq_params=packed).double().cpu()
    parts = itertools.pairwise(bounds.tolist())
    alone = [written_out(*(x[a:b, :1] for x in inputs()), window=window)[:, 0] for a, b in parts]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_a_gpu_computes_what_the_cpu_computes(window: int | None) -> None:
    made = module(torch.bfloat16, window_size=window and (window - 1, 0))
    found = made(*(x.to("cuda", torch.bfloat16) for x in inputs()))
    torch.testing.assert_close(found.double().cpu(), written_out(*inputs(), window=window), rtol=0, atol=3e-2)
