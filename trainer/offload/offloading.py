"""What a session with --offload-optimizer holds: its chunks and what they cost; and how it begins."""

import socket
from dataclasses import dataclass
from typing import Any

import torch

from megapatch.models.device import Device
from megapatch.models.link import Lane, lanes
from megapatch.models.planning.stages import default_chunk
from megapatch.models.space import DoesNotFit, free_bytes, short
from megapatch.trainer.offload import chunks as chunking
from megapatch.trainer.offload.adam import ChunkedAdam, device_bytes, host_bytes
from megapatch.trainer.offload.chunks import FLOAT_BYTES, ROWS, stride
from megapatch.trainer.offload.engines import CpuEngine, Engine, StreamEngine
from megapatch.trainer.offload.measure import MOST, Measured, described, measure
from megapatch.trainer.offload.options import AUTO
from megapatch.trainer.offload.parts import take_over
from megapatch.trainer.offload.places import shards
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import together

SPENT = ("adam_s", "cast_s", "d2h_wait_s", "h2d_wait_s", "exposed_s")


@dataclass
class Offloading:
    """Chunks of each of megatron-core's optimizers: of dense parameters, of experts."""

    options: TrainOptions
    device: Device
    adams: list[ChunkedAdam]
    down: Lane
    up: Lane
    engine: str
    chunk: int  # elements
    measured: Measured | None  # with --offload-engine auto
    neighbours: int  # processes on this node, with this one
    counted: tuple[int, int] = (0, 0)  # bytes that the lanes had copied when it was told last

    @property
    def fraction(self) -> float:
        """The share of parameters whose state lies on the host."""
        away = sum(chunk.parameters for adam in self.adams for chunk in adam.offloaded)
        return away / max(1, sum(chunk.parameters for adam in self.adams for chunk in adam.chunks))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken: places of chunks, wherever they are now, and what is staged."""
        staged = max((adam.engine.host_bytes for adam in self.adams), default=0)  # one engine for all
        return staged + sum(chunk.slot.nbytes for adam in self.adams for chunk in adam.chunks if chunk.slot is not None)

    def host_room(self) -> int:
        """Bytes of host memory that this process may still take: its part of what is free now."""
        return free_bytes() // self.neighbours

    def described(self) -> dict[str, Any]:
        """For the log, once."""
        found = {
            "engine": self.engine,
            "fraction": self.fraction,
            "chunk": self.chunk,
        }
        found |= {"host_bytes": host_bytes(self.adams), "device_bytes": device_bytes(self.adams)}
        return found | (described(self.measured) if self.measured else {})

    def measures(self) -> dict[str, float]:
        """For the log, of this rank's last step."""
        now = (self.down.copied_bytes, self.up.copied_bytes)
        before, self.counted = self.counted, now
        d2h, h2d = (after - then for after, then in zip(now, before, strict=True))
        spent = [adam.spent for adam in self.adams]
        for adam in self.adams:
            adam.spent = {}  # the next step may be skipped
        return {
            "offload_fraction": self.fraction,
            "offload_host_bytes": host_bytes(self.adams),
            "offload_device_bytes": device_bytes(self.adams),
            "offload_d2h_bytes": d2h,
            "offload_h2d_bytes": h2d,
            **{f"offload_{name}": sum(each.get(name, 0.0) for each in spent) for name in SPENT},
            "optimizer_s": sum(each.get("optimizer_s", 0.0) for each in spent),
        }


def start(options: TrainOptions, device: Device, optimizer: Any, wrapped: list[Any]) -> Offloading:
    """Put chunks in the place of masters and moments in megatron-core's chain (every rank must call)."""
    held = [i for i, part in enumerate(optimizer.chained_optimizers) if part.optimizer is not None]
    found = [shards(optimizer.chained_optimizers[i], wrapped) for i in held]
    width = 2 if options.precision == "bf16" else FLOAT_BYTES
    rate = options.offload_link_gb_per_s
    down, up = lanes(device.torch, rate and rate * 1e9)
    measured = (
        measure(device, down, up, options.offload_chunk or MOST, width) if options.offload_engine == AUTO else None
    )
    name = measured.best if measured else options.offload_engine
    chunk = options.offload_chunk or default_chunk(name, sum(shard.length for part in found for shard in part))
    largest = min(chunk, max((shard.length for part in found for shard in part), default=1))
    if not options.least_offloaded:
        largest = 0  # nothing will be on its way
    pieces = [stop - start for part in found for shard in part for start, stop in chunking.cut(shard.spans, chunk)]
    fraction, neighbours = _fitting_host(options, sum(map(stride, pieces)), largest, width, name)
    engine = _engine(name, device, (down, up), largest, width)
    adams = []
    for i, part_shards in zip(held, found, strict=True):
        part = optimizer.chained_optimizers[i]
        chunks, count = chunking.make(part_shards, chunk, fraction)
        adams.append(ChunkedAdam(part.optimizer.param_groups, chunks, engine, device))
        adams[-1].place(count)
        optimizer.chained_optimizers[i] = take_over(part, adams[-1])
    return Offloading(options, device, adams, down, up, name, chunk, measured, neighbours)


def _engine(name: str, device: Device, link: tuple[Lane, Lane], largest: int, width: int) -> Engine:
    if name == "cpu":
        return CpuEngine(*link, largest, width, device.host_memory)
    return StreamEngine(*link, largest, device.torch)


def _fitting_host(options: TrainOptions, length: int, largest: int, width: int, name: str) -> tuple[float, int]:
    """The fraction to begin with: the one asked for, or what fits in host memory; and the processes on this node.

    Every rank must call. DoesNotFit where the processes of a node would need more of its memory than it has.
    """
    rows = len(ROWS) if name == "cpu" or width != FLOAT_BYTES else len(ROWS) - 1
    staged = CpuEngine.staged_bytes(largest, width) if name == "cpu" else 0
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (socket.gethostname(), length * rows * FLOAT_BYTES, staged))
    here = [(state, more) for host, state, more in told if host == socket.gethostname()]
    state, more, free = sum(n for n, _ in here), sum(n for _, n in here), free_bytes()
    fits = min(1.0, max(0.0, (free - more) / max(1, state)))
    if options.offload_fraction is None:
        return fits, len(here)
    with together():
        if options.offload_fraction > fits:
            who = f"{len(here)} processes on this node need" if len(here) > 1 else "this process needs"
            raise DoesNotFit(
                f"--offload-optimizer {options.offload_optimizer}: {who} "
                f"{short(options.offload_fraction * state + more)}B of host memory, {short(free)}B are free (cgroup "
                f"limits counted); at most {int(fits * 100) / 100:g} of the optimizer's state fits"
            )
    return options.offload_fraction, len(here)
