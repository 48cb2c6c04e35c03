"""Loads and saves checkpoints with megatron-core itself; started by tests as a process of its own.

    python tests/core_worker.py cases.json

cases.json: [{"hf": folder, "core": checkpoint to compare, "cut": checkpoint to write}]. Every tensor is saved in the
chunks of tensor parallel size 2 (columns of some, rows of others), with padded vocabulary and training state beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from model_folders import core_tensors

from megapatch.models import device

BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
BY_ROWS = {"linear_qkv.weight": 2, "linear_qkv.bias": 2, "linear_fc1.weight": 4, "word_embeddings.weight": 2}
BY_ROWS |= {"output_layer.weight": 2}
PADDING = 8


def compare(expected: dict[str, torch.Tensor], folder: str) -> None:
    """The folder holds these tensors as core sees them, and loads without surprise."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    found = dist_checkpointing.load_plain_tensors(folder)
    assert found.keys() - expected.keys() <= {"checkpoint_version", "iteration", "content_metadata"}, found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    metadata = dist_checkpointing.load_content_metadata(folder)
    assert metadata["singleton_local_shards"] is False
    objects = load_sharded_metadata(folder).keys() - expected.keys()
    assert objects and all("._extra_state" in key for key in objects)


def shards(key: str, tensor: torch.Tensor) -> list[Any]:
    """core's ShardedTensors of one tensor: each layer and expert apart, rows or columns cut."""
    from megatron.core.dist_checkpointing import ShardedTensor

    lead = (
        0 if "layers" not in key else tensor.dim() - (1 if key.endswith(("norm.weight", "norm_weight", "bias")) else 2)
    )
    if key.endswith(("word_embeddings.weight", "output_layer.weight")):
        tensor = torch.cat([tensor, tensor.new_full((PADDING, tensor.shape[1]), 7.0)])
    rows = next((cuts for name, cuts in BY_ROWS.items() if key.endswith(name)), 1)
    axis, cuts = (lead + 1, 2) if key.endswith(BY_COLUMNS) else (lead, rows)
    made = []
    for place in torch.cartesian_prod(*map(torch.arange, tensor.shape[:lead])).reshape(-1, lead) if lead else [()]:
        index = tuple(int(at) for at in place)
        for part, data in enumerate(tensor[index].chunk(cuts, axis - lead)):
            offsets = [(n, at, tensor.shape[n]) for n, at in enumerate(index)]
            offsets += [(axis, part, cuts)] if cuts > 1 else []
            made.append(ShardedTensor.from_rank_offsets(key, data, *offsets, prepend_axis_num=lead))
    return made


def save_cut(expected: dict[str, torch.Tensor], folder: str) -> None:
    """Write the tensors cut, with an optimizer and random generators beside them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state: dict[str, Any] = {f"{key}/{n}": s for key, t in expected.items() for n, s in enumerate(shards(key, t))}
    moment = torch.zeros(5)
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    state["moment"] = ShardedTensor.from_rank_offsets(key, moment)
    state["generators"] = ShardedObject("rng_state", {"torch": torch.get_rng_state(), "epoch": 3}, (1,), (0,))
    state["extra"] = ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,))
    Path(folder).mkdir(parents=True)
    dist_checkpointing.save(state | {"iteration": 7}, folder, content_metadata={"singleton_local_shards": False})


def main() -> None:
    """Compare and write every case."""
    device.start("cpu")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        expected = core_tensors(Path(case["hf"]))
        compare(expected, case["core"])
        save_cut(expected, case["cut"])


if __name__ == "__main__":
    main()
