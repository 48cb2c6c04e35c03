"""Takes locks and builds folders in a process that imports no torch; started by tests/test_trainer_locks.py.

lock_worker.py hold FOLDER      holds the folder's lock, says so, and sleeps
lock_worker.py build FOLDER     builds FOLDER once, noting each build beside it; says what it read
"""

import sys
import time
from pathlib import Path

from megapatch.models.cli import UserError
from megapatch.trainer import built_once, locks


def hold(folder: Path) -> None:
    locks.WAIT_S = 0.3
    try:
        locks.hold(folder)
    except UserError as error:
        print(error)
        return
    print("held", flush=True)
    time.sleep(600)


def build(final: Path) -> None:
    with built_once.built_once(final) as folder:
        if folder != final:
            with (final.parent.parent / "builds").open("a") as builds:
                builds.write("x")
            time.sleep(0.3)
            (folder / "index").write_text("of all")
    print((final / "index").read_text())
    assert "torch" not in sys.modules


if __name__ == "__main__":
    {"hold": hold, "build": build}[sys.argv[1]](Path(sys.argv[2]))
