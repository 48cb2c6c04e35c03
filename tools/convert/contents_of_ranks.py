"""What lies in the files of ranks that Megatron-LM writes: mp_rank_XX[_YYY[_ZZZ]]/model_optim_rng.pt."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.safe_pickle import Record, StoredTensor
from megapatch.models.torch_save import open_archive
from megapatch.tools.convert.found import Contents, Item

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_MODEL = re.compile(r"model\d*")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_DEEPEST = 8
_OPTIMIZER = "distrib_optim.pt"
_SAID = ("iteration", "checkpoint_version")
_ARGS = (  # of the run's options: what the layout is
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "transformer_impl",
    "num_layers",
    "num_experts",
)


def rank_folders(folder: Path) -> dict[tuple[int, ...], Path]:
    """The folders of ranks: their numbers (tensor, pipeline, expert as far as named) -> folder."""
    named = {path: _RANK.fullmatch(path.name) for path in folder.glob("mp_rank_*") if path.is_dir()}
    return {tuple(int(n) for n in m.groups() if n is not None): p for p, m in sorted(named.items()) if m}


def fill(found: Contents) -> None:
    """Add the tensors of every rank, and what folder names and options say of the layout."""
    folders = rank_folders(found.folder)
    said: dict[str, Any] = {}
    ends = []
    for folder in folders.values():
        files = [folder / name for name in _FILES if (folder / name).is_file()]
        if not files:
            found.problems.append(("complete", f"{folder}: no {_FILES[0]}; the rank's weights are missing"))
            continue
        said |= add_file(found, files[0], f"{folder.name}/{files[0].name}") or {}
        ends.append(
            any(i.name.endswith("final_layernorm.weight") and i.file.startswith(folder.name) for i in found.items)
        )
    found.layout |= {"ranks": len(folders), **sizes(list(folders), all(ends)), **said}
    missing = _missing(list(folders))
    if missing:
        found.problems.append(("complete", f"{found.folder}: no {missing}, though ranks above it are there"))


def sizes(ranks: list[tuple[int, ...]], ends_everywhere: bool) -> dict[str, int]:
    """Parallel sizes by folder names; a second number alone is the stage, or the expert rank where all hold the end."""
    tops = [max(numbers) + 1 for numbers in zip(*ranks, strict=True)] if len({len(r) for r in ranks}) == 1 else []
    names = ["tensor", "pipeline", "expert"]
    if len(tops) == 2 and ends_everywhere:
        names = ["tensor", "expert"]
    return {f"{name}_model_parallel_size": top for name, top in zip(names, tops, strict=False)}


def _missing(ranks: list[tuple[int, ...]]) -> str:
    """The first folder that a full grid of ranks has and this one has not; empty when none."""
    if len({len(rank) for rank in ranks}) != 1:
        return "uniform set of mp_rank folders"
    grid = product(*(range(max(numbers) + 1) for numbers in zip(*ranks, strict=True)))
    missing = next((rank for rank in grid if rank not in set(ranks)), None)
    return "" if missing is None else "_".join(["mp_rank", *(f"{n:0{2 + (at > 0)}d}" for at, n in enumerate(missing))])


def add_file(found: Contents, path: Path, file: str) -> dict[str, Any] | None:
    """Add the tensors of one torch.save file; what it says of iteration and layout (None: not readable)."""
    return found.attempt("safe", _add_file, found, path, file)


def _add_file(found: Contents, path: Path, file: str) -> dict[str, Any]:
    archive = open_archive(path)
    with archive.file:
        said = archive.value(found.foreign)
        top = said if isinstance(said, dict) else {}
        models = {key: top[key] for key in top if isinstance(key, str) and _MODEL.fullmatch(key)}
        weights = models.values() if models else [top]
        for name, value in (pair for model in weights for pair in _leaves(model)):
            if isinstance(value, StoredTensor) and "_extra_state" not in name:
                region = found.attempt("complete", archive.region, value, name)
                if region is not None:
                    found.items.append(Item(name, region.dtype, region.shape, file))
            else:
                found.objects += 1
                archive.check_nested(value)
    told = {name: top[name] for name in _SAID if type(top.get(name)) in (int, float)}
    if models:
        told |= {
            "optimizer_state": "optimizer" in top or (path.parent / _OPTIMIZER).is_file(),
            "chunks_of_the_pipeline": len(models),
        }
    return told | _of_args(top.get("args"))


def _of_args(args: Any) -> dict[str, Any]:
    said = vars(args) if isinstance(args, Record) else {}
    return {name: said[name] for name in _ARGS if type(said.get(name)) in (int, str)}


def _leaves(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of nested dictionaries, names joined by dots; a dictionary that occurs twice is read once."""
    left, seen = [("", model, 0)], set()
    while left:
        name, value, depth = left.pop()
        if not isinstance(value, dict):
            yield name, value
        elif depth > _DEEPEST:
            raise UserError(f"{name}: dictionaries within dictionaries; expected a model's state")
        elif id(value) not in seen:
            seen.add(id(value))
            left += [(f"{name}.{key}" if name else str(key), v, depth + 1) for key, v in reversed(value.items())]
