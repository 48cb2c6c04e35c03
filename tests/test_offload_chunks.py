"""Chunks of an offloaded optimizer: where they are cut, what they hold, and that no cut and no engine changes a bit."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from megapatch.models.device import Device
from megapatch.models.link import lanes
from megapatch.trainer.offload import engines
from megapatch.trainer.offload.adam import ChunkedAdam
from megapatch.trainer.offload.chunks import GRAIN, Shard, Span, cut, make, stride
from megapatch.trainer.offload.engines import CpuEngine, Engine, StreamEngine, fused_adamw
from megapatch.trainer.offload.measure import Measured

GROUPS = [
    {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8, "params": []},
    {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-8, "params": []},
]
UPDATES = 4


def spans(*ends: tuple[int, int]) -> list[Span]:
    return [Span(None, 0, start, stop, 0) for start, stop in ends]


@pytest.mark.parametrize(
    ("given", "most", "mark", "found"),
    [
        (spans((0, 1000)), 5000, None, [(0, 1000)]),
        (spans((0, 1000)), 300, None, [(0, 256), (256, 512), (512, 768), (768, 1000)]),
        (spans((0, 100), (100, 900)), 300, None, [(0, 292), (292, 548), (548, 804), (804, 900)]),  # from its own start
        (spans((64, 100), (128, 200)), 50, None, [(64, 128), (128, 192), (192, 200)]),
        (spans((0, 1000)), 5000, 650, [(0, 640), (640, 1000)]),
        (spans((0, 100), (100, 200)), 5000, 100, [(0, 100), (100, 200)]),
        (spans((0, 1000)), 1, None, [(i, min(i + GRAIN, 1000)) for i in range(0, 1000, GRAIN)]),
    ],
)
def test_cuts_lie_between_parameters_or_at_a_grain(
    given: list[Span], most: int, mark: int | None, found: list[tuple[int, int]]
) -> None:
    assert list(cut(given, most, mark)) == found


def shard(chance: random.Random, dtype: torch.dtype, *, together: bool) -> tuple[Shard, list[torch.Tensor]]:
    """Parameters of odd sizes in a buffer with gaps, and their weights."""
    found, at = [], chance.randrange(3) * 64
    for _ in range(9):
        size = chance.randrange(1, 3000)
        found.append((at, at + size))
        at += -(-size // 64) * 64
    torch.manual_seed(chance.randrange(2**31))
    weights, gradient = torch.randn(at).to(dtype), torch.zeros(at)
    parameters = [weights[a:b] if together else weights[a:b].clone() for a, b in found]
    made = [Span(p, i % 2, a, b, 0) for i, (p, (a, b)) in enumerate(zip(parameters, found, strict=True))]
    return Shard(made, gradient, weights if together else None), parameters


def plain(made: Shard, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Masters after AdamW on whole parameters."""
    masters = [span.parameter.detach().float().clone() for span in made.spans]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in masters]
    for number, gradient in enumerate(gradients, 1):
        for span, master, (first, second) in zip(made.spans, masters, moments, strict=True):
            rows = [[master], [gradient[span.start : span.stop].clone()], [first], [second]]
            fused_adamw(GROUPS[span.group], rows, torch.tensor(float(number)))
    return masters


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cpu", "stream"])
def test_no_engine_and_no_move_changes_a_bit(kind: str, dtype: torch.dtype, threads: int) -> None:
    chance, before = random.Random(0), torch.get_num_threads()
    device = Device("cpu", False, False, "")
    torch.set_num_threads(threads)
    try:
        for together in (True, False):
            made, parameters = shard(chance, dtype, together=together)
            gradients = [torch.randn(made.gradient.numel()) for _ in range(UPDATES)]
            expected = plain(made, gradients)
            chunks, count = make([made], 777, 0.65)
            down, up = lanes(torch.device("cpu"))
            engine: Engine = StreamEngine(down, up, 777, torch.device("cpu"))
            if kind == "cpu":
                engine = CpuEngine(down, up, 777, dtype.itemsize, device.host_memory)
            adam = ChunkedAdam(GROUPS, chunks, engine, device)
            for gradient, there in zip(gradients, (count, 1, len(chunks), 0), strict=True):
                adam.place(there)
                made.gradient.copy_(gradient)
                adam.step()
            for parameter, master in zip(parameters, expected, strict=True):
                assert torch.equal(adam.tensors(parameter)["param"], master)
                assert torch.equal(parameter, master.to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [GRAIN, 7 * GRAIN])
def test_adam_rounds_the_same_in_pieces_that_begin_at_a_grain(size: int) -> None:
    def updated(size: int) -> torch.Tensor:  # pieces of 1001 elements gave other bits on an AVX-512 machine
        torch.manual_seed(0)
        rows = [torch.randn(20_001), torch.randn(20_001), torch.zeros(20_001), torch.zeros(20_001)]
        for number in range(1, UPDATES + 1):
            for start in range(0, 20_001, size):
                pieces = [[row[start : start + size]] for row in rows]
                fused_adamw(GROUPS[0], pieces, torch.tensor(float(number)))
        return torch.stack(rows)

    assert torch.equal(updated(size), updated(20_001))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.65, 1.0])
