"""Figures of a run: FLOPs against PyTorch's counter, parameters against transformers, the log and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
import references  # noqa: F401  makes AutoModelForCausalLM know the models that transformers lacks
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainer_runs import corpus, events, model, train
from transformers import AutoConfig, AutoModelForCausalLM

from megapatch.models import device, family, lora
from megapatch.models.shapes import Layout, num_parameters

device.start()  # before megatron-core is imported

from megapatch.models.build import config_class  # noqa: E402
from megapatch.models.layers.spec import mixture_layers  # noqa: E402
from megapatch.trainer.sizes.flops import flops_per_token, known_peak, sizes_of  # noqa: E402
from megapatch.trainer.watching.metrics import JsonLines  # noqa: E402

SEQUENCE = 32
TIED = ("llama tied", "llama", {"tie_word_embeddings": True})
CASES = [(name, name, {"tie_word_embeddings": False}) for name in sorted(family.known())] + [TIED]


def transformers_model(kind: str, changes: dict[str, Any], **more: Any) -> Any:
    """transformers' model of the smallest configuration, and its config.json."""
    config = AutoConfig.for_model(kind, **dict(family.known()[kind].tiny) | changes)
    return AutoModelForCausalLM.from_config(config, **more), config.to_dict()


@pytest.mark.parametrize(("kind", "changes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_flops_are_three_times_what_pytorch_counts_forward(kind: str, changes: dict[str, Any]) -> None:
    """Exactly, once attention's upper triangle is left out: PyTorch counts all s x s scores, a causal model needs half.

    Three: the backward pass multiplies once for the inputs and once for the weights.
    """
    net, hf = transformers_model(kind, changes, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.arange(SEQUENCE)[None])
    fields = family.find(hf).transformer_config(hf) | {"activation_func": torch.nn.functional.silu}
    config = config_class(fields)(**fields)
    sizes = config.kv_channels + getattr(config, "v_head_dim", config.kv_channels)  # of a head: q and k; v
    upper_half = config.num_layers * config.num_attention_heads * sizes * SEQUENCE**2
    expected = 3 * (counter.get_total_flops() - upper_half) / SEQUENCE
    assert flops_per_token(config, family.vocab_size(hf), SEQUENCE, sum(mixture_layers(config))) == expected


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_flops_are_what_pytorch_counts_forward_and_backward(kind: str, adapts: bool) -> None:
    """With adapters of peft's, too: the weights beside them need no gradients. Attention as above."""
    net, hf = transformers_model(kind, {"tie_word_embeddings": False}, attn_implementation="eager")
    adapters = None
    if adapts:
        peft = pytest.importorskip("peft")
        net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules="all-linear"))
        net.enable_input_require_grads()  # as all layers but the first have them
        adapters = lora.num_parameters(Layout(hf), lora.Lora(4, 8.0, 0.0, ("all",)))
        assert adapters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(SEQUENCE)[None]
        net(ids, labels=ids).loss.backward()
    config = sizes_of(hf, False)
    upper_half = config.num_layers * config.num_attention_heads * 2 * config.kv_channels * SEQUENCE**2
    expected = (counter.get_total_flops() - 3 * upper_half) / SEQUENCE
    assert flops_per_token(config, family.vocab_size(hf), SEQUENCE, 0, adapters) == expected


@pytest.mark.parametrize(("kind", "changes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_parameters_are_counted_as_transformers_does(kind: str, changes: dict[str, Any]) -> None:
    net, hf = transformers_model(kind, changes)
    buffers = sum(buffer.numel() for name, buffer in net.named_buffers() if name in net.state_dict())
    assert num_parameters(hf) == net.num_parameters() + buffers  # a router's bias is a buffer there


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("NVIDIA H20", "bf16", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_own_data_sheet(name: str, precision: str, peak: float | None) -> None:
    assert known_peak(name, precision) == peak


def test_a_torn_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    first = JsonLines(path)
    first.write({"event": "train", "loss": 1.5})
    first.close()
    path.write_text(path.read_text() + '{"event": "tra')
    second = JsonLines(path)
    second.write({"event": "train", "loss": float("nan"), "norm": float("inf")})
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "train", "loss": 1.5},
        {"event": "train", "loss": None, "norm": None},
    ]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """The records of a run, and its TensorBoard folder."""
    folder = tmp_path_factory.mktemp("metrics")
    corpus(folder)
    model(folder, "mixture", "qwen3_moe")
    options = f"--split 80,20 --eval-interval 2 --tensorboard {folder / 'board'} --log-file {folder / 'log.jsonl'}"
    assert not (folder / "run").exists()
    with pytest.raises(FileNotFoundError):  # the log is not where it is by default
        train(folder, "run", options, "mixture")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], folder / "board"


def test_tensorboard_shows_what_the_log_says(logged: tuple[list[dict], Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records, folder = logged
    board = EventAccumulator(str(folder))
    board.Reload()
    train_names = events(records, "train")[0].keys() - {"event", "ts", "step"}
    assert set(board.Tags()["scalars"]) == {f"train/{name}" for name in train_names} | {"eval/loss"}
    for tag in board.Tags()["scalars"]:
        kind, name = tag.split("/")
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in events(records, kind)]
        assert [(e.step, e.value) for e in board.Scalars(tag)] == expected


def test_the_log_says_how_fast_and_how_large(logged: tuple[list[dict], Path]) -> None:
    records, _ = logged
    assert [r["event"] for r in records] == "start eval train train eval train train eval save end".split()
    start, steps = records[0], events(records, "train")
    assert start["world_size"] == 1 and start["config"]["seq_length"] == 32 and start["resumed_from"] is None
    for number, record in enumerate(steps, 1):
        assert record["step"] == number and record["consumed_samples"] == 8 * number
        assert record["tokens_per_s"] * record["step_s"] == pytest.approx(8 * 32)
        flops = steps[0]["tflops"] / steps[0]["tokens_per_s"]
        assert record["tflops"] / record["tokens_per_s"] == pytest.approx(flops)
        assert 50e6 < record["peak_memory_bytes"] < 64e9
        assert 0.5 < record["load_balancing_loss"] < 2  # near 1: every expert gets as much
