"""Stages of uneven size: a run goes on at any other division, its checkpoints convert, the plan says who owns what."""

import json
from pathlib import Path

import pytest
import trainer_runs
from model_folders import contents
from trainer_runs import launch

from megapatch.models import splits
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify
from megapatch.trainer.pretrain import main as pretrain

STEPS = 10
FIRST = "--pp 2 --decoder-first-pipeline-num-layers 1 --use-distributed-optimizer"  # two processes, to step 2
PARTS = {  # after that, and one process to step 4; steps until then: processes, arguments
    6: (2, f"--pp 2 --vpp 2 --use-distributed-optimizer {splits.LAYOUT} Ett|t||tL"),
    8: (2, f"--pp 2 --use-distributed-optimizer {splits.LAYOUT} Ettt|tL"),
    STEPS: (2, "--tp 2"),
}
EMPTY = {  # a stage without any weights
    3: (4, f"--pp 4 --use-distributed-optimizer {splits.LAYOUT} Et||tt|tL"),
    STEPS: (4, f"--pp 4 --use-distributed-optimizer {splits.LAYOUT} E|ttt|t|L"),
}
Steps = list[tuple[int, float, float, float]]


def case(folder: Path, save: str, end: int, layout: str = "") -> dict:
    """A run in FOLDER/SAVE that goes on until a step, where a signal has it saved."""
    words = trainer_runs.arguments(folder, "qwen3", save, f"--train-iters {STEPS} {layout}")
    return {"arguments": words} | ({"signal": {"step": end, "number": 10}} if end < STEPS else {"save": {}})


def in_parts(folder: Path, save: str, parts: dict[int, tuple[int, str]]) -> list[list[dict]]:
    """The records of each part of a run in FOLDER/SAVE."""
    return [launch(size, {"": case(folder, save, end, layout)}, folder)[""] for end, (size, layout) in parts.items()]


def check(expected: Steps, *parts: list[dict]) -> None:
    """The parts make the steps that one process made."""
    found = trainer_runs.steps(*parts)
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    print(f"loss off by {loss:.1e}, norm by {norm:.1e}")
    assert loss <= 1e-6 and norm <= 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps, list[list[dict]]]:
    """The folder, all steps of one process, and the first parts of a run in FOLDER/run."""
    folder = tmp_path_factory.mktemp("uneven")
    trainer_runs.corpus(folder)
    trainer_runs.model(folder, "qwen3")
    first = launch(2, {"part": case(folder, "run", 2, FIRST)}, folder)
    found = launch(1, {"whole": case(folder, "whole", STEPS), "part": case(folder, "run", 4)}, folder)
    return folder, trainer_runs.steps(found["whole"]), [first["part"], found["part"]]


@pytest.mark.timeout(600)
def test_one_process_goes_on_where_uneven_stages_stopped(made: tuple[Path, Steps, list[list[dict]]]) -> None:
    _, expected, parts = made
    check(expected[:4], *parts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_at_any_other_division(made: tuple[Path, Steps, list[list[dict]]]) -> None:
    folder, expected, parts = made
    check(expected, *parts, *in_parts(folder, "run", PARTS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stage_without_weights_saves_and_goes_on(made: tuple[Path, Steps, list[list[dict]]]) -> None:
    folder, expected, _ = made
    check(expected, *in_parts(folder, "empty", EMPTY))


@pytest.mark.timeout(600)
def test_what_uneven_stages_save_converts_and_is_the_same_model(
    made: tuple[Path, Steps, list[list[dict]]], tmp_path: Path
) -> None:
    saved = made[0] / "run" / "iter_0000002"
    hf, ranks, back = tmp_path / "hf", tmp_path / "ranks", tmp_path / "back"
    assert convert(["--source", str(saved), "--target", str(hf)]) == 0
    assert verify(["--source", str(saved), "--target", str(hf), "--tokens", "32"]) == 0
    uneven = ["--to", "legacy", "--pp", "3", "--decoder-last-pipeline-num-layers", "2"]
    assert convert(["--source", str(hf), "--target", str(ranks), *uneven]) == 0
    assert convert(["--source", str(ranks), "--target", str(back)]) == 0
    assert contents(back) == contents(hf)


def test_the_plan_says_which_layers_each_rank_owns(
    made: tuple[Path, Steps, list[list[dict]]], capfd: pytest.CaptureFixture
) -> None:
    folder, *_ = made
    owned = {
        "--decoder-first-pipeline-num-layers 1": ["0", "1-3"],
        "--decoder-last-pipeline-num-layers 1": ["0-2", "3"],
        f"--vpp 2 {splits.LAYOUT} Ett|t||tL": ["0-1", "2-3"],
        f"--vpp 2 {splits.LAYOUT} Et|t|t|tL": ["0,2", "1,3"],
        f"{splits.LAYOUT} E|t*4L": ["", "0-3"],
    }
    for words, layers in owned.items():
        plan = ["--pp", "2", "--world-size", "2", "--dry-run", "--dry-run-rank", "0", *words.split()]
        capfd.readouterr()
        assert pretrain([*trainer_runs.arguments(folder, "qwen3", "new"), *plan]) == 0
        found = json.loads(capfd.readouterr().out)
        assert [rank["layers"] for rank in found["ranks"]] == layers
        assert found["built"]["parameters"] == found["ranks"][0]["parameters"]
