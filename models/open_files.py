"""Files kept open for reading, a bounded number: a checkpoint may have more files than a process may open."""

from pathlib import Path
from typing import BinaryIO

LIMIT = 64


class OpenFiles:
    """The files read last; for one thread. A with-block closes them."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def __getitem__(self, path: Path) -> BinaryIO:
        file = self._files.pop(path, None) or path.open("rb")
        self._files[path] = file  # last again
        if len(self._files) > LIMIT:
            self._files.pop(next(iter(self._files))).close()
        return file
