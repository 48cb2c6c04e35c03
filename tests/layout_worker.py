"""Logits of many models at several layouts, one after the other in the same processes; started by tests under torchrun.

    torchrun --nproc-per-node 2 tests/layout_worker.py cases.json results.json

cases.json: {name: {"folder": Hugging Face folder, "layout": {option: value}, "ids": [[token ids]], "expected": file of
torch.save with logits [b, s, v]}}; results.json: {name: largest difference, or the error's text}, written by rank 0.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megapatch.models import device, family, parallel


def largest_difference(case: dict) -> float:
    """Of the logits of the case's model from those expected."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_weights

    found, options = device.start(), parallel.Parallel(**case["layout"])
    parallel.start(options, found)
    try:
        device.seed_everything(dist.get_rank(), 0)  # different weights before loading
        hf = json.loads((Path(case["folder"]) / "config.json").read_text())
        chunks = build(hf, ModelOptions(options, found))
        load_weights(chunks, Path(case["folder"]), hf)
        ids = torch.tensor(case["ids"])
        with torch.no_grad():
            here = chunks[0].eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
            logits = gather_from_tensor_model_parallel_region(here)[..., : family.vocab_size(hf)]
        return (logits - torch.load(case["expected"])).abs().max().item()
    finally:
        parallel_state.destroy_model_parallel()


def main(cases: Path, results: Path) -> None:
    found: dict[str, float | str] = {}
    for name, case in json.loads(cases.read_text()).items():
        try:
            found[name] = largest_difference(case)
        except Exception:
            found[name] = traceback.format_exc()
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
