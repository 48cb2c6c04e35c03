"""Where megatron-core keeps the indices of a dataset: complete or absent, whoever is killed or builds beside us."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megapatch.models import commit
from megapatch.models.cli import UserError
from megapatch.models.indexed_data import bin_path, idx_path
from megapatch.trainer.ranks import together


def key(prefixes: list[str], settings: list[Any]) -> str:
    """A name for the indices of these data as they are now, with these settings; every rank must call.

    megatron-core's own name holds the path only: data made anew at the same path would meet the indices of the old.
    """
    made = [""]
    with together():
        if dist.get_rank() == 0:
            contents = [
                (prefix, bin_path(prefix).stat().st_size, commit.digest(idx_path(prefix))) for prefix in prefixes
            ]
            made = [xxhash.xxh3_128_hexdigest(json.dumps([contents, settings]).encode())]
    dist.broadcast_object_list(made)
    return made[0]


@contextmanager
def building(root: Path, name: str) -> Iterator[Path]:
    """A folder for indices: ROOT/NAME where that is complete, else a new one that becomes it; every rank must enter."""
    final = root / name
    chosen = [final]
    with together():
        if dist.get_rank() == 0 and not final.is_dir():
            chosen = [commit.staging_name(final)]
            shutil.rmtree(chosen[0], ignore_errors=True)  # of a killed process with this one's number
            chosen[0].mkdir(parents=True)
    dist.broadcast_object_list(chosen)
    folder = chosen[0]
    with together():
        if not folder.is_dir():
            raise UserError(f"--data-cache-path {root}: not the same folder on all nodes; name one that they share")
    try:
        with commit.naming_full_disks(final), naming_the_cause():
            yield folder
        dist.barrier()  # every rank has the files open: renaming does not disturb them
        if dist.get_rank() == 0 and folder != final:
            _put(folder, final)
    finally:
        if dist.get_rank() == 0 and folder != final:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming_the_cause() -> Iterator[None]:
    """The operating system's error, where megatron-core raises a bare Exception instead of it."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise


def _put(folder: Path, final: Path) -> None:
    for path in folder.iterdir():
        commit.fsync(path)
    commit.fsync(folder)
    with contextlib.suppress(OSError):  # another run was faster; its indices are the same
        os.rename(folder, final)
    commit.fsync(final.parent)
