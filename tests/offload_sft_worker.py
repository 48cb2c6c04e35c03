"""tests/offload_worker.py for mp-sft: cases.json holds its arguments."""

import sys
from pathlib import Path
from unittest import mock

import offload_worker
import sft_worker
import train_worker

if __name__ == "__main__":
    sft_worker.tunes()
    with mock.patch.object(train_worker, "run_case", offload_worker.run_case):
        train_worker.main(Path(sys.argv[1]), Path(sys.argv[2]))
