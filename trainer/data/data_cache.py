"""Where megatron-core keeps the indices of a dataset: complete or absent, whoever is killed or builds beside us."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megapatch.models import commit
from megapatch.models.cli import UserError
from megapatch.models.indexed_data import bin_path, idx_path
from megapatch.trainer.data.built_once import built_once
from megapatch.trainer.ranks import together
from megapatch.trainer.saving import disk


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
    with ExitStack() as held:
        with together():
            if dist.get_rank() == 0:
                chosen = [held.enter_context(built_once(final))]
        dist.broadcast_object_list(chosen)
        with together():
            if not chosen[0].is_dir():
                raise UserError(f"--data-cache-path {root}: not the same folder on all nodes; name one that they share")
        with disk.naming(final), naming_the_cause():
            yield chosen[0]
        dist.barrier()  # every rank has the files open: renaming does not disturb them


@contextmanager
def naming_the_cause() -> Iterator[None]:
    """The operating system's error, where megatron-core raises a bare Exception instead of it."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise
