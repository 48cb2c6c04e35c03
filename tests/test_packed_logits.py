"""Packed rows compute what every conversation computes alone: logits, losses, gradients; over several processes too."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import model_folders
import numpy as np
import packed_models
import pytest
import torch
from packed_models import cut, forward
from slow_cases import marked, wanted

from megapatch.models import device, family, packed_rows, parallel

TOLERANCE = 1e-5  # sums of other lengths are taken in another order
LAYOUTS = {"CP2": {"cp": 2}, "TP2": {"tp": 2, "sequence_parallel": True}}
OVER_PROCESSES = ("llama", "mistral", "bloom", "falcon", "qwen3_moe", "deepseek_v2", "gpt2")
CASES = {(name, layout): LAYOUTS[layout] for name in OVER_PROCESSES for layout in LAYOUTS}
QUICK = [case for case in CASES if case[0] in ("mistral", "bloom", "qwen3_moe", "deepseek_v2")]


@pytest.fixture(scope="module")
def groups() -> Iterator[parallel.Parallel]:
    """megatron-core's process groups of one process."""
    options = parallel.Parallel()
    device.start()
    parallel.start(options, device.start())
    yield options
    parallel.stop()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of many lengths."""
    made = tmp_path_factory.mktemp("data") / "chats"
    packed_models.conversations(made)
    return made


def differences(found: dict[int, torch.Tensor], alone: list[torch.Tensor]) -> float:
    """The largest difference of what was found of each conversation from what it is alone."""
    return max((value - alone[number]).abs().max().item() for number, value in found.items())


@pytest.mark.parametrize("name", family.known())
def test_packed_logits_are_those_of_each_conversation_alone(name: str, groups: parallel.Parallel, prefix: Path) -> None:
    made = packed_models.model(name, groups)
    with torch.no_grad():
        alone = [forward(made, row, thd=False) for row in packed_models.singles(prefix)]
        for multiple in (1, 4):
            rows = packed_models.rows(prefix, multiple)
            assert max(len(row.conversations) for row in rows) > 2
            found = [differences(cut(row, forward(made, row, thd=True)), alone) for row in rows]
            assert max(found) <= TOLERANCE
        together = [differences(cut(row, forward(made, row, thd=False)), alone) for row in rows]
        assert max(together) > 100 * TOLERANCE  # conversations that see each other are seen here
    assert max(one.abs().max().item() for one in alone) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v2"])
def test_the_trainers_loss_and_gradients_are_sums_over_conversations(
    name: str, groups: parallel.Parallel, prefix: Path
) -> None:
    from megapatch.trainer.step import _loss

    made = packed_models.model(name, groups)

    def total(rows: list[packed_rows.Row], thd: bool) -> tuple[float, int, list[torch.Tensor]]:
        made.zero_grad()
        parts = [(forward(made, row, thd=thd, losses=True), packed_models.tensors(row)["loss_mask"][0]) for row in rows]
        sums = [_loss(mask, losses) for losses, mask in parts]
        sum(loss for loss, _, _ in sums).backward()
        count = sum(int((mask > 0).sum()) for _, mask in parts)
        return float(sum(loss for loss, _, _ in sums)), count, [p.grad.clone() for p in made.parameters()]

    loss, count, grads = total(packed_models.rows(prefix), True)
    expected, same_count, expected_grads = total(packed_models.singles(prefix), False)
    assert count == same_count > 30
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    for found, alone in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=TOLERANCE * alone.abs().max().item() + 1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_context_parallelism_are_two_pieces_of_each_segment(size: int) -> None:
    bounds = np.array([0, 2, 10, 10, 14], np.int32) * size
    shares = [packed_rows.share_of_rank(bounds, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(14 * size))
    for rank, share in enumerate(shares):
        pieces = []
        for start, stop in pairwise(bounds.tolist()):
            of_segment = np.arange(start, stop).reshape(2 * size, -1)
            pieces += [*of_segment[rank], *of_segment[2 * size - 1 - rank]]
        assert share.tolist() == pieces
    with pytest.raises(AssertionError, match=f"multiples of {2 * size} tokens"):
        packed_rows.share_of_rank(bounds + np.array([0, 1, 1, 1, 1]), 0, size)


@pytest.fixture(scope="module")
def over_processes(prefix: Path, request: pytest.FixtureRequest) -> dict[str, list[float]]:
    """Family and layout -> how far packed logits and gradients are from those of conversations alone in one process."""
    results = prefix.with_suffix(".json")
    asked = wanted(request, CASES, QUICK)
    for name in {name for name, _ in asked}:
        changes = packed_models.CHANGES.get(name, {})
        model_folders.soften(model_folders.make(prefix.parent / name, name, dtype=torch.float32, **changes))
    cases = [[*case, options] for case, options in asked.items()]
    worker = Path(__file__).parent / "packed_worker.py"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    given = [str(prefix), json.dumps(cases), str(results)]
    ran = subprocess.run(
        [*start, *given], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize(("name", "layout"), marked(CASES, QUICK))
def test_processes_that_share_a_packed_row_compute_the_same(
    name: str, layout: str, over_processes: dict[str, list[float]]
) -> None:
    logits, gradients = over_processes[f"{name} {layout}"]
    assert logits <= TOLERANCE and gradients <= TOLERANCE
