"""Losses by source of a blend: means of what was trained and validated on, at every layout; nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import ROOT, arguments, corpus, data, events, launch, model, steps, train

from megapatch.models import device

device.start()  # before megatron-core is imported

from megapatch.trainer.data import sources  # noqa: E402
from megapatch.trainer.data.sample_places import Samples  # noqa: E402

BLEND = "--data-path 0.7 DIR/data 0.3 DIR/other --split 80,20 --eval-interval 2 --eval-iters 1 --log-sample-ids"
BLEND += " --lr 1e-2 --global-batch-size 16"
LAYOUTS = {
    "DP2": "",
    "TP2": "--tp 2 --sequence-parallel",
    "PP2": "--pp 2 --vpp 2",
    "CP2": "--cp 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, of which the second is soon learned: one word, over and over."""
    made = tmp_path_factory.mktemp("sources")
    corpus(made)
    model(made, "dense")
    (made / "word.txt").write_text("\n".join(["again and " * 8] * 400))
    data(made, "other", [str(made / "word.txt"), str(ROOT / "LICENSE"), *[str(made / "word.txt")] * 3])
    return made


def words(folder: Path) -> str:
    return BLEND.replace("DIR", str(folder))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    return train(folder, "alone", words(folder))


@pytest.fixture(scope="module")
def pairs(folder: Path) -> dict[str, list[dict]]:
    """Two processes."""
    cases: dict[str, Any] = {
        name: arguments(folder, "dense", name, f"{words(folder)} {layout}") for name, layout in LAYOUTS.items()
    }
    return launch(2, cases, folder)


def test_the_loss_is_the_mean_of_its_sources(folder: Path, alone: list[dict]) -> None:
    names = [str(folder / name) for name in ("data", "other")]
    read = {record["step"]: [place["prefix"] for place in record["samples"]] for record in events(alone, "samples")}
    found = events(alone, "train")
    for record in found:
        counts = [read[record["step"]].count(name) for name in names]
        assert list(record["loss_of"]) == names and min(counts) > 0
        mean = sum(n * record["loss_of"][name] for name, n in zip(names, counts, strict=True)) / 16
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
    assert found[-1]["loss_of"][names[1]] < found[-1]["loss_of"][names[0]] - 0.5  # one word is learned first


def test_validation_is_told_by_source(folder: Path, alone: list[dict]) -> None:
    found = events(alone, "eval")
    assert [record["step"] for record in found] == [0, 2, 4]
    for record in found:
        low, high = sorted(record["loss_of"].values())
        assert len(record["loss_of"]) == 2 and low < record["loss"] < high


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_do_not_depend_on_the_layout(alone: list[dict], pairs: dict[str, list[dict]], layout: str) -> None:
    for kind in ("train", "eval"):
        given = zip(events(alone, kind), events(pairs[layout], kind), strict=True)
        assert all(b["loss_of"] == pytest.approx(a["loss_of"], abs=2e-5) for a, b in given)


def test_watching_changes_no_bit(
    folder: Path, tmp_path: Path, alone: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.BySource, "watching", lambda *_: None)
    unwatched = train(folder, str(tmp_path / "run"), words(folder))
    assert steps(unwatched) == steps(alone)
    assert all(record["loss_of"] == {} for record in events(unwatched, "train"))


def test_a_single_source_is_not_told_of(folder: Path, tmp_path: Path) -> None:
    records = train(folder, str(tmp_path / "run"), "--train-iters 1 --split 80,20 --eval-interval 1 --eval-iters 1")
    assert not any("loss_of" in record for record in records)


def test_tokens_count_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows or by tokens; a source that is named twice is one; one that was not met is left out."""
    monkeypatch.setattr(sources.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: None)
    told = sources.BySource(["a", "b", "a", "c"], torch.device("cpu"))
    losses, weights = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    by_row, by_token = told.watching(torch.tensor([[0], [1]])), told.watching(torch.tensor([[2, 1], [1, 1]]))
    assert by_row and by_token
    by_row(losses, weights)
    assert told.said == {"loss_of": {"a": 1.5, "b": 3.0}}
    by_row(losses, weights)
    by_token(losses, weights * 0.5)
    assert told.said == {"loss_of": {"a": (3.0 + 0.5) / 2.5, "b": (3.0 + 1.0 + 1.5) / 2.0}}
    by_row(losses, weights)
    told.clear()
    assert told.said == {"loss_of": {}}


@pytest.mark.parametrize(("remember", "read"), [(True, {0, 1}), (False, set())])
def test_samples_are_remembered_only_where_somebody_asks(remember: bool, read: set[int]) -> None:
    samples = Samples(["a", "b"], lambda *_: {}, remember=remember)
    assert [samples[place] for place in (0, 1, 1)] == ["a", "b", "b"]
    assert samples.read == read
