"""Which engine is faster here: a chunk's copies and Adam, timed at the start of a run with all ranks at it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megapatch.models.device import Device
from megapatch.models.link import Lane
from megapatch.trainer.offload.chunks import FLOAT_BYTES, ROWS
from megapatch.trainer.offload.engines import finish, fused_adamw

ROUNDS = 3  # the fastest counts
MOST = 4 << 20  # elements
SETTINGS = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}


@dataclass(frozen=True)
class Measured:
    """Nanoseconds per parameter, of the slowest rank."""

    d2h_ns: float  # of a gradient
    h2d_ns: float  # of a weight
    cpu_adam_ns: float
    state_ns: float  # its state to the device and, of another parameter, back at once
    device_adam_ns: float

    @property
    def seconds(self) -> dict[str, float]:
        """Nanoseconds per parameter of each engine, whose parts run at once."""
        return {
            "cpu": max(self.d2h_ns, self.cpu_adam_ns, self.h2d_ns),
            "stream": max(self.state_ns, self.device_adam_ns),
        }

    @property
    def best(self) -> str:
        """The faster engine."""
        return min(self.seconds, key=self.seconds.__getitem__)


def measure(device: Device, down: Lane, up: Lane, largest: int, width: int) -> Measured:
    """Times of a chunk of at most ``largest`` elements, with weights of ``width`` bytes (every rank must call)."""
    size = min(largest, MOST)
    host, on_device = device.host_memory(size * 4 * FLOAT_BYTES), torch.empty(size * 16, dtype=torch.uint8)
    on_device = on_device.to(device.torch)
    for memory in (host, on_device):
        memory.view(torch.float32).fill_(1e-3)
    state = size * FLOAT_BYTES * (len(ROWS) if width != FLOAT_BYTES else len(ROWS) - 1)
    gradient = size * FLOAT_BYTES

    def both() -> None:
        copies = [down.copy(host[:state], on_device[:state]), up.copy(on_device[-state:], host[-state:])]
        for copy in copies:
            finish(copy)

    def adam(memory: Tensor) -> Callable[[], None]:
        rows = [[row] for row in memory.view(torch.float32).chunk(4)]
        step = torch.ones((), device=memory.device)

        def run() -> None:
            fused_adamw(SETTINGS, rows, step)
            device.synchronize()

        return run

    runs: list[Callable[[], None]] = [
        lambda: finish(down.copy(host[:gradient], on_device[:gradient])),
        lambda: finish(up.copy(on_device[: size * width], host[: size * width])),
        adam(host),
        both,
        adam(on_device),
    ]
    torch.distributed.barrier()
    times = torch.tensor([_fastest(run) / size * 1e9 for run in runs], device=device.torch)
    torch.distributed.all_reduce(times, op=torch.distributed.ReduceOp.MAX)
    for lane in (down, up):
        lane.copied_bytes = 0
    return Measured(*times.tolist())


def _fastest(run: Callable[[], None]) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def described(measured: Measured) -> dict[str, float]:
    """For the log."""
    return asdict(measured) | {f"{name}_engine_ns": ns for name, ns in measured.seconds.items()}
