"""The evaluation after the last step: its result lies in SAVE/test.json, by which a run knows that it is done."""

import json
from pathlib import Path
from typing import Any

from megapatch.models import commit
from megapatch.trainer.options import TrainOptions

DECIDES = (
    "train_iters",
    "eval_iters",
    "global_batch_size",
    "seq_length",
    "data_path",
    "data",
    "test_data_path",
    "test_data",
    "split",
)


def _path(options: TrainOptions) -> Path:
    return options.save / "test.json"


def _about(options: TrainOptions) -> dict[str, Any]:
    return {name: getattr(options, name, None) for name in DECIDES}


def done(options: TrainOptions) -> bool:
    """Is it made, with these data, or not asked for? A run that was cut off before it goes on with it."""
    path = _path(options)
    return not options.tests or (path.exists() and json.loads(path.read_bytes())["options"] == _about(options))


def write(options: TrainOptions, step: int, loss: float) -> None:
    """Make the result durable."""
    with commit.staged_file(_path(options)) as stage:
        stage.write_text(json.dumps({"step": step, "loss": loss, "options": _about(options)}, indent=1) + "\n")
