"""A session with --offload-optimizer, seen from within: its checkpoint formats, what it moves, copies, holds and tells.

Each test trains a model of two layers for a few steps in this process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megapatch.models import device, parallel
from megapatch.models.cli import parser
from megapatch.models.space import DoesNotFit
from megapatch.trainer.options import PretrainOptions

CPU = device.start("cpu")

from megatron.core import dist_checkpointing  # noqa: E402

from megapatch.models.load import sharded_state  # noqa: E402
from megapatch.trainer import session as sessions  # noqa: E402
from megapatch.trainer.offload import auto, offloading  # noqa: E402
from megapatch.trainer.offload.adam import device_bytes  # noqa: E402
from megapatch.trainer.session import Session  # noqa: E402
from megapatch.trainer.step import train_step  # noqa: E402
from megapatch.trainer.watching.metrics import Log  # noqa: E402

HF = {"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HF |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
HF |= {"tie_word_embeddings": False}
PARAMETERS = 90_432
GIVEN = "--init-from c --save s --data-path d --train-iters 9 --global-batch-size 2 --seq-length 16 --lr 1e-2"
BF16 = "--precision bf16 --use-distributed-optimizer"
CPU_ENGINE, STREAM = (f"--offload-chunk 3000 --offload-engine {name} --offload-optimizer" for name in ("cpu", "stream"))
BUDGET = 1 << 20


@contextmanager
def running(words: str) -> Iterator[Session]:
    """A session of a model of random weights, which are the same each time."""
    options = parser(PretrainOptions, prog="mp-pretrain").parse_args(f"{GIVEN} {words}".split())
    parallel.start(options, CPU)
    try:
        yield sessions.start(options, CPU, HF, load=False)
    finally:
        parallel.stop()


def batches(step: int) -> Iterator[dict[str, Any]]:
    """Two micro-batches [1, 16]."""
    chance = torch.Generator().manual_seed(step)
    for _ in range(2):
        ids = torch.randint(0, 128, (1, 17), generator=chance)
        mask = torch.ones(1, 16)
        yield {"tokens": ids[:, :-1], "labels": ids[:, 1:], "position_ids": torch.arange(16)[None], "loss_mask": mask}


def trained(run: Session, *steps: int) -> list[dict[str, float]]:
    """Train these steps; what each said beside its loss."""
    return [train_step(run, lambda step=step: batches(step), 2).extra for step in steps]


def state(run: Session) -> list[torch.Tensor]:
    """Copies of weights, masters and moments."""
    found = [parameter.detach().clone() for model in run.models for parameter in model.parameters()]
    for part in run.optimizer.chained_optimizers:
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                found += [tensors[name].clone() for name in ("param", "exp_avg", "exp_avg_sq")]
    return found


def equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def described(run: Session, kind: str, *, loading: bool) -> Any:
    """The optimizer's state in one of megatron-core's formats, of which the trainer's own is the second."""
    (part,) = run.optimizer.chained_optimizers
    return getattr(part, f"sharded_param_state_{kind}")(sharded_state(run.models[0]), loading, {})


@pytest.mark.parametrize("kind", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(f"{CPU_ENGINE} 0.3", f"{STREAM} 1"), (f"{STREAM} 1", ""), ("", f"{CPU_ENGINE} 0.65")],
)
def test_both_reshardable_formats_bring_every_bit_to_another_fraction(
    tmp_path: Path, kind: str, before: str, after: str
) -> None:
    with running(f"{BF16} {before}") as run:
        trained(run, 1, 2)
        weights = {name: value.clone() for name, value in run.models[0].state_dict().items() if value is not None}
        expected = state(run)
        dist_checkpointing.save({"optimizer": described(run, kind, loading=False)}, str(tmp_path))
    with running(f"{BF16} {after}") as run:
        trained(run, 7)  # something else
        assert not equal(state(run), expected)
        run.models[0].load_state_dict(weights, strict=False)
        wanted = {"optimizer": described(run, kind, loading=True)}
        loaded = dist_checkpointing.load(wanted, str(tmp_path))["optimizer"]
        (part,) = run.optimizer.chained_optimizers
        for plain in part.optimizer.state.values():
            plain.pop("step")  # megatron-core 0.16.1 would look for it among what was loaded; see optimizer_state.py
        getattr(part, f"load_parameter_state_from_{kind}")(loaded)
        assert equal(state(run), expected)


@pytest.mark.parametrize(
    ("words", "out", "back"),
    [
        (f"--precision bf16 {CPU_ENGINE} 1", 4, 2),
        (f"{CPU_ENGINE} 1", 4, 4),
        (f"--precision bf16 {STREAM} 1", 12, 12),
        (f"{STREAM} 1", 8, 8),
        (f"{BF16} {CPU_ENGINE} 0.5", 2, 1),
        (f"{BF16} {CPU_ENGINE} 0", 0, 0),
    ],
)
def test_each_step_copies_as_many_bytes_a_parameter_as_the_page_says(words: str, out: int, back: int) -> None:
    with running(words) as run:
        for said in trained(run, 1, 2):
            assert said["offload_d2h_bytes"] == pytest.approx(out * PARAMETERS, rel=2e-3)  # padding, and a grain
            assert said["offload_h2d_bytes"] == pytest.approx(back * PARAMETERS, rel=2e-3)


