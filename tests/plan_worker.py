"""Runs training cases with every tensor counted; started by tests/test_plan_memory.py, also under torchrun.

    torchrun --nproc-per-node 2 tests/plan_worker.py cases.json results.json

cases.json: {name: mp-pretrain arguments}; results.json, written by rank 0: {name: most bytes alive on each rank}. All
cases share one process group: a second one would find the first one's addresses where processes leave them.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megapatch.models import device

device.start()  # before megatron-core is imported

from megatron.core import parallel_state  # noqa: E402

from megapatch.models import parallel  # noqa: E402
from megapatch.models.planning.meter import Meter  # noqa: E402
from megapatch.trainer import loop, pretrain  # noqa: E402


def measured(arguments: list[str]) -> list[int]:
    """The most bytes of tensors that each rank had at once in a training step."""
    meter, step = Meter(), loop.Trainer._one_step
    every: list[int] = []
    most = 0

    def counted(trainer: Any) -> None:
        nonlocal most
        meter.highest = meter.live
        step(trainer)
        most = max(most, meter.highest)

    def leave() -> None:
        if dist.is_initialized():  # not where the run was refused before it began
            every.extend([0] * dist.get_world_size())
            dist.all_gather_object(every, most)
        parallel_state.destroy_model_parallel()

    with meter, mock.patch.object(parallel, "stop", leave), mock.patch.object(loop.Trainer, "_one_step", counted):
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
