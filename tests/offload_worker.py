"""Trains as tests/train_worker.py does, from the cases of a test of offloading.

A case may also have: "place" {step: fraction of chunks on the host from there on}; "extra" a dtype: a parameter of it
that has a gradient, beside one that has none; "out of memory" steps at which the device has none left, each once, of
one "rank" if given, "late": when gradients were reduced; "host bytes": so much host memory is free.
"digest" of every step is over what a checkpoint would hold, so that it does not depend on where state lies.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import train_worker
import xxhash
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megapatch.trainer import step
from megapatch.trainer.offload import offloading
from megapatch.trainer.saving import checkpoint
from megapatch.trainer.session import Session
from megapatch.trainer.tuning import adapters

REAL_ADD, REAL_RUN, REAL_BATCHES, REAL_UPDATE = adapters.add, train_worker.run_case, step.run_batches, step.update


def digest(run: Session) -> str:
    """Of this rank's weights, masters and moments, as they are saved."""
    found = xxhash.xxh3_128()
    state = checkpoint.state(run, loading=False)
    for name in sorted(state):
        if name.startswith("model") or name == "optimizer":
            for key, tensor in _tensors(state[name], name):
                found.update(key.encode())
                found.update(train_worker._bytes(tensor))
    return found.hexdigest()


def _tensors(state: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(state, ShardedBase):
        return [(name, state.data)] if isinstance(state.data, torch.Tensor) else []
    if isinstance(state, dict):
        return [pair for key in sorted(state, key=str) for pair in _tensors(state[key], f"{name}.{key}")]
    return []


def weights(run: Session) -> str:
    """Of this rank's weights."""
    found = xxhash.xxh3_128()
    for model in run.models:
        for parameter in model.parameters():
            found.update(train_worker._bytes(parameter))
    return found.hexdigest()


def with_extra(dtype: str) -> Any:
    """Give the final norm of models a parameter of its own, and one that is not used, when their weights are loaded."""

    def add(models: list[Any], *args: Any) -> Any:
        norm = next(m for name, m in models[-1].named_modules() if name.endswith("final_layernorm"))
        for name in ("more", "unused"):
            norm.register_parameter(name, torch.nn.Parameter(torch.full((3, 11), 0.01, dtype=getattr(torch, dtype))))
        norm.register_forward_hook(lambda module, _, out: out + (out.float() * module.more.float().sum()).to(out.dtype))
        return REAL_ADD(models, *args)

    return mock.patch.object(adapters, "add", add)


class Device:
    """A device that has no memory left at some steps, each once; and chunks that move."""

    def __init__(self, case: dict) -> None:
        self.rank, self.late = case.get("rank"), case.get("late", False)
        self.short, self.places = list(case.get("out of memory", [])), case.get("place", {})

    def run(self, run: Session, *args: Any, train: bool) -> Any:
        at = run.step + 1
        if train and str(at) in self.places and run.away is not None:
            for adam in run.away.adams:
                adam.place(round(len(adam.chunks) * self.places[str(at)]))
        if not train or self.late or at not in self.short or self.rank not in (None, torch.distributed.get_rank()):
            return REAL_BATCHES(run, *args, train=train)
        self.short.remove(at)
        passes: list[None] = []

        def second(*_: Any) -> None:
            passes.append(None)
            if len(passes) == 2:  # in the forward pass of the second micro-batch
                raise torch.OutOfMemoryError("emulated")

        norm = next(m for name, m in run.models[0].named_modules() if name.endswith("layers.1.pre_mlp_layernorm"))
        handle = norm.register_forward_hook(second)
        try:
            return REAL_BATCHES(run, *args, train=train)
        finally:
            handle.remove()

    def update(self, run: Session) -> float | None:
        if self.late and run.step + 1 in self.short:
            self.short.remove(run.step + 1)
            raise torch.OutOfMemoryError("emulated")
        return REAL_UPDATE(run)


def run_case(case: Any) -> list[dict]:
    case = case if isinstance(case, dict) else {"arguments": case}
    device = Device(case)
    free = {"return_value": case["host bytes"]} if "host bytes" in case else {"side_effect": offloading.free_bytes}
    with (
        mock.patch.object(offloading, "free_bytes", **free),
        mock.patch.object(train_worker, "state_digest", weights if case.get("digests") == "weights" else digest),
        mock.patch.object(step, "run_batches", device.run),
        mock.patch.object(step, "update", device.update),
        with_extra(case["extra"]) if "extra" in case else nullcontext(),
    ):
        return REAL_RUN(case)


if __name__ == "__main__":
    with mock.patch.object(train_worker, "run_case", run_case):
        train_worker.main(Path(sys.argv[1]), Path(sys.argv[2]))
