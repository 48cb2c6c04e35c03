"""mp-pretrain through main([...]) on real files: what it refuses, and what its options do."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from trainer_runs import ROOT, arguments, corpus, data, events, log_of, model, steps, train

from megapatch.trainer.pretrain import main

LR = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pretrain")
    corpus(made)
    model(made, "dense")
    model(made, "mixture", "qwen3_moe")
    return made


REFUSED = {  # what: (options, exit status, part of the message)
    "model and random weights": ("--init-from X", 2, "give one of --model"),
    "run in the model's folder": ("--save DIR/dense", 2, "--save"),
    "schedule without its length": ("--lr-schedule wsd", 2, "--lr-schedule wsd and --lr-wsd-decay-iters need each oth"),
    "longer decay than steps": ("--lr-schedule wsd --lr-wsd-decay-iters 5", 2, "more than the 4 steps after --lr-warm"),
    "negative seed": ("--seed -1", 2, "--seed -1: must be 0 or more"),
    "clipping that turns the gradient": ("--clip-grad -1", 2, "--clip-grad -1.0: must be 0 or more"),
    "rate without end": ("--lr inf", 2, "--lr inf: must be above 0"),
    "running mean that grows": ("--adam-beta1 1.5", 2, "--adam-beta1 1.5: must be at least 0 and below 1"),
    "negative decay": ("--weight-decay -1", 2, "--weight-decay -1.0: must be 0 or more"),
    "decay before the start": ("--lr-decay-iters -3", 2, "--lr-decay-iters -3: must be at least 1"),
    "profile after the end": ("--profile-steps 5:9", 2, "--profile-steps 5:9: the run ends with step 4"),
    "typo": ("--valid-dta DIR/data", 2, "unrecognized arguments: --valid-dta"),
    "warm-up to the end": ("--lr-warmup-iters 4", 2, "must be below 4"),
    "overlap without its parts": ("--overlap-param-gather", 2, "needs --use-distributed-optimizer"),
    "batch that does not divide": ("--global-batch-size 3", 1, "--global-batch-size 3 is not divisible"),
    "heads that do not divide": ("--tp 3", 1, "--tp 3 does not divide the 4 attention heads"),
    "layers that do not divide": ("--pp 3", 1, "--pp = 3 does not divide the 4 layers"),
    "experts of a dense model": ("--ep 2", 1, "--ep 2: the model of config.json has no experts"),
    "more processes than there are": ("--tp 2", 1, "does not divide the number of processes, 1"),
    "sequences too long": ("--seq-length 128", 1, "--seq-length 128 is longer than max_position_embeddings"),
    "more layers again than there are": (
        "--recompute full --recompute-layers 5",
        1,
        "--recompute-layers 5: a stage or chunk has 4 layers; give at most 4, or leave it away for all",
    ),
    "no data": ("--data-path DIR/none", 1, "none.idx: no such file"),
    "no model": ("--model DIR/none", 1, "none"),
    "no tokenizer": ("--tokenizer DIR/none", 1, "none: no such folder; expected one with tokenizer.json"),
    "tokenizer too large": ("--tokenizer DIR/large", 1, "has 700 tokens, the model's vocabulary 511"),
    "data of another tokenizer": ("--data-path DIR/other", 1, "other: made with another tokenizer than"),
    "data without their end": ("--data-path DIR/cut", 1, "cut.bin: 100 bytes found"),
    "split of words": ("--split a,b", 1, "--split a,b: expected up to three shares"),
    "split without training": ("--split 0,1", 1, "leaves nothing to train on"),
    "split too fine": ("--split 9999,1 --eval-interval 1", 1, "0 of its"),
    "no share to validate with": ("--split 1 --eval-interval 1", 1, "leaves nothing to validate with"),
    "half a blend": ("--data-path 0.5 DIR/data 0.5", 1, "3 words; a blend needs WEIGHT PREFIX pairs"),
    "weight of nothing": ("--data-path 0 DIR/data 1 DIR/data", 1, "weight 0.0 of"),
    "no GPU": ("--device gpu", 1, "--device gpu: torch sees no GPU"),
    "no Weights & Biases": ("--wandb project", 1, "pip install 'megapatch[wandb]'"),
    "missing weight": ("--model DIR/missing", 1, "model.norm.weight is missing"),
    "weight too many": ("--model DIR/extra", 1, "surplus.weight has no rule"),
    "wrong shape": ("--model DIR/shape", 1, "model.norm.weight: shape [31] in model.safetensors, [32]"),
}


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> Path:
    """Folders and data with something wrong."""
    text = [str(ROOT / "models" / "cli.py")]
    large = folder / "for-large"
    large.mkdir()
    corpus(large, vocabulary=700)
    (large / "tokenizer").rename(folder / "large")
    data(folder, "other", text, "large")
    data(folder, "cut", text)
    os.truncate(folder / "cut.bin", 100)
    norm = "model.norm.weight"
    for name in ("missing", "extra", "shape"):
        shutil.copytree(folder / "dense", folder / name)
        weights = load_file(folder / name / "model.safetensors")
        changed = {
            "missing": {key: value for key, value in weights.items() if key != norm},
            "extra": weights | {"surplus.weight": torch.ones(1)},
            "shape": weights | {norm: weights[norm][1:].clone()},
        }[name]
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line(spoiled: Path, capfd: pytest.CaptureFixture, case: str) -> None:
    extra, status, message = REFUSED[case]
    words = arguments(spoiled, "dense", "refused", extra.replace("DIR", str(spoiled)))
    try:
        found = main(words)
    except SystemExit as stop:  # argparse
        found = int(stop.code or 0)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert found == status
    assert last.startswith("mp-pretrain: error: ") and message in last
    assert not (spoiled / "refused").exists() or not list((spoiled / "refused").glob("iter_*"))


def cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


SCHEDULES = {  # options: lr of the step that comes after n steps, of 10 with 3 of warm-up
    "--lr-schedule cosine --min-lr 1e-4": lambda n: 1e-4 + 9e-4 * cosine((n - 3) / 7),
    "--lr-schedule linear --min-lr 1e-4": lambda n: 1e-4 + 9e-4 * (1 - (n - 3) / 7),
    "--lr-schedule wsd --lr-wsd-decay-iters 4": lambda n: LR * (cosine((n - 6) / 4) if n > 6 else 1),
    "--lr-schedule constant": lambda n: LR,
    "--lr-schedule cosine --lr-decay-iters 6 --min-lr 1e-5": lambda n: 1e-5 + (LR - 1e-5) * cosine(min(n - 3, 3) / 3),
}


@pytest.mark.parametrize("options", SCHEDULES)
def test_the_learning_rate_follows_its_formula(folder: Path, tmp_path: Path, options: str) -> None:
    short = "--train-iters 10 --lr-warmup-iters 3 --global-batch-size 2 --seq-length 8"
    records = train(folder, str(tmp_path / "run"), f"{short} {options}")
    expected = [LR * n / 3 if n <= 3 else SCHEDULES[options](n) for n in range(10)]
    assert [r["lr"] for r in events(records, "train")] == pytest.approx(expected, rel=1e-12)


def test_accumulation_equals_a_larger_micro_batch(folder: Path, tmp_path: Path) -> None:
    one, *others = (
        steps(train(folder, str(tmp_path / str(width)), f"--micro-batch-size {width}")) for width in (8, 4, 1)
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=2e-6)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("options", ["--recompute full --recompute-layers 2", "--recompute selective"])
def test_recomputed_activations_give_the_same_bits(folder: Path, tmp_path: Path, kind: str, options: str) -> None:
    assert steps(train(folder, str(tmp_path / "a"), options, kind)) == steps(
        train(folder, str(tmp_path / "b"), "", kind)
    )


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_evaluation_leaves_training_as_it_is(folder: Path, tmp_path: Path, kind: str) -> None:
    plain = train(folder, str(tmp_path / "plain"), "--split 80,20", kind)
    options = "--split 80,20 --eval-interval 2 --eval-iters 2"
    with_evaluation = train(folder, str(tmp_path / "eval"), options, kind)
    assert steps(plain) == steps(with_evaluation)
    assert [r["step"] for r in events(with_evaluation, "eval")] == [0, 2, 4]
    losses = [r["loss"] for r in events(with_evaluation, "eval")]
    assert len(set(losses)) == 3 and all(5 < loss < 8 for loss in losses)


def test_the_norm_is_reported_before_clipping(folder: Path, tmp_path: Path) -> None:
    free, wide, tight = (
        steps(train(folder, str(tmp_path / f"{limit}"), f"--clip-grad {limit} --adam-eps 1"))
        for limit in ("0", "1e9", "0.1")
    )
    assert free == wide
    assert tight[0] == free[0] and tight[0][2] > 1
    assert tight[1][1] != free[1][1]


def test_norms_and_biases_have_no_weight_decay(folder: Path, tmp_path: Path) -> None:
    from megapatch.models import cli, device, parallel
    from megapatch.trainer.options import PretrainOptions
    from megapatch.trainer.pretrain import make_plan, prepare

    words = arguments(folder, "dense", str(tmp_path / "run"), "--weight-decay 0.3")
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words)
    trainer, records = prepare(options, device.start(), make_plan(options))
    groups = trainer.session.optimizer.param_groups
    found = {(parameter.dim(), group["weight_decay"]) for group in groups for parameter in group["params"]}
    records.close()
    parallel.stop()
    assert found == {(1, 0.0), (2, 0.3)}


def test_keep_leaves_the_newest_checkpoints_and_those_ahead(folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    train(folder, str(save), "--save-interval 1 --keep 2")
    assert [path.name for path in sorted(save.glob("iter_*"))] == ["iter_0000003", "iter_0000004"]
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    train(folder, str(save), "--save-interval 1 --keep 1")
    assert [path.name for path in sorted(save.glob("iter_*"))] == ["iter_0000004"]


def test_keep_may_remove_the_checkpoint_that_the_run_came_from(folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    train(folder, str(save), "--train-iters 1")
    train(folder, str(save), "--save-interval 1 --keep 1")
    assert [path.name for path in sorted(save.glob("iter_*"))] == ["iter_0000004"]
    assert {path.name for path in (save / "iter_0000004" / "hf").iterdir()} >= {"config.json", "tokenizer.json"}


def test_a_dry_run_describes_and_starts_nothing(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    save = tmp_path / "run"
    assert main(arguments(folder, "mixture", str(save), "--dry-run --ep 2 --pp 2 --micro-batch-size 1")) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["layout"] == {
        "tp": 1, "pp": 2, "vpp": None, "cp": 1, "ep": 2, "expert_tp": 1, "data_parallel_size": 4, "world_size": 8
    }  # fmt: skip
    assert (found["micro_batches_per_step"], found["tokens_per_step"]) == (2, 256)
    weights = load_file(folder / "mixture" / "model.safetensors")
    assert found["parameters"] == sum(weight.numel() for weight in weights.values())
    assert not save.exists() and not dist.is_initialized()


def test_log_interval_thins_the_talk_not_the_log(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    records = train(folder, str(tmp_path / "run"), "--log-interval 3")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mp-pretrain: step ")]
    assert [line.split()[2] for line in said] == ["3/4", "4/4"]
    assert len(events(records, "train")) == 4


def test_random_weights_learn(folder: Path, tmp_path: Path) -> None:
    words = arguments(folder, "dense", str(tmp_path / "run"), "--train-iters 30 --lr 1e-2 --global-batch-size 16")
    shutil.copyfile(folder / "dense" / "config.json", tmp_path / "small.json")
    words[words.index("--model") : words.index("--model") + 2] = ["--init-from", str(tmp_path / "small.json")]
    assert main(words) == 0
    assert (tmp_path / "run" / "iter_0000030" / "hf" / "config.json").is_file()
    losses = [r["loss"] for r in events(log_of(tmp_path / "run"), "train")]
    assert losses[0] == pytest.approx(math.log(511), abs=0.05)
    assert losses[-1] < losses[0] - 0.7
