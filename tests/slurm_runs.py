"""What the tests of the Slurm scripts share: a folder to train in, and what its log must say."""

import json
from pathlib import Path

from megapatch.tools.convert.new_model import main as new_model
from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "slurm"
STEPS = 400
TEXT = [str(path) for path in sorted((ROOT / "models").glob("*.py"))]
SIZES = (
    "hidden_size=32 intermediate_size=64 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=2 head_dim=16"
)


def make(folder: Path) -> Path:
    """A tokenizer, data, a tiny model, and train.args, in ``folder``."""
    tokenizer, model = str(folder / "tokenizer"), str(folder / "model")
    assert train_tokenizer(["--input", *TEXT, "--vocab-size", "300", "--output", tokenizer]) == 0
    assert preprocess(["--input", *TEXT, "--tokenizer", tokenizer, "--output-prefix", str(folder / "data")]) == 0
    sizes = ["--dtype", "fp32", "--set", *SIZES.split()]
    assert new_model(["--model-type", "qwen3", "--tokenizer", tokenizer, "--target", model, *sizes]) == 0
    train = f"--data-path data --split 100,0,0 --seq-length 32 --global-batch-size 2 --train-iters {STEPS}\n"
    (folder / "train.args").write_text(f"--model model {train}--lr 1e-3 --timeout-s 60 --log-interval 100\n")
    return folder


def events(folder: Path) -> list[dict]:
    """The records of the run's log, without a line that is being written."""
    lines = (folder / "run" / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(folder: Path) -> list[int]:
    """The steps of the log, in its order; of a step that was made twice, the last time."""
    made = [record["step"] for record in events(folder) if record["event"] == "train"]
    return [step for i, step in enumerate(made) if step not in made[i + 1 :]]


def check_resumed_run(folder: Path) -> None:
    """Two processes trained, left after a signal, resumed at that step, and did every step once."""
    found = events(folder)
    starts = [record for record in found if record["event"] == "start"]
    ends = [record for record in found if record["event"] == "end"]
    assert [record["world_size"] for record in starts] == [2, 2]
    assert [record["reason"] for record in ends] == ["signal 10", "done"]
    assert starts[0]["resumed_from"] is None and starts[1]["resumed_from"] == ends[0]["step"]
    assert [record["step"] for record in found if record["event"] == "train"] == list(range(1, STEPS + 1))
