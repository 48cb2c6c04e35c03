"""The loss over a vocabulary: as PyTorch's, with nothing kept beside the logits."""

import pytest
import torch
import torch.nn.functional as F
from kept import Kept

from megapatch.models import device, parallel

device.start("cpu")  # before megatron-core is imported

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402

from megapatch.models.layers import cross_entropy as ours  # noqa: E402

TOKENS, VOCABULARY = (24, 2), 1003


@pytest.fixture(autouse=True)
def groups():
    parallel.start(parallel.Parallel(), device.start("cpu"))
    yield
    parallel.stop()


def made(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(*TOKENS, VOCABULARY, generator=chance).mul(4).to(dtype)
    labels = torch.randint(VOCABULARY, TOKENS, generator=chance)
    return logits, labels, torch.rand(*TOKENS, generator=chance)


def fused(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ours.cross_entropy(logits, labels, torch.distributed.group.WORLD)


def upstream(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return vocab_parallel_cross_entropy(logits.float(), labels)


@pytest.mark.parametrize("numbers", [1, 5 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, near: float, numbers: int
) -> None:
    monkeypatch.setattr(ours, "_CPU_NUMBERS", numbers)
    logits, labels, weights = made(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS)
    (expected * weights).sum().backward()
    leaf = logits.clone().requires_grad_()
    losses = fused(leaf * 1, labels)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32
    assert (losses - expected).abs().max() < 1e-5
    assert (leaf.grad - exact.grad).abs().max() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_beside_the_logits(dtype: torch.dtype) -> None:
    kept = {}
    for name, function in {"ours": fused, "upstream": upstream}.items():
        logits, labels, _ = made(dtype)
        leaf = logits.requires_grad_()
        seen = Kept([])
        with seen.watching():
            losses = function(leaf * 1, labels)
            seen.measure()
        losses.sum().backward()
        kept[name] = seen.most
    print(f"{dtype}: kept {kept['ours']:,} bytes, megatron-core {kept['upstream']:,}")
    tokens = labels.numel()
    assert kept["ours"] - tokens * VOCABULARY * dtype.itemsize <= tokens * 32  # labels, two numbers, a flag
    assert kept["ours"] < kept["upstream"] or dtype == torch.float32


def test_logits_that_others_need_are_not_lost_in_silence() -> None:
    logits, labels, _ = made(torch.float32)
    capped = torch.tanh(logits.requires_grad_())  # keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused(capped, labels).sum().backward()
