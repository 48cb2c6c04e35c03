"""What is worked out before and after a run: activations against what autograd keeps, communication nothing hides."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megapatch.models import device, family, parallel
from megapatch.trainer.options import PretrainOptions
from megapatch.trainer.sizes.flops import sizes_of
from megapatch.trainer.sizes.memory import Activations

CPU = device.start()  # before megatron-core is imported

from megapatch.models.build import ModelOptions, build  # noqa: E402
from megapatch.trainer.watching.profiling import communication  # noqa: E402

BASE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 32}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "qwen3_moe": EXPERTS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_what_autograd_keeps(kind: str, recompute: str) -> None:
    """Within a twentieth: small vectors, such as the norms' scales, are not in the estimate."""
    hf = {"model_type": kind, "tie_word_embeddings": False, **BASE, **KINDS[kind]}
    of_batch: dict[str, Any] = {"seq_length": 512, "micro_batch_size": 2, "global_batch_size": 2, "precision": "bf16"}
    files: dict[str, Any] = {"save": Path("run"), "init_from": Path("config.json"), "data_path": ["data"]}
    options = PretrainOptions(**files, **of_batch, train_iters=1, recompute=recompute)  # type: ignore[arg-type]
    parallel.start(options, CPU)
    try:
        device.seed_everything(1, 0)
        model = family.find(hf).transformer_config(hf)
        further = options.recompute_config(model, own_layer=False, engine=False) | {"calculate_per_token_loss": True}
        net = build(hf, ModelOptions(options, CPU, "bf16", 512, further))[0].train()
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        kept: dict[int, Any] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage()._cdata not in weights:
                kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        ids = torch.arange(512).expand(2, 512).contiguous()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(ids, ids, None, labels=ids)
        held = sum(storage.nbytes() for storage in kept.values())
    finally:
        parallel.stop()
    found = Activations(options, sizes_of(hf, False))
    again = max(sum(found.parts(layer).values()) for layer in range(4)) if recompute == "full" else 0
    assert found.of_stage(0, 1, 512) - again == pytest.approx(held, rel=0.05)


def test_communication_is_exposed_where_nothing_is_computed() -> None:
    def event(name: str, cat: str, begin: float, end: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": end - begin}

    events = [
        event("gloo:all_reduce", "user_annotation", 0, 10),
        event("aten::mm", "cpu_op", 2, 4),
        event("aten::add", "cpu_op", 3, 6),
        event("gloo:all_reduce", "user_annotation", 8, 12),
        event("gloo:send", "user_annotation", 4, 5),
        event("Optimizer.step", "user_annotation", 0, 20),
    ]
    assert communication(events) == {
        "all_reduce": {"calls": 2, "total_us": 12.0, "exposed_us": 8.0},
        "send": {"calls": 1, "total_us": 1.0, "exposed_us": 0},
    }
    kernels = [event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 0, 4), event("gemm", "kernel", 3, 9)]
    assert communication(kernels) == {"AllReduce": {"calls": 1, "total_us": 4.0, "exposed_us": 3.0}}
