"""Folders that are made once, however many runs want them at the same time: complete or absent. Imports no torch."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapatch.models import commit
from megapatch.trainer.saving.locks import alone_in


@contextmanager
def built_once(final: Path) -> Iterator[Path]:
    """FINAL where it is complete, else a new folder that becomes it when the block ends well; one process builds."""
    if final.is_dir():
        yield final
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(final.parent):
        if final.is_dir():  # by the run that was waited for
            yield final
            return
        stage = commit.staging_name(final)
        _remove_unfinished(final.parent)
        shutil.rmtree(stage, ignore_errors=True)  # of a killed process with this one's number
        stage.mkdir()
        try:
            yield stage
            _put(stage, final)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes of this machine left that are no more."""
    marker = f".tmp-{platform.node()}-"
    for old in folder.glob(f"*{marker}*"):
        process = old.name.rpartition(marker)[2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(old, ignore_errors=True)


def _put(folder: Path, final: Path) -> None:
    for path in folder.iterdir():
        commit.fsync(path)
    commit.fsync(folder)
    try:
        os.rename(folder, final)
    except OSError:
        if not final.is_dir():  # without locks, another run may have been faster; its content is the same
            raise
    commit.fsync(final.parent)
