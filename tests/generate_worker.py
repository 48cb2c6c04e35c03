"""Generates at several layouts, one after the other in the same processes; started by tests under torchrun.

    torchrun --nproc-per-node 2 tests/generate_worker.py cases.json results.json

cases.json: {"prompts": [[token ids]], "cases": {name: {"folder": Hugging Face folder, "layout": {option: value}}}};
results.json: {name: {"token_ids": of each completion, "logprobs": likewise}}, written by rank 0.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megapatch.models import device, family, parallel


def requests(prompts: list[list[int]]) -> list:
    """Half of them greedy, half sampled."""
    from megapatch.models.request import Request, Sampling

    kinds = (
        Sampling(max_new_tokens=12, prompt_logprobs=True, top_logprobs=2),
        Sampling(max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95),
    )
    return [Request(prompt, kinds[i % 2], key=str(i)) for i, prompt in enumerate(prompts)]


def run_case(folder: Path, layout: dict, prompts: list[list[int]]) -> dict:
    """Completions of the Hugging Face folder's model at a layout, the same on every process."""
    from megatron.core import parallel_state

    from megapatch.models.build import ModelOptions, build
    from megapatch.models.generation.engine import Engine
    from megapatch.models.load import load_hf

    found = device.start()
    options = parallel.Parallel(**layout)
    parallel.start(options, found)
    try:
        device.seed_everything(dist.get_rank(), 0)  # different weights before loading
        hf = json.loads((folder / "config.json").read_text())
        chunks = build(hf, ModelOptions(options, found))
        load_hf(chunks, folder, hf)
        size = family.vocab_size(hf)
        engine = Engine(chunks, vocab_size=size, max_length=64, batch_size=3, prefill_tokens=24)
        done = engine.generate(requests(prompts))
        return {"token_ids": [c.token_ids for c in done], "logprobs": [told(c) for c in done]}
    finally:
        parallel_state.destroy_model_parallel()


def told(completion: Any) -> list[float]:
    """Every log-probability of a completion: its tokens', its prompt's, the best ones'."""
    best = [x for top in (*completion.top_logprobs, *completion.prompt_top_logprobs) for x in top.values()]
    return [*completion.logprobs, *completion.prompt_logprobs, *best]


def main(cases: Path, results: Path) -> None:
    wanted = json.loads(cases.read_text())
    found = {
        name: run_case(Path(case["folder"]), case["layout"], wanted["prompts"])
        for name, case in wanted["cases"].items()
    }
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(one == found for one in everywhere), "processes disagree"
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
