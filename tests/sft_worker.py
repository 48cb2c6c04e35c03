"""tests/train_worker.py for mp-sft: cases.json holds its arguments."""

import sys
from functools import partial
from pathlib import Path

import train_worker

from megapatch.trainer.sft import FINE_TUNING
from megapatch.trainer.tuning.sft_options import SftOptions


def tunes() -> None:
    """From here on tests/train_worker.py does what mp-sft does."""
    train_worker.PretrainOptions = SftOptions
    train_worker.make_plan = partial(train_worker.make_plan, kind=FINE_TUNING)
    train_worker.prepare = partial(train_worker.prepare, kind=FINE_TUNING)


if __name__ == "__main__":
    tunes()
    train_worker.main(Path(sys.argv[1]), Path(sys.argv[2]))
