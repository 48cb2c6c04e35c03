"""Runs mp-pretrain many times in forks of one process that has imported everything; started by tests.

    kill_worker.py cases.json results.json

cases.json: a list of {"arguments": [...]} and, when wanted,
    "kill_after_s": t     kill -9, so many seconds after the fork
    "kill_in_save": n     kill -9 in a thread that writes a checkpoint: at the n-th of the calls below
    "one_step": true      a signal comes before the first step: one step, and a checkpoint
    "signal": [n, t]      signal n after t seconds
results.json: a list of {"status": exit status, negative: the signal, "seconds", "said": stderr}.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from megapatch.models import commit, core_files, device

device.start()  # before megatron-core is imported

from megapatch.trainer import data, loop, pretrain, saving, signals  # noqa: E402, F401

CALLS = [(commit, "digest"), (commit, "seal"), (commit, "fsync"), (os, "rename"), (core_files, "write_tracker")]


def killing(at: int) -> Any:
    """Count calls of what saves use, and end at the given one."""
    count, patches = [0], []
    for owner, name in CALLS:
        real = getattr(owner, name)

        def counted(*args: Any, real: Any = real, **words: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **words)

        patches.append(mock.patch.object(owner, name, counted))
    return patches


def child(case: dict, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for patch in killing(case["kill_in_save"]) if "kill_in_save" in case else []:
        patch.start()
    if case.get("one_step"):
        mock.patch.object(signals, "asked", lambda: int(signal.SIGUSR1)).start()
    os._exit(pretrain.main(case["arguments"]))


def run(case: dict, said: Path) -> dict:
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            child(case, said)
        finally:
            os._exit(99)
    number, after = (signal.SIGKILL, case["kill_after_s"]) if "kill_after_s" in case else case.get("signal", (0, 0))
    timer = threading.Timer(after, os.kill, (pid, number)) if number else None
    if timer:
        timer.start()
    _, status = os.waitpid(pid, 0)
    if timer:
        timer.cancel()
    found = {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
    return found | {"said": said.read_text()}


def main(cases: Path, results: Path) -> None:
    found = [run(case, results.with_suffix(".stderr")) for case in json.loads(cases.read_text())]
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
