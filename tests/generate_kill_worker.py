"""Runs mp-generate in forks of one process, kills them with -9 and goes on; started by tests.

    generate_kill_worker.py SEED OUTPUT ARGUMENT...

Kills a run at random times, most of them while rows are written, until one ends by itself; prints as JSON how often it
was killed, and how many rows each killed run left.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from megapatch.models import device

device.start()  # before megatron-core is imported

from megapatch.models.generation import engine  # noqa: E402, F401
from megapatch.tools.generate.generate import main  # noqa: E402


def attempt(output: Path, arguments: list[str], rows: int, more_s: float) -> int:
    """The status of a run that is killed a moment after it has written so many further rows."""
    partial = output.with_name(f"{output.name}.partial")
    before = partial.stat().st_size if partial.exists() else 0
    child = os.fork()
    if not child:
        os._exit(main([*arguments, "--output", str(output), "--resume"]))
    lines = 0
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if partial.exists():
            lines = partial.read_bytes()[before:].count(b"\n")
        if lines >= rows:
            time.sleep(more_s)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.001)


def work(seed: int, output: Path, arguments: list[str]) -> None:
    draw = random.Random(seed)
    left: list[int] = []
    while (status := attempt(output, arguments, draw.randrange(0, 6), draw.random() * 0.05)) == -signal.SIGKILL:
        partial = output.with_name(f"{output.name}.partial")
        left.append(partial.read_bytes().count(b"\n") if partial.exists() else 0)
    assert status == 0, status
    print(json.dumps(left))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
