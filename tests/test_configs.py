"""scripts/configs: each file plans a run at full scale that fits its GPUs, and any rank of it can be built."""

import json
import os
import shlex
from pathlib import Path

import pytest
from trainer_runs import ROOT, corpus

from megapatch.models.device import CONNECTIONS
from megapatch.models.held import plain
from megapatch.models.shapes import num_parameters
from megapatch.trainer.pretrain import main
from megapatch.trainer.sizes.memory import MARGIN

CONFIGS = ROOT / "scripts" / "configs"
SIZES = {  # parameters without layers for multi-token prediction, as the hub's pages and papers say
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_419_200,
    "mixtral-8x7b": 46_702_792_704,
    "moonlight-16b-a3b": 15_960_110_208,  # by the rules; its paper says 15.96 billion
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a corpus, which every model's vocabulary holds."""
    folder = tmp_path_factory.mktemp("configs")
    corpus(folder)
    return folder


def words(name: str) -> list[str]:
    """The arguments in a file."""
    return shlex.split((CONFIGS / f"{name}.args").read_text(), comments=True)


def plan(name: str, data: Path, capfd: pytest.CaptureFixture, *more: str) -> tuple[int, dict, str]:
    """Exit status, stdout as JSON and stderr of a dry run."""
    paths = ["--tokenizer", str(data / "tokenizer"), "--data-path", str(data / "data"), "--save", str(data / "run")]
    status = main(
        [f"@{CONFIGS / name}.args", *paths, "--train-iters", "100000", "--split", "80,20", "--dry-run", *more]
    )
    said = capfd.readouterr()
    return status, json.loads(said.out or "{}"), said.err


def test_every_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.args")} == SIZES.keys()
    assert {path.stem for path in (CONFIGS / "models").glob("*.json")} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_has_its_size(name: str) -> None:
    assert num_parameters(plain(json.loads((CONFIGS / "models" / f"{name}.json").read_text()))) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_config_fits_its_gpus_and_a_rank_builds_what_the_plan_says(
    name: str, data: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = words(name)
    world = int(given[given.index("--world-size") + 1])
    status, found, said = plan(name, data, capfd, "--dry-run-rank", str(world - 1))
    assert status == 0, said
    assert found["layout"]["world_size"] == world == len(found["ranks"])
    assert found["parameters"] == SIZES[name]
    assert found["built"] == {"rank": world - 1, "parameters": found["ranks"][-1]["parameters"]}
    largest = max(stage["total_bytes"] for stage in found["memory"]) / 2**30
    device = found["options"]["device_memory_gib"]
    assert 0.25 * device < largest <= MARGIN * device  # neither too large, nor on many more GPUs than it needs
    assert f"{SIZES[name]:,} parameters" in said


@pytest.mark.parametrize(("rank", "layers"), [(0, "0-2,33-34"), (900, "29-30")])
def test_stages_of_uneven_size_are_built_as_planned(
    rank: int, layers: str, data: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, found, _ = plan("deepseek-v3", data, capfd, "--dry-run-rank", str(rank))
    assert found["ranks"][rank]["layers"] == layers
    assert found["built"] == {"rank": rank, "parameters": found["ranks"][rank]["parameters"]}


@pytest.mark.parametrize(("name", "queues"), [("llama-3.1-70b", "1"), ("deepseek-v3", "32")])
def test_a_run_sets_the_queues_to_its_gpus_from_the_layout(
    name: str, queues: str, data: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(CONNECTIONS, "")  # so that what the run sets is undone
    monkeypatch.delenv(CONNECTIONS)
    plan(name, data, capfd)
    assert os.environ[CONNECTIONS] == queues


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--world-size", "24"], 1, "does not divide the number of processes, 24"),
        (["--micro-batch-size", "16"], 3, "--device-memory-gib 80: the estimate is"),
        (["--global-batch-size", "101"], 1, "--global-batch-size 101 is not divisible"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    more: list[str], status: int, told: str, data: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(ROOT)
    ended, found, said = plan("llama-3.1-70b", data, capfd, *more)
    assert ended == status and not found and re.search(told, said)
