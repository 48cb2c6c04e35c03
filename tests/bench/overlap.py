"""How much of data-parallel communication the trainer hides behind computation; scripts/overlap_check.sh starts it.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/bench/overlap.py --label "1 Gbit/s"

Each process holds the same parameters, wrapped and stepped as mp-pretrain does. Computation is a sleep, as on a device
that leaves the host's cores free: a third of it in the forward pass. Efficiency is the time of computation alone
(the same sleeps without communication and optimizer) over the time of a step. Rank 0 prints a table on stdout.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megapatch.models import device, parallel
from megapatch.models.cli import parser
from megapatch.trainer.options import PretrainOptions

device.start("cpu")  # before megatron-core is imported

from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megapatch.trainer import session  # noqa: E402
from megapatch.trainer.saving import optimizer_state  # noqa: E402

WAYS = {  # name: mp-pretrain's flags
    "all-reduce, serial": "",
    "all-reduce, overlapped": "--overlap-grad-reduce --ddp-bucket-size {bucket}",
    "distributed optimizer, serial": "--use-distributed-optimizer",
    "distributed optimizer, overlapped": (
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size {bucket}"
    ),
}


class Sleep(torch.autograd.Function):
    """A matrix product on a device: the host waits, with its cores free."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds, ctx.shape = seconds, weight.shape
        time.sleep(seconds / 3)
        return x + 0

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        time.sleep(ctx.seconds * 2 / 3)
        return grads[0], torch.full(ctx.shape, 1e-3), None


class Part(torch.nn.Module):
    """One matrix of a model."""

    def __init__(self, parameters: int, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds = torch.nn.Parameter(torch.zeros(parameters)), seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x, self.weight, self.seconds)


class Run:
    """A model of sleeping parts in the trainer's wrapper, with its optimizer."""

    def __init__(self, flags: str, given: argparse.Namespace) -> None:
        words = f"--save s --init-from c --data-path d --train-iters 1 {flags}".split()
        options = parser(PretrainOptions, prog="mp-pretrain").parse_args(words)
        parts = [Part(given.parameters // given.parts, given.compute_s / given.parts) for _ in range(given.parts)]
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.chunk = session._wrap(options, config, torch.nn.Sequential(*parts), first=True)
        settings = session.optimizer_config(options)
        self.optimizer = get_megatron_optimizer(settings, [self.chunk], get_standard_config_overrides(settings))
        optimizer_state.allocate(self.optimizer)

    def step(self) -> None:
        """As a step of training with one micro-batch."""
        self._compute(nullcontext())
        self.chunk.finish_grad_sync()
        assert self.optimizer.step()[0]

    def compute(self) -> None:
        """The same without communication."""
        self._compute(self.chunk.no_sync())

    def _compute(self, context: AbstractContextManager[Any]) -> None:
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with context:
            self.chunk(torch.ones(1, requires_grad=True)).sum().backward()


def timed(work: Callable[[], None]) -> float:
    """Seconds until all processes have done it."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--label", default="", help="what the link is, for the table")
    words.add_argument("--parameters", type=int, default=10 << 20, help="of the model, fp32 (default: 10 Mi)")
    words.add_argument("--parts", type=int, default=40, help="matrices of the model (default: 40)")
    words.add_argument("--compute-s", type=float, default=0.5, help="seconds of computation per step (default: 0.5)")
    words.add_argument("--bucket", type=int, default=1 << 19, help="parameters per bucket (default: 512 Ki)")
    words.add_argument("--steps", type=int, default=8, help="timed of each way, in turns (default: 8)")
    given = words.parse_args()
    torch.set_num_threads(1)
    found = device.start("cpu")
    parallel.start(parallel.Parallel(), found)
    runs = {name: Run(flags.format(bucket=given.bucket), given) for name, flags in WAYS.items()}
    alone = next(iter(runs.values())).compute
    works = {"computation alone": alone} | {name: run.step for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(given.steps + 1):
        for name, work in works.items():
            times[name].append(timed(work))
    if dist.get_rank() == 0:
        seconds = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first one warms up
        for name, value in seconds.items():
            print(f"{given.label:12} {name:36} {value:7.3f} s  {seconds['computation alone'] / value:5.2f}", flush=True)
    parallel.stop()


if __name__ == "__main__":
    main()