def test_the_first_chunks_hold_the_fraction_to_a_grain(fraction: float) -> None:
    shards = [shard(random.Random(seed), torch.bfloat16, together=True)[0] for seed in range(4)]
    chunks, count = make(shards, 777, fraction)
    every = sum(s.numel for s in shards)
    assert sum(chunk.parameters for chunk in chunks) == every
    away = sum(chunk.parameters for chunk in chunks[:count])
    assert fraction * every - GRAIN <= away <= round(fraction * every)


def test_host_memory_is_one_slab_of_exactly_what_chunks_need() -> None:
    made, _ = shard(random.Random(1), torch.bfloat16, together=True)
    chunks, count = make([made], 777, 0.65)
    device = Device("cpu", False, False, "")
    down, up = lanes(torch.device("cpu"))
    adam = ChunkedAdam(GROUPS, chunks, CpuEngine(down, up, 777, 2, device.host_memory), device)
    adam.place(count)
    (storage,) = {chunk.memory.untyped_storage().data_ptr() for chunk in adam.offloaded}
    assert storage == chunks[0].memory.data_ptr()
    nbytes = sum(3 * 4 * chunk.numel for chunk in adam.offloaded)
    assert chunks[0].memory.untyped_storage().nbytes() == nbytes and nbytes < 1.1 * 12 * 0.65 * made.numel
    assert stride(2**22) * 4 % 2**20 == 65 * 2**10  # large rows do not begin at the same place of a cache


@dataclass
class Told:
    """A copy that is there at once, and a lane that tells of it and of whoever waits."""

    name: str
    log: list[str]
    count: int = 0
    copied_bytes: int = 0
    waited: list[str] = field(default_factory=list)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object = None) -> "Told":
        target.copy_(source)
        self.log.append(f"{self.name}{self.count}")
        self.count += 1
        return Told(self.log[-1], self.log)

    def done(self) -> bool:
        self.log.append(f"wait {self.name}")
        return True

    def wait(self, copy: "Told") -> None:
        copy.done()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (
            "cpu",  # three gradients come, one more with each chunk that is done; its weights leave while the next runs
            "out0 out1 out2 | wait out0 adam out3 back0 | wait out1 adam out4 back1 | wait out2 adam wait back0 back2 "
            "| wait out3 adam wait back1 back3 | wait out4 adam wait back2 back4 | wait back0 wait back1 wait back2 "
            "wait back3 wait back4",
        ),
        (
            "stream",  # state of two chunks comes while one is updated; what it leaves behind goes beside that
            "back0 back1 | back2 wait back0 adam out0 | back3 wait back1 adam out1 | back4 wait back2 adam out2 | "
            "wait back3 adam out3 | wait back4 adam out4 | wait out3 wait out4 wait out2",
        ),
    ],
)
def test_copies_run_ahead_of_adam_and_behind_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, order: str, dtype: torch.dtype
) -> None:
    """A lane's second wait for the same copy is left out."""
    log: list[str] = []
    weights = torch.zeros(5 * 640, dtype=dtype)
    made = Shard([Span(weights, 0, 0, 5 * 640, 0)], torch.zeros(5 * 640), weights)
    monkeypatch.setattr(engines, "fused_adamw", lambda *_: log.append("adam"))
    device, lane = Device("cpu", False, False, ""), (Told("out", log), Told("back", log))
    chunks, count = make([made], 640, 1.0)
    engine: Engine = StreamEngine(*lane, 640, torch.device("cpu"))
    if kind == "cpu":
        engine = CpuEngine(*lane, 640, dtype.itemsize, device.host_memory)
    adam = ChunkedAdam(GROUPS, chunks, engine, device)
    adam.place(count)
    adam.step()
    once = [word for at, word in enumerate(log) if at == 0 or word != log[at - 1]]
    assert " ".join(once) == order.replace(" | ", " ")


@pytest.mark.parametrize(
    ("out", "back", "cpu", "state", "device", "best"),
    [
        (0.1, 0.1, 0.14, 0.22, 0.01, "cpu"),  # one GPU, fast host memory
        (0.1, 0.1, 0.47, 0.22, 0.01, "stream"),  # eight ranks share it
        (0.3, 0.1, 0.14, 0.22, 0.01, "stream"),  # parts run at once: the slowest counts
        (0.1, 0.3, 0.14, 0.22, 0.01, "stream"),
        (0.1, 0.1, 0.14, 0.12, 0.15, "cpu"),
    ],
)
def test_the_engine_is_the_one_that_is_faster_here(
    out: float, back: float, cpu: float, state: float, device: float, best: str
) -> None:
    assert Measured(out, back, cpu, state, device).best == best
