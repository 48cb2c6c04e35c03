"""Runs mp-pretrain many times in forks of one process that has imported everything; started by tests.

    kill_worker.py cases.json results.json

cases.json: a list of {"arguments": [...]} and, when wanted,
    "signal": [n, t]      signal n, once the process has used so many seconds of a processor: however busy the machine
    "in_save": [name, n, what]  in a thread that writes a checkpoint, at its n-th call of one of OWNERS: kill -9, or an
                          error of the system, by its number
    "one_step": true      a signal comes before the first step: one step, and a checkpoint
results.json: a list of {"status": exit status, negative: the signal, "cpu_s", "said": stderr}.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from megapatch.models import commit, core_files, device

device.start()  # before megatron-core is imported

from megapatch.trainer import loop, pretrain, signals  # noqa: E402, F401
from megapatch.trainer.data import gpt_data  # noqa: E402, F401
from megapatch.trainer.saving import writing  # noqa: E402, F401

OWNERS = {
    "digest": commit,
    "seal": commit,
    "fsync": commit,
    "rename": os,
    "write_tracker": core_files,
    "rmtree": shutil,
}


def hitting(name: str, at: int, what: int | str) -> Any:
    """Count calls of what saves use, and at the given one end, or fail."""
    count, real = [0], getattr(OWNERS[name], name)

    def counted(*args: Any, **words: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            count[0] += 1
            if count[0] == at and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count[0] == at:
                raise OSError(what, os.strerror(int(what)))
        return real(*args, **words)

    return mock.patch.object(OWNERS[name], name, counted)


def child(case: dict, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if "in_save" in case:
        hitting(*case["in_save"]).start()
    if case.get("one_step"):
        mock.patch.object(signals, "asked", lambda: int(signal.SIGUSR1)).start()
    os._exit(pretrain.main(case["arguments"]))


def run(case: dict, said: Path) -> dict:
    pid = os.fork()
    if pid == 0:
        try:
            child(case, said)
        finally:
            os._exit(99)
    number, after_s = case.get("signal", (0, 0))
    while number and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if sum(psutil.Process(pid).cpu_times()[:2]) >= after_s:
            os.kill(pid, number)
            break
        time.sleep(0.003)
    _, status, used = os.wait4(pid, 0)
    found = {"status": os.waitstatus_to_exitcode(status), "cpu_s": used.ru_utime + used.ru_stime}
    return found | {"said": said.read_text()}


def main(cases: Path, results: Path) -> None:
    found = [run(case, results.with_suffix(".stderr")) for case in json.loads(cases.read_text())]
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
