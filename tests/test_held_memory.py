"""What a CPU that stands for a device holds: counted by the C library, host memory left out, at its highest."""

import pytest
import torch

from megapatch.trainer.offload import held_memory
from megapatch.trainer.offload.held_memory import HeldPeak, given_out

BLOCK = 64 << 20


@pytest.fixture(autouse=True)
def counted() -> None:
    if not given_out():
        pytest.skip("this C library does not tell what it gave out")


def test_what_is_allocated_is_given_out_until_it_is_freed() -> None:
    before = given_out()
    memory = torch.empty(BLOCK, dtype=torch.uint8)
    assert BLOCK <= given_out() - before < BLOCK + (8 << 20)
    del memory
    assert given_out() - before < 8 << 20


def test_the_peak_is_seen_in_forward_and_backward_without_the_host() -> None:
    host = [0]
    peak, seen = HeldPeak(lambda: host[0]), []
    peak.note = lambda *_: seen.append(1)  # type: ignore[method-assign]
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    peak.watch(layers)
    x = torch.ones(2, 4)
    for layer in layers:
        x = layer(x)
    assert len(seen) == 3
    x.sum().backward()
    assert len(seen) == 6
    peak = HeldPeak(lambda: host[0])
    memory = torch.empty(BLOCK, dtype=torch.uint8)
    peak.note()
    most = peak.measures()["device_memory_bytes"]
    del memory
    peak.note()
    assert peak.measures()["device_memory_bytes"] == most >= BLOCK
    host[0] = given_out() + BLOCK
    without = HeldPeak(lambda: host[0])
    without.note()
    assert without.measures() == {}


def test_nothing_is_told_where_it_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_memory, "_ask", lambda: None)
    peak = HeldPeak(lambda: 0)
    peak.note()
    assert peak.measures() == {}
