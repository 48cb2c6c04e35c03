"""mp-pretrain straight from text: the bytes of mp-preprocess, made once; and the evaluation after the last step."""

import gzip
import json
from pathlib import Path

import pytest
import trainer_runs
from trainer_runs import arguments, corpus, events, log_of, model

from megapatch.models import cli, core_files
from megapatch.models.indexed_data import bin_path, idx_path
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer import signals
from megapatch.trainer.data import made_data, named_data
from megapatch.trainer.loop import Trainer
from megapatch.trainer.options import PretrainOptions
from megapatch.trainer.pretrain import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same kind of text as JSON lines, compressed ones, and a file that is one document."""
    made = tmp_path_factory.mktemp("direct")
    corpus(made)
    model(made, "dense")
    text = [path.read_text() for path in sorted(made.glob("text*.txt"))]
    for name, some in {"a": text[:12], "b": text[12:]}.items():
        lines = "".join(json.dumps({"text": one}) + "\n" for one in some)
        (made / f"{name}.jsonl").write_text(lines)
        (made / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        trainer_runs.data(made, name, [str(made / f"{name}.jsonl")])
    return made


def words(folder: Path, save: Path, data: str, extra: str = "") -> list[str]:
    """Arguments of mp-pretrain with these data in place of --data-path; {} is the folder."""
    given = arguments(folder, "dense", str(save), extra)
    at = given.index("--data-path")
    return [*given[:at], *given[at + 2 :], *data.replace("{}", str(folder)).split()]


def parsed(given: list[str]) -> PretrainOptions:
    return cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(given)


FILES = {  # files -> the same for mp-preprocess
    "{}/a.jsonl": ["a.jsonl"],
    "{}/a.jsonl.gz {}/b.jsonl {}/text00.txt": ["a.jsonl", "b.jsonl", "text00.txt"],
}


@pytest.mark.parametrize("named", FILES)
def test_the_bytes_are_those_of_mp_preprocess(folder: Path, tmp_path: Path, named: str) -> None:
    from megapatch.trainer.data import gpt_data

    expected = trainer_runs.data(folder, "expected", [str(folder / name) for name in FILES[named]])
    options = parsed(words(folder, tmp_path, f"--data {named} --workers 2"))
    tokenizer, what = Tokenizer(folder / "tokenizer"), named_data.named(options, "training")
    (prefix,) = named_data.checkable(options, what, gpt_data._maker(options), tokenizer)
    assert bin_path(prefix).read_bytes() == bin_path(expected).read_bytes()
    assert idx_path(prefix).read_bytes() == idx_path(expected).read_bytes()
    for path in folder.glob("expected.*"):
        path.unlink()


EARLY = {  # arguments beside --data {}/a.jsonl -> what is said
    "--seq-length 128": "--seq-length 128 is longer than max_position_embeddings of config.json, 64",
    "--global-batch-size 3": "--global-batch-size 3 is not divisible",
    "--recompute full --recompute-layers 5": "--recompute-layers 5: a stage or chunk has 4 layers",
    "--recompute selective --recompute-modules moe": "--recompute-modules moe: the model of config.json has no experts",
    "--moe-z-loss-coeff 1": "--moe-z-loss-coeff: the model of config.json has no experts",
    "--mtp-loss-weight 0.1": "--mtp-loss-weight: the model of config.json has no layers for multi-token prediction",
    "--device-memory-gib 0.001": "--device-memory-gib 0.001: the estimate is ",
    "--lora-rank 2 --lora-targets w1": "--lora-targets w1: the model has ",
    "--offload-activations 9": "--offload-activations 9: a stage or chunk has 4 layers",
    "--wandb project": "pip install 'megapatch[wandb]'",
    "--fp8 hybrid --precision bf16": "only Transformer Engine multiplies in FP8",
    "--test-data {}/none.jsonl": "none.jsonl: no such file",
}


@pytest.mark.parametrize("extra", EARLY)
def test_what_config_json_and_options_decide_is_refused_before_files_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], extra: str
) -> None:
    monkeypatch.setattr(made_data, "_run", lambda command, lock: pytest.fail("read"))
    given = words(folder, tmp_path, "--data {}/a.jsonl", f"--data-cache-path {tmp_path}/cache")
    assert main([*given, *extra.replace("{}", str(folder)).split()]) != 0
    assert EARLY[extra] in capfd.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def losses(save: Path) -> list[tuple[str, float]]:
    return [(r["event"], r["loss"]) for r in log_of(save) if r["event"] in ("train", "eval", "test")]


def test_training_on_files_is_training_on_what_mp_preprocess_makes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"--eval-interval 2 --eval-iters 1 --data-cache-path {tmp_path}/cache"
    files = "--data 0.7 {}/a.jsonl 0.3 {}/b.jsonl --valid-data {}/b.jsonl --test-data {}/a.jsonl"
    pairs = "--data-path 0.7 {}/a 0.3 {}/b --valid-data-path {}/b --test-data-path {}/a"
    made: list[list[str]] = []
    real = made_data._run
    monkeypatch.setattr(made_data, "_run", lambda command, lock: made.append(command) or real(command, lock))
    assert main(words(folder, tmp_path / "files", files, more)) == 0
    (tmp_path / "files" / "test.json").unlink()
    assert main(words(folder, tmp_path / "files", files, more)) == 0
    assert len(made) == 2  # not again for what is validated and tested with, nor for the run that was resumed
    assert main(words(folder, tmp_path / "pairs", pairs, more)) == 0
    *found, again = losses(tmp_path / "files")
    assert [event for event, _ in found] == ["eval", "train", "train", "eval", "train", "train", "eval", "test"]
    assert found == losses(tmp_path / "pairs") and again == found[-1]


def test_what_is_tested_after_the_last_step_is_kept_and_not_done_again(folder: Path, tmp_path: Path) -> None:
    given = words(folder, tmp_path, "--data-path {}/data --split 80,10,10")
    assert main(given) == 0
    (first,) = events(log_of(tmp_path), "test")
    assert (first["step"], first["split"]) == (4, "test")
    kept = json.loads((tmp_path / "test.json").read_text())
    assert (kept["step"], kept["loss"]) == (4, first["loss"])
    assert main(given) == 0
    assert len(events(log_of(tmp_path), "start")) == 1
    (tmp_path / "test.json").unlink()  # as where the run is killed after its last checkpoint
    assert main(given) == 0
    assert [(r["step"], r["loss"]) for r in events(log_of(tmp_path), "test")] == [(4, first["loss"])] * 2
    assert len(events(log_of(tmp_path), "train")) == 4
    other = words(folder, tmp_path, "--data-path {}/data --split 80,10 --test-data-path {}/b")
    assert main(other) == 0
    assert events(log_of(tmp_path), "test")[-1]["loss"] != first["loss"]


def test_a_resumed_run_tells_that_its_data_are_others(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file, run, message = tmp_path / "text.jsonl", tmp_path / "run", ": not the data of the run so far: some may be"
    file.write_text((folder / "a.jsonl").read_text())
    given = words(folder, run, f"--data {file}", "--save-interval 2 --lr 1e-5")
    for text, told in {"": False, '{"text": "another document"}\n': True}.items():
        assert main(given) == 0
        core_files.write_tracker(run, 2)
        file.write_text(file.read_text() + text)
        capfd.readouterr()
        assert main(given) == 0
        said = capfd.readouterr().err
        assert (message in said) == told, said
        assert "resuming from" in said


def test_it_is_the_loss_that_validation_on_the_same_data_has(folder: Path, tmp_path: Path) -> None:
    given = "--data-path {}/a --valid-data-path {}/b --test-data-path {}/b --eval-interval 4"
    assert main(words(folder, tmp_path, given)) == 0
    records = log_of(tmp_path)
    assert events(records, "test")[0]["loss"] == events(records, "eval")[-1]["loss"]


def test_a_signal_while_it_is_tested_asks_for_another_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(folder, tmp_path / "run", "--data-path {}/data --split 80,10,10")
    real = Trainer.save

    def save(self: Trainer, **how: bool) -> None:
        real(self, **how)
        signals._asked.append(10)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        assert main([*given, "--requeue-file", str(tmp_path / "requeue")]) == 0
    signals.forget()
    assert (tmp_path / "requeue").exists() and not events(log_of(tmp_path / "run"), "test")
    assert log_of(tmp_path / "run")[-1]["reason"] == "signal 10"
    assert main(given) == 0
    assert len(events(log_of(tmp_path / "run"), "test")) == 1


REFUSED = {  # arguments -> what is said
    "": "give one of --data-path (made by mp-preprocess) and --data (files of text)",
    "--data {}/a.jsonl --data-path {}/a": "give one of --data-path",
    "--data-path {}/a --workers 2": "--workers is for --data; give it to mp-preprocess",
    "--data-path {}/a --test-data-path {}/b --test-data {}/b.jsonl": "--test-data-path and --test-data: give one",
    "--data-path {}/a --valid-data-path {}/b --valid-data {}/b.jsonl": "--valid-data-path and --valid-data: give one",
    "--data-path {}/a --valid-data {}/b.jsonl --split 98,2": "--split and --valid-data-path: give one",
    "--data {}/nothing.jsonl": "nothing.jsonl: no such file; --data takes files, by themselves or as WEIGHT FILE",
    "--data 0.5 {}/a.jsonl 0.5": "--data: 3 words; a blend needs WEIGHT PREFIX pairs",
    "--data-path {}/a --split 8,1,1 --test-data {}/b.jsonl": "--split 8,1,1: its third share and --test-data-path, or",
    "--data {}/torn.jsonl": "torn.jsonl: mp-preprocess ended with status 1; it said why above",
}


@pytest.mark.parametrize("data", REFUSED)
def test_it_is_refused_in_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], data: str) -> None:
    (folder / "torn.jsonl").write_text('{"text": "whole"}\n{"text": ')
    try:
        status = main(words(folder, tmp_path / "run", data))
    except SystemExit as wrong_usage:
        status = int(str(wrong_usage.code))
    lines = capfd.readouterr().err.strip().splitlines()
    assert status in (1, 2) and REFUSED[data] in lines[-1], lines
    assert not list(tmp_path.glob("run/iter_*"))


def test_a_dry_run_reads_no_files(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, tmp_path / "run", "--data {}/a.jsonl", "--dry-run")) == 0
    assert json.loads(capfd.readouterr().out)["options"]["data"] == [str(folder / "a.jsonl")]
    assert not (tmp_path / "run").exists()
