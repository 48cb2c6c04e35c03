"""A run that is killed and resumed: TensorBoard shows each step once; what has changed is said, or refused."""

from pathlib import Path

import pytest
from trainer_runs import arguments, corpus, error, launch, log_of, model, steps

from megapatch.trainer.pretrain import main
from megapatch.trainer.saving import changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps that was killed after its fourth, two after its checkpoint, and went on."""
    made = tmp_path_factory.mktemp("changed")
    corpus(made)
    model(made, "dense")
    words = f"--save-interval 2 --train-iters 5 --tensorboard {made / 'board'} --split 80,20 --eval-interval 1"
    given = arguments(made, "dense", "run", words)
    runs = launch(1, {"killed": {"arguments": given, "kill": {"save": 4}}, "rest": given}, made)
    assert error(runs["killed"]) == "killed by signal 9"
    assert [step for step, *_ in steps(runs["rest"])] == [3, 4, 5]
    return made


def test_tensorboard_shows_each_step_of_a_killed_run_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [r["step"] for r in log_of(folder / "run") if r["event"] == "train"] == [1, 2, 3, 4, 3, 4, 5]
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    for tag in board.Tags()["scalars"]:
        expected = [0, 1, 2, 3, 4, 5] if tag.startswith("eval/") else [1, 2, 3, 4, 5]
        assert [point.step for point in board.Scalars(tag)] == expected, tag


CHANGED = {  # option: what is said of it
    "--train-iters 6": "--train-iters was 5, now 6: the order of data changes, and with it the decay",
    "--clip-grad 0.5": "--clip-grad was 1.0, now 0.5: steps from here on change the weights otherwise",
    "--adam-beta2 0.9": "--adam-beta2 was 0.95, now 0.9: steps",
    "--weight-decay 0": "--weight-decay was 0.1, now 0.0: steps",
    "--lr 5e-4": "--lr was 0.001, now 0.0005: the learning rate goes on along another curve",
    "--lr-decay-iters 9": "--lr-decay-iters was not given, now 9: the learning rate",
    "--seed 7": "--seed was 1234, now 7: the order of data changes",
    "--micro-batch-size 4": "--micro-batch-size was 2, now 4: sums are rounded otherwise",
    "--eod-mask-loss": "--eod-mask-loss was False, now True: steps from here on lower another loss",
}


def test_a_resumed_run_says_what_changes_its_course_and_nothing_else(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unseen = "--split 80,20 --log-interval 5 --save-interval 1 --recompute full --max-nan 3"
    assert main(arguments(folder, "dense", "run", f"{' '.join(CHANGED)} {unseen}")) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if " was " in line]
    assert len(told) == len(CHANGED)
    for expected in CHANGED.values():
        assert sum(expected in line for line in told) == 1, (expected, told)
    assert main(arguments(folder, "dense", "run", f"{' '.join(CHANGED)} {unseen} --train-iters 7")) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if " was " in line]
    assert len(told) == 1 and "--train-iters was 6, now 7" in told[0]


def test_a_checkpoint_that_remembers_fewer_options_is_silent_about_the_others() -> None:
    class Options:
        seed, clip_grad, no_packing = 1, 0.5, True

    assert list(changes.told({"seed": 2, "packing": True}, Options())) == [
        "--seed was 2, now 1: the order of data changes"
    ]


def test_adapters_are_not_added_to_a_run_that_began_without(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "dense", "run", "--split 80,20 --train-iters 9 --lora-rank 4")) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"mp-pretrain: error: --lora-rank 4: {folder / 'run'}/iter_000000")
    assert "is of a run without adapters, which cannot go on with them; train them beside its weights with" in last
