"""mp-convert with a fault at its n-th change of the disk, for every n: a process without torch that forks for each.

    python convert_faults.py '{"source": ..., "old": null or a folder, "fault": "kill", "kept_bytes": 1, "work": ...}'

prints a line of JSON for each n. fsync is counted but not done: a fault of the power is not part of this.
"""

import errno
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megapatch.models import cli, commit
from megapatch.tools.convert import execute, journal
from megapatch.tools.convert.convert import main

CHANGES = "write fsync fdatasync rename replace mkdir unlink rmdir ftruncate"
FAILING = ("write", "fsync", "fdatasync", "rename", "replace", "mkdir", "ftruncate", "_exchange", "open")
BY_NUMBER = ("write", "fsync", "fdatasync", "ftruncate")  # of an open file
NOT_MET = 64  # added to the exit status
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EIO for good": errno.EIO}


class Fault:
    """Counts the changes; at number ``at`` it kills the process or raises, and counts no more or goes on raising."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.left = kind, at

    def patched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """``real``, with the fault."""

        def change(*args: Any, **named: Any) -> Any:
            if name == "open" and not set(str(args[1] if len(args) > 1 else named.get("mode", "r"))) & set("wxa"):
                return real(*args, **named)
            if self.kind == "kill" or name in FAILING:
                self.left -= 1
                if self.left == 0 and self.kind == "kill":
                    if name == "write":
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os._exit(9)
                if self.left == 0 or (self.left < 0 and self.kind == "EIO for good"):
                    path = None if name in BY_NUMBER else args[0]
                    raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), *([str(path)] if path else []))
            return None if name in ("fsync", "fdatasync") else real(*args, **named)

        return change

    def install(self) -> None:
        """In this process, for good."""
        for name in CHANGES.split():
            setattr(os, name, self.patched(name, getattr(os, name)))
        io.open = self.patched("open", io.open)  # pathlib's
        commit._exchange = self.patched("_exchange", commit._exchange)


def forked(argv: list[str], stderr: Path, kept_bytes: int, fault: Fault) -> int:
    """Exit status of mp-convert in a child."""
    child = os.fork()
    if child == 0:
        journal.NOTED_BYTES, journal.KEPT_BYTES, execute._FLUSH_S = 0, kept_bytes, 1e9
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fault.install()
        status = 70
        try:
            status = main(argv) + (NOT_MET if fault.left > 0 else 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, str]:
    """The digest of each file."""
    return {p.relative_to(folder).as_posix(): commit.digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def steps(source: str, old: str | None, fault: str, kept_bytes: int, work: Path) -> Iterator[dict[str, Any]]:
    """What is there after a fault at each change, and after the same command again."""
    for step in itertools.count(1):
        place = work / f"{fault}-{kept_bytes}-{step}"
        target, said = place / "out", place / "stderr"
        place.mkdir(parents=True)
        if old:
            shutil.copytree(old, target)
        argv = ["--source", source, "--target", str(target), "-j", "1", *(["--force"] if old else [])]
        status = forked(argv, said, kept_bytes, Fault(fault, step))
        first, told = tree(place), said.read_text()
        again = forked(argv, said, kept_bytes, Fault("none", 0)) if status not in (0, NOT_MET) else 0
        yield {
            "step": step,
            "status": status,
            "told": told,
            "first": first,
            "again": again,
            "told_again": said.read_text(),
            "second": tree(place),
        }
        shutil.rmtree(place)
        if status == NOT_MET:
            return


if __name__ == "__main__":
    cli.versions()  # asks git once, for all children
    given = json.loads(sys.argv[1])
    for found in steps(given["source"], given["old"], given["fault"], given["kept_bytes"], Path(given["work"])):
        print(json.dumps(found))
