"""Host buffers, lanes and the formula of --offload-activations; what the options refuse."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kept import Kept

from megapatch.models import device, parallel
from megapatch.models.cli import UserError, parser
from megapatch.models.link import Pool, ThreadLane, rounded
from megapatch.models.planning.stages import UNDER_WAY
from megapatch.models.space import DoesNotFit
from megapatch.trainer.options import PretrainOptions

CPU = device.start("cpu")

from megapatch.models.build import ModelOptions, build  # noqa: E402
from megapatch.trainer.offload import activations  # noqa: E402
from megapatch.trainer.sizes.flops import sizes_of  # noqa: E402
from megapatch.trainer.sizes.memory import Activations  # noqa: E402

BASE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 32}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
SIZE = "--offload-activation-min-kib 64 --seq-length 512 --micro-batch-size 2 --precision bf16"
HF = {"model_type": "llama", "tie_word_embeddings": False, **BASE}


def allocate(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_buffers_are_used_again_and_lie_in_slabs() -> None:
    pool = Pool(allocate, slab_bytes=10 << 10)
    first = [pool.take(4000) for _ in range(2)]  # 4096 each
    assert (pool.used_bytes, pool.peak_bytes, pool.held_bytes) == (8192, 8192, 10 << 10)
    assert {(a.memory.data_ptr() - first[0].memory.data_ptr()) for a in first} == {0, 4096}
    pool.give(first[1])
    pool.give(first[0])
    assert [pool.take(4096), pool.take(3900)] == [first[1], first[0]]  # the oldest first
    assert (pool.used_bytes, pool.peak_bytes, pool.held_bytes) == (8192, 8192, 10 << 10)
    small = pool.take(2048)  # the rest of the slab
    assert pool.held_bytes == 10 << 10 and small.memory.numel() == 2048
    large = pool.take(1 << 20)  # a slab of its own
    assert pool.held_bytes == (10 << 10) + (1 << 20) and large.memory.numel() == 1 << 20


def test_buffers_are_at_most_an_eighth_too_large() -> None:
    sizes = [*range(1, 70000, 97), *(2**n + d for n in range(13, 33) for d in (-1, 0, 1))]
    for size in sizes:
        assert size <= rounded(size) <= max(size * 9 / 8, size + 512)
    assert len({rounded(size) for size in range(1 << 20, 1 << 21)}) <= 9


def test_a_lane_copies_in_order_at_its_rate_beside_the_computation() -> None:
    lane, other = ThreadLane(bytes_per_s=2e6), ThreadLane(None)
    source, middle, target = torch.arange(100000).to(torch.uint8), allocate(100000).zero_(), allocate(100000).zero_()
    start = time.perf_counter()
    out = lane.copy(middle, source)
    back = other.copy(target, middle, after=out)
    other.wait(back)
    assert 0.05 <= time.perf_counter() - start and out.done()
    assert torch.equal(target, source)
    assert other.waited_s() >= 0.0 and other.waited_s() == 0.0
    assert (lane.copied_bytes, other.copied_bytes) == (100000, 100000)


def test_nothing_is_freed_or_used_again_before_its_copy_has_ended() -> None:
    """Storages that die and buffers that are reused while a slow link still reads them: the bytes are right."""
    gate = threading.Event()
    pool, lane = Pool(allocate, slab_bytes=4096), ThreadLane(None)
    lane.thread.submit(gate.wait)  # the link does nothing until the gate opens
    buffer = pool.take(4096)
    source = torch.full((4096,), 1, dtype=torch.uint8)
    buffer.last = lane.copy(buffer.memory, source)
    storage, address = source.untyped_storage()._weak_ref(), source.data_ptr()
    del source
    others = [allocate(4096).fill_(9) for _ in range(64)]  # one of them would get its memory
    assert address not in {x.data_ptr() for x in others} and storage is not None
    pool.give(buffer)
    again = pool.take(4096)
    assert again is buffer
    second = ThreadLane(None)
    late = second.copy(again.memory, torch.full((4096,), 2, dtype=torch.uint8), after=again.last)
    time.sleep(0.02)
    assert not late.done()
    gate.set()
    second.wait(late)
    assert set(again.memory.tolist()) == {2}


@contextmanager
def built(options: Any) -> Iterator[tuple[torch.nn.Module, activations.Offload]]:
    """A model whose activations go where the options say."""
    parallel.start(options, CPU)
    try:
        device.seed_everything(1, 0)
        further = options.recompute_config({}, own_layer=False, engine=False) | {"calculate_per_token_loss": True}
        net = build(HF, ModelOptions(options, CPU, "bf16", 512, further))[0].train()
        offload = activations.start(options, CPU, [net])
        assert offload is not None
        yield net, offload
    finally:
        parallel.stop()


def test_too_little_host_memory_is_told_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free_bytes", lambda: 10 << 20)
    ids = torch.arange(512).expand(2, 512).contiguous()
    with built(parse(f"--offload-activations 2 {SIZE}")) as (net, _), pytest.raises(DoesNotFit) as error:
        net(ids, ids, None, labels=ids)
    assert error.value.status == 3
    assert str(error.value).startswith("--offload-activations: 256MiB more of host memory are needed, 10MiB are free")


@pytest.mark.parametrize(
    "flags",
    [
        "--offload-activations 4",
        "--offload-activations 0-1,4-4",
        "--offload-activations 5 --offload-activation-modules mlp",
        "--offload-activations 5 --offload-activation-modules core_attn",
        "--offload-activations 5 --recompute full",
    ],
)
def test_what_is_left_on_the_device_is_what_the_formula_says(flags: str) -> None:
    """Within a twentieth, as without offloading."""
    options = parse(f"{flags} {SIZE}")
    with built(options) as (net, offload):
        kept = Kept(net.parameters())
        kept.watch_offload(offload)
        ids = torch.arange(512).expand(2, 512).contiguous()
        with kept.watching():
            loss = net(ids, ids, None, labels=ids).sum()
            kept.measure()
        loss.backward()
        del loss
        assert offload.link.pool.used_bytes == 0  # all came back
        assert 0 < offload.link.pool.peak_bytes <= 9 / 8 * offload.link.out.copied_bytes
    found = Activations(options, sizes_of(HF, False))
    moved = [found.moved(layer, layer, range(6)) for layer in range(6)]
    again = max(sum(found.parts(layer).values()) for layer in range(6)) if options.recompute == "full" else 0
    on_the_way = min(UNDER_WAY + 1, sum(size > 0 for size in moved)) * max(moved)
    assert found.of_stage(0, 1, 512) - again - on_the_way == pytest.approx(kept.most, rel=0.05)


def parse(words: str) -> Any:
    given = "--init-from c --save s --data-path d --train-iters 1 --global-batch-size 2"
    return parser(PretrainOptions, prog="mp-pretrain").parse_args(f"{given} {words}".split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--offload-activations 0", "--offload-activations 0: must be at least 1"),
        ("--offload-activations 3-1", "--offload-activations 3-1: expected a number, or ranges"),
        ("--offload-activations a", "--offload-activations a: expected a number, or ranges"),
        ("--offload-activation-modules mlp", "--offload-activation-modules needs --offload-activations"),
        ("--offload-activation-min-kib 1", "--offload-activation-min-kib needs --offload-activations"),
        ("--offload-activations 1 --offload-activation-min-kib -1", "must be 0 or more"),
        ("--offload-activations 1 --offload-link-gb-per-s 0", "--offload-link-gb-per-s 0.0: must be above 0"),
        ("--offload-link-gb-per-s 1", "--offload-link-gb-per-s needs --offload-activations or --offload-optimizer"),
        (
            "--offload-activations 1 --offload-activation-modules mlp --recompute full",
            "with --recompute full a layer keeps nothing but its input",
        ),
        (
            "--offload-activations 1 --offload-activation-modules mlp --recompute selective --recompute-modules mlp",
            "--offload-activation-modules mlp: is computed again",
        ),
    ],
)
def test_options_without_effect_are_refused(words: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(words)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("layers", "chunks", "reason"),
    [
        ("3", [range(3), range(3, 6)], "a stage or chunk has 3 layers, of which the last one stays on the device"),
        ("1", [range(1)], "a stage or chunk has 1 layer, of which"),
        ("4-9", [range(6)], "the model's layers are 0 to 5"),
        ("5-5", [range(6)], "are the last layers of their stages"),
    ],
)
def test_layers_that_cannot_go_are_refused(layers: str, chunks: list[range], reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse(f"--offload-activations {layers}").refuse_layers(chunks)
    assert str(error.value).startswith(f"--offload-activations {layers}: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("layers", "chunk", "found"),
    [("2", range(4), [0, 1]), ("2", range(4, 8), [4, 5]), ("0-1,6-7", range(4, 8), [6]), ("1-3", range(4), [1, 2])],
)
def test_the_layers_that_go(layers: str, chunk: range, found: list[int]) -> None:
    assert parse(f"--offload-activations {layers}").offloaded(chunk) == found
