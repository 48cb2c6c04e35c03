"""Compares checkpoints with megatron-core's own models at a layout, and saves as Megatron-LM does; under torchrun.

    torchrun --nproc-per-node 4 tests/rank_worker.py cases.json

cases.json: [{"hf": folder, "layout": {option: value}, "core": torch_dist checkpoint to load, "chunked": another of the
same weights, "exact": whether its chunks are those of this layout, "legacy": checkpoint of this layout to compare,
"own": whether megatron-core's own specification has this model (else ours, of the same modules and names),
"saved": where this process's ranks save their files, "args": whether with options and training state, and
with singleton_local_shards in "apart": where dist_checkpointing.save puts a torch_dist checkpoint}].
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megapatch.models import device, family, parallel

Chunks = list[dict[str, Any]]


Models = list[torch.nn.Module]


def further(hf: dict[str, Any]) -> dict[str, Any]:
    """The layers for multi-token prediction, which ``build`` leaves out unless it is asked for them."""
    return {"mtp_num_layers": family.find(hf).transformer_config(hf).get("mtp_num_layers")}


def oracle(hf: dict[str, Any], options: parallel.Parallel, found: device.Device, core: Path) -> Models:
    """The chunks of this rank, with weights that unmodified dist_checkpointing.load read."""
    from megatron.core import dist_checkpointing

    from megapatch.models.build import ModelOptions, build

    device.seed_everything(dist.get_rank(), 0)
    chunks = build(hf, ModelOptions(options, found, overrides=further(hf)))
    loaded = dist_checkpointing.load(sharded(chunks), str(core))
    for key, chunk in zip(keys(len(chunks)), chunks, strict=True):
        chunk.load_state_dict(loaded[key])
    return chunks


def sharded(chunks: Models, **more: Any) -> dict[str, Any]:
    """What dist_checkpointing saves and loads of the chunks of this rank."""
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), **more}
    named = zip(keys(len(chunks)), chunks, strict=True)
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in named}


def own_models(hf: dict[str, Any], options: parallel.Parallel, found: device.Device) -> Models:
    """The chunks of this rank as megatron-core's own local specification builds them."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megapatch.models.build import ModelOptions, padded_vocabulary, transformer_config

    config = replace(transformer_config(hf, ModelOptions(options, found)), sequence_parallel=False)
    made = []
    for stage in range(options.vpp) if options.vpp else [None]:
        made.append(
            GPTModel(
                config,
                get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage),
                vocab_size=padded_vocabulary(family.vocab_size(hf), options.tp),
                max_sequence_length=64,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=family.tied_embeddings(hf),
                position_embedding_type=family.positions(hf),
                vp_stage=stage,
            )
        )
    return made


def file_of(folder: Path) -> Path:
    """The file of this rank, by Megatron-LM's rule for its name."""
    from megatron.core import parallel_state as state

    name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    if state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{state.get_pipeline_model_parallel_rank():03d}"
    if state.get_expert_model_parallel_world_size() > 1:
        name += f"_{state.get_expert_model_parallel_rank():03d}"
    return folder / name / "model_optim_rng.pt"


def keys(count: int) -> list[str]:
    return ["model"] if count == 1 else [f"model{n}" for n in range(count)]


def weights(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, value) for name, value in state.items() if not name.endswith("_extra_state"))


def compare(state: dict[str, Any], expected: Chunks, case: dict[str, Any]) -> None:
    """A rank's file holds what core holds; the rows that pad the vocabulary are zero there."""
    args = state["args"]
    vocabulary = family.vocab_size(json.loads((Path(case["hf"]) / "config.json").read_text()))
    assert state["checkpoint_version"] == 3.0 and state["iteration"] == 0
    assert args.tensor_model_parallel_size == case["layout"].get("tp", 1)
    for key, chunk in zip(keys(len(expected)), expected, strict=True):
        assert state[key].keys() == chunk.keys(), set(state[key]) ^ set(chunk)
        for name, tensor in weights(chunk):
            found = state[key][name]
            assert found.shape == tensor.shape and found.dtype == tensor.dtype, (name, found.shape, tensor.shape)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rank = torch.distributed.get_rank() % args.tensor_model_parallel_size
                inside = max(0, min(len(found), vocabulary - rank * len(found)))
                assert not found[inside:].any()
                found, tensor = found[:inside], tensor[:inside]
            assert torch.equal(found, tensor), name


def save_as_megatron_does(models: Models, case: dict[str, Any]) -> None:
    """The files of --ckpt-format torch, some with options and training state, and a torch_dist checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.enums import AttnBackend

    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 7}
    if case["args"]:
        state["args"] = argparse.Namespace(num_layers=4, attention_backend=AttnBackend.auto, save=Path("run"))
        state["optimizer"] = {"step": torch.ones(3)}
    state |= {key: model.state_dict() for key, model in zip(keys(len(models)), models, strict=True)}
    path = file_of(Path(case["saved"]))
    if mpu.get_expert_data_parallel_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    folder = Path(case["apart"])
    folder.mkdir(parents=True, exist_ok=True)
    apart = sharded(models, singleton_local_shards=case["args"])
    dist_checkpointing.save(apart | {"iteration": 7}, str(folder))


def reads_each_byte_once(hf: dict[str, Any], options: parallel.Parallel, found: device.Device, folder: Path) -> None:
    """Every part of a weight that this rank holds is a chunk of the checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megapatch.models.build import ModelOptions, build
    from megapatch.models.core_files import Checkpoint

    with Checkpoint(folder) as checkpoint:
        chunks = {(key, c.offsets, c.sizes) for key, tensor in checkpoint.tensors.items() for c in tensor.chunks}
    state = sharded(build(hf, ModelOptions(options, found, overrides=further(hf))))
    apply_factories(state)
    for tensor in (value for value in nested_values(state) if isinstance(value, ShardedTensor)):
        lead = tensor.prepend_axis_num
        offsets, sizes = tuple(tensor.global_offset), (*(1,) * lead, *tensor.local_shape)
        if tensor.allow_shape_mismatch:  # rows that pad the vocabulary are not stored
            sizes = (min(sizes[0], family.vocab_size(hf) - offsets[0]), *sizes[1:])
        assert (tensor.key, offsets, sizes) in chunks, (tensor.key, offsets, sizes)


def check(case: dict[str, Any]) -> None:
    found, options = device.start("cpu"), parallel.Parallel(**case["layout"])
    parallel.start(options, found)
    from megatron.core import parallel_state

    try:
        hf = json.loads((Path(case["hf"]) / "config.json").read_text())
        models = oracle(hf, options, found, Path(case["core"]))
        expected = [model.state_dict() for model in models]
        again = oracle(hf, options, found, Path(case["chunked"]))
        for first, second in zip(expected, again, strict=True):
            loaded = second.state_dict()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(first))
        if case["exact"]:
            reads_each_byte_once(hf, options, found, Path(case["chunked"]))
        state = torch.load(file_of(Path(case["legacy"])), map_location="cpu")
        compare(state, expected, case)
        if case["own"]:
            models = own_models(hf, options, found)
        for key, model in zip(keys(len(models)), models, strict=True):
            model.load_state_dict(state[key], strict=True)
        save_as_megatron_does(models, case)
    finally:
        parallel_state.destroy_model_parallel()


def main() -> None:
    """Every case."""
    from megatron.core.safe_globals import register_safe_globals

    device.start("cpu")
    register_safe_globals()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        check(case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
