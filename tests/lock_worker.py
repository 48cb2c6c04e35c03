"""Takes locks and builds folders in a process that imports no torch; started by tests/test_trainer_locks.py.

lock_worker.py hold FOLDER      holds the folder's lock, says so, and sleeps
lock_worker.py build FOLDER     builds FOLDER once, noting each build beside it; says what it read
lock_worker.py make FOLDER      makes data of FOLDER/text in FOLDER/cache, as --data does; says where
lock_worker.py --input ...      stands for mp-preprocess: slow, notes each call in FOLDER/builds
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import manifest_path
from megapatch.trainer.data import built_once, made_data
from megapatch.trainer.saving import locks


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


def make(folder: Path) -> None:
    options: Any = SimpleNamespace(data_cache=folder / "cache", requeue_file=None)
    maker = made_data.Maker("stand-in", "lock_worker", "text", ())
    print(made_data.make(options, maker, [str(folder / "text")], folder / "tokenizer"))
    assert "torch" not in sys.modules


def stand_in(words: list[str]) -> None:
    given = dict(zip(words[::2], words[1::2], strict=True))
    with (Path(given["--input"]).parent / "builds").open("a") as builds:
        builds.write("x")
    time.sleep(1.5)
    manifest_path(given["--output-prefix"]).write_text("{}")


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        stand_in(sys.argv[1:])
    else:
        {"hold": hold, "build": build, "make": make}[sys.argv[1]](Path(sys.argv[2]))
