"""Megatron-LM's checkpoints of one file for each rank, read: folders, and where the tensors lie. Imports no torch.

    ROOT/latest_checkpointed_iteration.txt                  "release", or the number of an iteration
    ROOT/release/, ROOT/iter_0000100/                       mp_rank_00, or mp_rank_TT_PPP, mp_rank_TT_EEE, ..._PPP_EEE
        mp_rank_01_003/model_optim_rng.pt                   {"model": {name: tensor}, "args": ..., "iteration": ...}

Names as in megatron/training/checkpointing.py of Megatron-LM core_v0.16.1: TT the place in tensor parallelism, PPP the
stage where there are several, EEE the place in expert parallelism where that is above 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.cli import UserError
from megapatch.models.core_files import RANK_FOLDERS
from megapatch.models.torch_save import Archive, Region, open_archive

FILE = "model_optim_rng.pt"
_LEAST_VERSION = 2.0
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class Rank(NamedTuple):
    """Places of a rank in tensor, pipeline and expert parallelism."""

    tensor: int
    stage: int
    expert: int


def file_name(rank: Rank, pp: int, ep: int) -> str:
    """The file of a rank in the checkpoint's folder."""
    stage = f"_{rank.stage:03d}" if pp > 1 else ""
    expert = f"_{rank.expert:03d}" if ep > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{stage}{expert}/{FILE}"


def is_legacy(folder: Path) -> bool:
    """True for a folder with a file of a rank."""
    return folder.is_dir() and any((path / FILE).is_file() for path in folder.glob(RANK_FOLDERS))


@dataclass(frozen=True)
class RankFile:
    """What a rank saved: where the tensors of each chunk of its model lie, by name."""

    path: Path
    chunks: tuple[Mapping[str, Region], ...]
    others: tuple[str, ...]  # keys of what is no model


def read(path: Path) -> RankFile:
    """A rank's file, read without running anything (UserError: not one, or damaged)."""
    archive = open_archive(path)
    with archive.file:
        state = archive.value(set())  # the options of a run may hold anything
        if not isinstance(state, dict) or not ("model" in state or "model0" in state):
            raise UserError(f"{path}: holds no model; expected what Megatron-LM saves with --ckpt-format torch")
        version = state.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < _LEAST_VERSION:
            said = version if isinstance(version, int | float) else f"a {type(version).__name__}"
            raise UserError(
                f"{path}: checkpoint_version {said}, whose queries and keys are in another order; expected "
                "2.0 or above: load and save it with Megatron-LM first"
            )
        count = sum(re.fullmatch(r"model\d+", str(key)) is not None for key in state)
        keys = ["model"] if "model" in state else [f"model{n}" for n in range(count)]
        chunks = tuple(_tensors(archive, state.get(key), key) for key in keys)
    return RankFile(path, chunks, tuple(str(key) for key in state if key not in keys))


def _tensors(archive: Archive, model: Any, key: str) -> dict[str, Region]:
    if not isinstance(model, dict):
        raise UserError(f"{archive.where}: {key} is no dictionary of weights; the file is damaged")
    if "language_model" in model:
        raise UserError(
            f"{archive.where}: of a model from before megatron-core (language_model); load and save it with "
            "Megatron-LM's tools/checkpoint first"
        )
    named = {str(name): value for name, value in model.items()}
    return {n: archive.region(v, n) for n, v in named.items() if isinstance(v, safe_pickle.StoredTensor) and _weight(n)}


def _weight(name: str) -> bool:
    return not name.endswith("_extra_state")


def ranks(folder: Path) -> dict[tuple[int, ...], Path]:
    """The numbers in the names of the ranks' folders -> the ranks' files (UserError: names that do not go together)."""
    found = {}
    for path in sorted(folder.glob(RANK_FOLDERS)):
        name = _FOLDER.fullmatch(path.name)
        if name and (path / FILE).is_file():
            found[tuple(int(n) for n in name.groups() if n is not None)] = path / FILE
    if len({len(numbers) for numbers in found}) != 1:
        raise UserError(f"{folder}: mp_rank_ folders of different layouts side by side; keep those of one checkpoint")
    return found