@pytest.mark.parametrize(("fraction", "held"), [("0", False), ("0.0001", True), ("0.5", True)])
@pytest.mark.parametrize("engine", ["cpu", "stream"])
def test_memory_for_chunks_on_their_way_is_taken_only_where_some_may_be(engine: str, fraction: str, held: bool) -> None:
    with running(f"--offload-engine {engine} --offload-optimizer {fraction}") as run:
        assert run.away is not None
        (adam,) = run.away.adams
        assert (adam.engine.host_bytes + adam.engine.device_bytes > 0) == held
        assert run.options.streamed_bytes(PARAMETERS) == (12 * 3 * PARAMETERS if held and engine == "stream" else 0)
        assert (run.away.host_bytes > 0) == (held and (engine == "cpu" or fraction == "0.5"))
        trained(run, 1)


def test_a_skipped_step_has_no_time_of_the_step_before() -> None:
    with running(f"{CPU_ENGINE} 1") as run:
        (said,) = trained(run, 1)
        assert said["offload_adam_s"] > 0 and said["optimizer_s"] > said["offload_exposed_s"] > 0
        run.models[0].embedding.word_embeddings.weight.data[:] = float("nan")
        (skipped,) = trained(run, 2)
        spent = {name: value for name, value in skipped.items() if name.endswith("_s")}
        assert len(spent) == 6 and set(spent.values()) == {0.0}
        assert run.away is not None and [adam.updates for adam in run.away.adams] == [1] and run.updates == 1


class Peaks:
    """Steps whose peak is given beside what the state takes, in thousandths of the budget; moves as in the log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Session) -> None:
        self.others, self.records, self.run = 0, [], run
        monkeypatch.setattr(auto, "budget_bytes", lambda _: BUDGET)
        monkeypatch.setattr(auto, "peak_bytes", lambda *_: self.others + device_bytes(run.away.adams))
        self.fitting = auto.Fitting(run, Log([self]), 2)

    def write(self, record: dict) -> None:
        self.records.append(record)

    def step(self, thousandths: int) -> tuple[str, float]:
        """The move after the step, '' for none, and the fraction then."""
        self.others, before = thousandths * BUDGET // 1000, len(self.records)
        self.fitting.train_step(lambda: lambda: batches(self.run.step))
        self.run.step += 1
        moves = [record["reason"] for record in self.records[before:]]
        assert len(moves) < 2
        return "".join(moves), self.run.away.fraction


@pytest.mark.parametrize("engine", [CPU_ENGINE, STREAM])
def test_auto_follows_the_peak_and_does_not_swing(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    with running(f"{BF16} {engine} auto --device-memory-gib 1") as run:
        made = Peaks(monkeypatch, run)  # 90,432 parameters have 1.035 of the budget
        assert made.step(500) == ("room", pytest.approx(0.54, abs=0.035))  # 0.48 of the budget come back
        full = run.away.fraction
        for other in (500, 485, 515, 500):  # within the band
            assert made.step(other) == ("", full)
        kind, more = made.step(600)
        assert kind == "over budget" and more == pytest.approx(full + 0.08, abs=0.035)
        held = device_bytes(run.away.adams) + 600 * BUDGET // 1000
        assert BUDGET - 36_000 - 1 < held <= BUDGET  # one chunk at most too many
        for other in (600, 590, 600):
            assert made.step(other) == ("", more)
        assert made.step(1200)[1] == 1.0 and made.step(1200) == ("", 1.0)
        assert made.step(0)[0] == "room" and run.away.fraction < 0.1
        assert [record["step"] for record in made.records[1:]] == [1, 6, 10, 12]
        moved = [(r["fraction_before"], r["fraction"], r["peak_bytes"], r["budget_bytes"]) for r in made.records[1:]]
        assert all(before != after and budget == BUDGET for before, after, _, budget in moved)
        for before, after, peak, budget in moved:
            assert (after > before) == (peak > budget)


def test_auto_takes_no_more_host_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [600_000]
    monkeypatch.setattr(offloading, "free_bytes", lambda: free[0])
    with running(f"{BF16} {CPU_ENGINE} auto --device-memory-gib 1") as run:
        made, most = Peaks(monkeypatch, run), run.away.fraction
        assert 0.4 < most < 0.6  # what fits
        free[0] = 100
        assert made.step(2000) == ("", most)  # over budget, and nowhere to go
        assert made.step(0)[0] == "room"
        assert made.step(2000) == ("over budget", most)  # to the places that they had
        for adam in run.away.adams:
            adam.place(0)
            for chunk in adam.chunks:
                chunk.slot = None
        real, calls = auto.train_step, []

        def short(*words: Any) -> Any:
            calls.append(words)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("emulated\nmore")
            return real(*words)

        monkeypatch.setattr(auto, "train_step", short)
        with pytest.raises(DoesNotFit) as error:
            made.step(0)
        assert len(calls) == 1 and error.value.status == 3
        assert "KiB of state that were to leave it find none on the host; use more processes" in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "step 1 found no memory on the device (peak "),
        (f"{CPU_ENGINE} 0.5", "--offload-optimizer 0.5: step 1 found no memory on the device (peak "),
    ],
)
def test_without_auto_a_step_that_finds_no_memory_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("emulated\nmore")

    monkeypatch.setattr(auto, "train_step", short)
    with running(words) as run, pytest.raises(DoesNotFit) as error:
        auto.Fitting(run, Log([]), 2).train_step(lambda: lambda: batches(1))
    assert str(error.value).startswith(told) and "\n" not in str(error.value) and error.value.status == 3
    assert "B), emulated; use --offload-optimizer auto, more processes, --recompute full, or less" in str(error.value)
