"""Conversations, models and starts that the tests of mp-sft share."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chat_data
import torch
from model_folders import make, soften
from trainer_runs import ENVIRONMENT, ROOT, TORCHRUN

from megapatch.models import packing
from megapatch.models.family import known
from megapatch.models.indexed_data import read_index
from megapatch.tools.preprocess.preprocess_chat import main as preprocess_chat

ROW, ROWS = 128, 8
VOCABULARY = 723  # odd, and more than the tokenizer has
WORDS = f"--train-iters 4 --seq-length {ROW} --lr 1e-3 --micro-batch-size 1 --timeout-s 300"


def chats(number: int, *, weighted: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Short conversations of one or two questions and answers; ``weighted``: answers count differently."""
    chance = random.Random(seed)

    def turn(role: str) -> dict[str, Any]:
        said: dict[str, Any] = {"role": role, "content": " ".join(chance.choices("so what if it is true".split(), k=6))}
        return said | ({"weight": chance.choice([0.25, 1, 2])} if weighted and role == "assistant" else {})

    return [{"messages": [turn(r) for r in ("user", "assistant") * chance.randint(1, 2)]} for _ in range(number)]


def tokenizer(folder: Path) -> Path:
    """FOLDER/tokenizer with a template that has generation tags."""
    return chat_data.make_tokenizer(folder / "tokenizer", chat_data.CHATML, normalizer=None)


def data(folder: Path, name: str, records: list[dict[str, Any]], *extra: str) -> Path:
    """The prefix FOLDER/NAME of these conversations; their JSON lines are FOLDER/NAME.jsonl."""
    source = chat_data.write(folder / f"{name}.jsonl", records)
    made = ["--tokenizer", str(folder / "tokenizer"), "--output-prefix", str(folder / name), "--workers", "1"]
    assert preprocess_chat(["--input", str(source), *made, *extra]) == 0
    return folder / name


def filling(folder: Path, name: str, **words: Any) -> int:
    """Conversations at FOLDER/NAME that fill ROWS rows, also with context parallelism of 2 and 4; how many they are."""
    extra = ("--message-weights",) if words.get("weighted") else ()
    for seed in range(20):  # the tokenizer decides which of them there are
        records = chats(4 * ROWS, seed=seed, **words)
        lengths = packing.document_lengths(read_index(data(folder, f"{name}-all{seed}", records, *extra)))
        for number in range(4 * ROWS, 1, -2):
            if all(packing.make_plan(lengths[:number], ROW, multiple=m).num_rows == ROWS for m in (1, 4, 8)):
                data(folder, name, records[:number], *extra)
                return number
    raise AssertionError(f"no conversations that fill {ROWS} rows")


def model(folder: Path, name: str, family: str = "qwen3", **changes: Any) -> Path:
    """A tiny Hugging Face folder with the tokenizer of FOLDER."""
    key = known()[family].vocab_size
    assert isinstance(key, str)
    made = soften(
        make(
            folder / name,
            family,
            dtype=torch.float32,
            **{key: VOCABULARY, "max_position_embeddings": 2 * ROW} | changes,
        )
    )
    shutil.rmtree(made / "additional_chat_templates")
    for path in (folder / "tokenizer").iterdir():
        shutil.copy(path, made / path.name)
    return made


def arguments(folder: Path, name: str, save: str, extra: str) -> list[str]:
    """mp-sft arguments for the model FOLDER/NAME, saved in FOLDER/SAVE; {} in ``extra`` is FOLDER."""
    paths = ["--model", str(folder / name), "--save", str(folder / save)]
    return [*paths, *WORDS.split(), *extra.replace("{}", str(folder)).split()]


def launch(processes: int, cases: dict[str, Any], folder: Path) -> dict[str, list[dict]]:
    """Run cases in so many processes; the log records of each."""
    given, results = folder / f"cases{processes}.json", folder / f"results{processes}.json"
    given.write_text(json.dumps(cases))
    start = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    worker = [str(ROOT / "tests" / "sft_worker.py"), str(given), str(results)]
    ran = subprocess.run([*start, *worker], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(results.read_text())


def rows(prefix: Path) -> int:
    """Rows that these conversations are packed into."""
    return packing.pack(prefix, ROW).num_rows
