"""What --dry-run says a run will hold, against what the tensors of such a run take at their peak."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import VOCABULARY, corpus

from megapatch.models import cli, device, parallel
from megapatch.trainer.options import PretrainOptions

CPU = device.start()  # before megatron-core is imported

from megapatch.trainer.pretrain import make_plan, prepare  # noqa: E402

BASE = {"model_type": "qwen3", "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
SIZES = {
    "narrow": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3},
    "wide": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    "mixture": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        **EXPERTS,
    },
}
RUN = "--train-iters 2 --seq-length 256 --global-batch-size 4 --micro-batch-size 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    corpus(made)
    for name, sizes in SIZES.items():
        (made / f"{name}.json").write_text(json.dumps(BASE | sizes))
    return made


def peak_bytes(profiler: Any, path: Path) -> int:
    """The most that was allocated at once while the profiler ran, without what was there before."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    return max(event["args"]["Total Allocated"] for event in events) - first["Total Allocated"] + first["Bytes"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_the_estimate_is_what_training_allocates(folder: Path, tmp_path: Path, size: str, precision: str) -> None:
    """Within a tenth: what an operator holds while it runs is not in the estimate."""
    words = [
        *RUN.split(),
        "--precision",
        precision,
        "--save",
        str(tmp_path / "run"),
        "--log-file",
        str(tmp_path / "log"),
    ]
    for flag, name in (("--init-from", f"{size}.json"), ("--tokenizer", "tokenizer"), ("--data-path", "data")):
        words += [flag, str(folder / name)]
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words)
    plan = make_plan(options)
    estimate = plan.described.memory[0].total_bytes
    kinds = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # of runs before this one in the same process
    try:
        with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:
            trainer, records = prepare(options, CPU, plan)
            trainer.saved_step = options.train_iters  # this is about training alone
            trainer.run()
    finally:
        parallel.stop()
    records.close()
    assert estimate == pytest.approx(peak_bytes(profiler, tmp_path / "trace.json"), rel=0.1)
