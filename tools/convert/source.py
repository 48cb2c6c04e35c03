"""What every source of weights gives, and which kind a folder is."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megapatch.models import core_files, family, held, hf_files, legacy_files
from megapatch.models.cli import UserError
from megapatch.models.rules import Placed
from megapatch.models.shapes import Layout
from megapatch.tools.convert.matrix import Matrix
from megapatch.tools.convert.plan import DTYPES, Literal, Plan

FLOATS = tuple(DTYPES.values())
FP8 = "float8_e4m3fn"
AS_TRAINED = ("mlp.router.expert_bias",)  # core and transformers hold it in fp32 whatever the weights are


@dataclass(frozen=True)
class Model:
    """A model besides its weights: config.json as the weights are, and as it is to be written; side files."""

    config: family.HfConfig
    written: dict[str, Any]
    layout: Layout
    files: Mapping[str, Path]  # tokenizer and the like, config.json too
    index: Path | None = None  # index.json of the files that the model came in


class Source(Protocol):
    """Weights that can be converted."""

    model: Model
    notes: list[str]

    def weight(self, placed: Placed) -> Matrix:
        """A core weight as it lies in files."""


def model_of(folder: Path, config: dict[str, Any], names: Collection[str]) -> Model:
    """The model whose config.json and tokenizer lie in a Hugging Face folder; ``names`` of the weights that it has."""
    index, found = folder / hf_files.INDEX, held.as_held(config, names)
    return Model(found, config, Layout(found), hf_files.side_files(folder), index if index.is_file() else None)


def add_side_files(model: Model, made: Plan, folder: str = "") -> None:
    """Plan config.json, tokenizer and the like into ``folder`` of the target."""
    for name, path in model.files.items():
        if name == hf_files.CONFIG and hf_files.config(path.parent) != model.written:
            text = json.dumps(model.written, indent=2, ensure_ascii=False) + "\n"
            made.entries.append(Literal(folder + name, 0, text.encode()))
        else:
            made.add_file(path, folder + name)


def choose_dtype(asked: str, matrix: Matrix, name: str, core: str = "") -> str:
    """The type that the items of ``matrix`` get: ``asked`` (auto, keep, bf16, ...), else as they are stored."""
    kept = core.endswith(AS_TRAINED)
    if asked in DTYPES and not kept:
        return DTYPES[asked]
    if not matrix.dtypes:
        raise UserError(f"{matrix.origin} leave all of it out; the checkpoint is incomplete")
    first, *others = matrix.dtypes
    if others:
        raise UserError(f"{name}: {first}, but core stores it with weights of {others[0]}; choose --dtype")
    if first != FP8:
        return first
    if asked == "keep":
        raise UserError(f"{name}: FP8 with block scales, which no target stores; choose --dtype bf16 (or leave it out)")
    return DTYPES["bf16"]


def check_dtype(name: str, dtype: str) -> None:
    """Refuse what is no weight (UserError)."""
    if dtype not in FLOATS:
        raise UserError(f"{name}: dtype {dtype} is not supported; supported: {', '.join(FLOATS)}")


def named(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    return min(names) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def kind_of(folder: Path) -> tuple[str, Path]:
    """("core", "legacy" or "hf", the folder itself or the checkpoint that its tracker names) (UserError)."""
    if legacy_files.is_legacy(folder):
        return "legacy", folder
    if not core_files.is_core(folder):
        return "hf", folder
    step = None if (folder / core_files.METADATA).is_file() else core_files.read_tracker(folder)
    if step is not None and legacy_files.is_legacy(named := core_files.iteration_folder(folder, step)):
        return "legacy", named
    return "core", core_files.resolve(folder)
