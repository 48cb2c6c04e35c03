"""Logits of packed rows over several processes against conversations alone in one; started under torchrun.

    torchrun --nproc-per-node 2 tests/packed_worker.py PREFIX '[["llama", "CP2", {"cp": 2}], ...]' results.json

The models are the Hugging Face folders beside PREFIX, by name.
results.json, written by rank 0: {"llama CP2": [difference of logits, of gradients]}, the largest of each, gradients in
parts of the largest gradient; only of layouts in which each process has all weights, else 0.
"""

import json
import sys
from pathlib import Path
from typing import Any

import packed_models
import torch
import torch.distributed as dist

from megapatch.models import device, parallel
from megapatch.models.packed_rows import Row

MULTIPLE = 4  # 2 x CP; TP with sequence parallelism divides it


def gradients(made: torch.nn.Module, rows: list[Row], options: parallel.Parallel, *, thd: bool) -> list[torch.Tensor]:
    """Of the loss over this process's share of the rows, by parameter."""
    made.zero_grad()
    with torch.enable_grad():
        for row in rows:
            places = packed_models.share(row, options)
            losses = packed_models.forward(made, row, thd=thd, losses=True, places=places)
            (losses * packed_models.tensors(row, places)["loss_mask"][0]).sum().backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in made.parameters()]


def alone(name: str, prefix: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The logits of each conversation, and the gradients of all, computed by each process for itself."""
    options, rows = parallel.Parallel(), packed_models.singles(prefix)
    parallel.start(options, device.start())
    try:
        made = packed_models.loaded(prefix.parent / name, options)
        logits = [packed_models.forward(made, row, thd=False) for row in rows]
        return logits, [grad.clone() for grad in gradients(made, rows, options, thd=False)]
    finally:
        parallel_state().destroy_model_parallel()


def parallel_state() -> Any:
    """megatron-core's, imported after the device is there."""
    from megatron.core import parallel_state

    return parallel_state


def largest_differences(name: str, words: dict[str, Any], prefix: Path) -> list[float]:
    """Of logits and gradients of this process's share of the packed rows, over all processes."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    (expected, expected_grads), options = alone(name, prefix), parallel.Parallel(**words)
    parallel.start(options, device.start())
    try:
        made, worst = packed_models.loaded(prefix.parent / name, options), torch.zeros(1)
        rows, apart_grads = packed_models.rows(prefix, MULTIPLE), 0.0
        for row in rows:
            places = packed_models.share(row, options)
            here = packed_models.forward(made, row, thd=True, places=places)
            here = gather_from_tensor_model_parallel_region(here)[:, : expected[0].shape[1]]
            whole = torch.full((len(row.tokens), here.shape[1]), torch.nan)
            whole[places] = here
            for number, found in packed_models.cut(row, whole).items():
                apart = (found - expected[number])[~found[:, 0].isnan()]  # of a short one, this rank may hold nothing
                worst = torch.maximum(worst, apart.abs().max()) if apart.numel() else worst
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if options.tp == 1:
            largest = max(grad.abs().max() for grad in expected_grads)
            for found, grad in zip(gradients(made, rows, options, thd=True), expected_grads, strict=True):
                dist.all_reduce(found)
                apart_grads = max(apart_grads, float((found - grad).abs().max() / largest))
        return [float(worst), apart_grads]
    finally:
        parallel_state().destroy_model_parallel()


@torch.no_grad()
def main(prefix: Path, cases: str, results: Path) -> None:
    """Measure every case; an error on one process ends all."""
    found = {f"{name} {layout}": largest_differences(name, words, prefix) for name, layout, words in json.loads(cases)}
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
