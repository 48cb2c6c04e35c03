"""Runs training cases with every tensor counted; started by tests/test_plan_memory.py, also under torchrun.

    torchrun --nproc-per-node 2 tests/plan_worker.py cases.json results.json

cases.json: {name: mp-pretrain arguments}; results.json, written by rank 0: {name: [most bytes alive, most bytes in use
of the pool of --offload-activations, numbers in megatron-core's buffers of gradients] of each rank}. Host memory, as
Device.host_memory gives it, is not counted as alive: on a CPU its tensors look like those of the device. A copy over a
link without an emulated rate has ended when it began, or what is alive would depend on how busy the machine is. All
cases share one process group: a second one would find the first one's addresses where processes leave them.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megapatch.models import device

device.start()  # before megatron-core is imported

from megatron.core import parallel_state  # noqa: E402

from megapatch.models import link, parallel  # noqa: E402
from megapatch.models.planning.meter import Meter  # noqa: E402
from megapatch.trainer import loop, pretrain  # noqa: E402


def measured(arguments: list[str]) -> list[list[int]]:
    """Of each rank: the most bytes of tensors at once in a training step, on the device and in its pool; numbers in its
    buffers."""
    meter, step, pools = Meter(), loop.Trainer._one_step, set()
    host_memory, take, copy = device.Device.host_memory, link.Pool.take, link.ThreadLane.copy
    every: list[list[int]] = []
    most = numbers = 0

    def counted(trainer: Any) -> None:
        nonlocal most, numbers
        meter.highest = meter.live
        step(trainer)
        most = max(most, meter.highest)
        chunks = trainer.session.chunks
        numbers = sum(b.grad_data.numel() for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers))

    def outside(self: Any, nbytes: int) -> Tensor:
        with _disable_current_modes():
            memory = host_memory(self, nbytes)
        meter.know([memory])
        return memory

    def copied(lane: Any, *ends: Any) -> Any:
        made = copy(lane, *ends)
        if lane.bytes_per_s is None:
            made.ended.result()
        return made

    def taken(pool: Any, nbytes: int) -> Any:
        buffer = take(pool, nbytes)
        pools.add(pool.peak_bytes)
        return buffer

    def leave() -> None:
        if dist.is_initialized():  # not where the run was refused before it began
            every.extend([[]] * dist.get_world_size())
            dist.all_gather_object(every, [most, max(pools, default=0), numbers])
        parallel_state.destroy_model_parallel()

    with ExitStack() as stack:
        stack.enter_context(meter)
        for owner, name, stand_in in (
            (parallel, "stop", leave),
            (loop.Trainer, "_one_step", counted),
            (device.Device, "host_memory", outside),
            (link.Pool, "take", taken),
            (link.ThreadLane, "copy", copied),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        assert pretrain.main(arguments) == 0
    return every


def main(cases: Path, results: Path) -> None:
    """Run each case; rank 0 writes what was measured."""
    found = {name: measured(arguments) for name, arguments in json.loads(cases.read_text()).items()}
    if os.environ.get("RANK", "0") == "0":
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
