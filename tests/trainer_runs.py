"""Data, models and starts that the tests of the trainer share."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from model_folders import make, soften

from megapatch.models.family import known
from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer
from megapatch.trainer.pretrain import main

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # any free port
WORDS = "--train-iters 4 --seq-length 32 --global-batch-size 8 --micro-batch-size 2 --lr 1e-3 --timeout-s 300"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
VOCABULARY = 511  # odd: tensor parallelism does not divide it


def corpus(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A tokenizer in FOLDER/tokenizer and data at FOLDER/data, of text that never changes."""
    chance = random.Random(0)
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))) for _ in range(400)]
    often = [1 / rank for rank in range(1, 401)]  # as in natural text
    text = [str(folder / f"text{n:02}.txt") for n in range(20)]
    for path in text:
        lines = (" ".join(chance.choices(words, often, k=12)) for _ in range(60))
        Path(path).write_text("\n".join(lines))
    size = ["--vocab-size", str(vocabulary), "--output", str(folder / "tokenizer")]
    assert train_tokenizer(["--input", *text, *size]) == 0
    return data(folder, "data", text)


def data(folder: Path, name: str, files: list[str], tokenizer: str = "tokenizer") -> Path:
    """The prefix FOLDER/NAME of data made of these files."""
    made = ["--workers", "1", "--output-prefix", str(folder / name)]
    assert preprocess(["--input", *files, "--tokenizer", str(folder / tokenizer), *made]) == 0
    return folder / name


def model(folder: Path, name: str, family: str = "qwen3", **changes: Any) -> Path:
    """A tiny Hugging Face folder of the corpus's vocabulary, without a tokenizer."""
    key = known()[family].vocab_size
    assert isinstance(key, str)
    made = soften(make(folder / name, family, dtype=torch.float32, **{key: VOCABULARY} | changes))
    for stand_in in ("tokenizer.json", "chat_template.jinja"):
        (made / stand_in).unlink()
    return made


def arguments(folder: Path, name: str, save: str, extra: str = "") -> list[str]:
    """mp-pretrain arguments for the model FOLDER/NAME, saved in FOLDER/SAVE."""
    where = {"--model": name, "--tokenizer": "tokenizer", "--data-path": "data", "--save": save}
    paths = [word for flag, path in where.items() for word in (flag, str(folder / path))]
    return [*paths, "--data-cache-path", str(folder / "cache"), *WORDS.split(), *extra.split()]


def launch(
    processes: int, cases: dict[str, Any], folder: Path, program: str = "train_worker.py"
) -> dict[str, list[dict]]:
    """Run training cases in so many processes (tests/train_worker.py, or one like it); the log records of each."""
    given, results = folder / f"cases{processes}.json", folder / f"results{processes}.json"
    given.write_text(json.dumps(cases))
    worker = [str(ROOT / "tests" / program), str(given), str(results)]
    start = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    ran = subprocess.run([*start, *worker], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    records = json.loads(results.read_text())
    results.unlink()
    return records


def error(records: list[dict]) -> str:
    """The last line of a failed case's traceback, empty where it did not fail."""
    return records[0]["text"].strip().splitlines()[-1] if records[0]["event"] == "error" else ""


def steps(*parts: list[dict]) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of each step of consecutive runs."""
    assert not any(map(error, parts)), [error(part) for part in parts]
    found = [r for records in parts for r in records if r["event"] == "train"]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in found]


def log_of(save: Path) -> list[dict]:
    """The records of a run's JSON-lines log."""
    return [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]


def train(folder: Path, save: str, extra: str = "", kind: str = "dense") -> list[dict]:
    """Run to the end in this process; the records of the log."""
    assert main(arguments(folder, kind, save, extra)) == 0
    return log_of(folder / save)


def events(records: list[dict], kind: str) -> list[dict]:
    """The records of one kind."""
    return [record for record in records if record["event"] == kind]
