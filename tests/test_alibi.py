"""ALiBi as further dimensions of queries and keys, against the bias written out."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megapatch.models import device

device.start()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from megapatch.models.layers.alibi import AlibiAttention, FalconAlibiAttention, slopes  # noqa: E402

S, B, D = 150, 2, 8
ROUNDING = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 2e-2}  # slopes are in fp32; bf16 has 8 bits


def module(heads: int, dtype: torch.dtype, kind: type = AlibiAttention, rank: int = 0, size: int = 1) -> Any:
    fields: dict[str, Any] = {"context_parallel_size": 1, "tensor_model_parallel_size": size, "kv_channels": D}
    fields |= {"num_attention_heads": heads, "num_query_groups": heads, "attention_dropout": 0.0, "params_dtype": dtype}
    fields |= {"window_size": None, "window_attn_skip_freq": None}
    groups = SimpleNamespace(tp=SimpleNamespace(rank=lambda: rank), cp=None)
    return kind(SimpleNamespace(**fields), 1, AttnMaskType.causal, "self", pg_collection=groups)


def inputs(heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(S, B, heads, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def written_out(q: Tensor, k: Tensor, v: Tensor, heads: list[float], scale: float = 1 / math.sqrt(D)) -> Tensor:
    """softmax(q k^T * scale - slope * distance) v, one head at a time, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    places = torch.arange(len(q), dtype=torch.float64)
    out = torch.empty_like(q)
    for b, (n, slope) in itertools.product(range(q.shape[1]), enumerate(heads)):
        scores = q[:, b, n] @ k[:, b, n].T * scale - slope * (places[:, None] - places)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        out[:, b, n] = scores.softmax(-1) @ v[:, b, n]
    return out.flatten(2)


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 12, 32, 40, 71, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(slopes(heads)), theirs, rtol=1e-6, atol=0)
    assert slopes(heads)[0] < 1 and len(set(slopes(heads))) == heads


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("heads", [4, 5])
def test_the_bias_is_the_slope_times_the_distance(heads: int, dtype: torch.dtype) -> None:
    given = inputs(heads, dtype)
    found = module(heads, dtype)(*given).double()
    torch.testing.assert_close(found, written_out(*given, slopes(heads)), rtol=0, atol=ROUNDING[dtype])


def test_each_process_has_the_slopes_of_its_heads() -> None:
    given = inputs(6, torch.float32)
    halves = [module(6, torch.float32, rank=r, size=2)(*(x[:, :, 3 * r : 3 * r + 3] for x in given)) for r in (0, 1)]
    assert torch.equal(torch.cat(halves, -1), module(6, torch.float32)(*given))


def test_packed_sequences_count_from_their_own_start() -> None:
    q, k, v = (x[:, :1] for x in inputs(4, torch.float32))
    bounds = torch.tensor([0, 20, 21, S])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    for kind in (AlibiAttention, FalconAlibiAttention):
        made = module(4, torch.float32, kind)
        alone = [made(q[a:b], k[a:b], v[a:b])[:, 0] for a, b in itertools.pairwise(bounds.tolist())]
        assert torch.equal(made(q[:, 0], k[:, 0], v[:, 0], packed_seq_params=packed), torch.cat(alone))


def test_gradients_are_those_of_the_bias_written_out() -> None:
    ours, expected = ([x.requires_grad_() for x in inputs(5, torch.float64)] for _ in range(2))
    module(5, torch.float64)(*ours).square().sum().backward()
    written_out(*expected, slopes(5)).square().sum().backward()
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)  # slopes are in fp32


def test_falcon_rounds_slopes_places_and_biases_to_bf16() -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    places = torch.arange(600)
    theirs = build_alibi_tensor(torch.ones(1, 600, dtype=torch.int64), 12, torch.float32)[:, 0]
    assert torch.equal(module(12, torch.float32, FalconAlibiAttention).bias(places).T, theirs)


@pytest.mark.gpu
def test_a_gpu_adds_the_same_bias() -> None:
    given = inputs(5, torch.bfloat16)
    found = module(5, torch.bfloat16)(*(x.to("cuda") for x in given)).double().cpu()
    torch.testing.assert_close(found, written_out(*given, slopes(5)), rtol=0, atol=ROUNDING[torch.bfloat16])
