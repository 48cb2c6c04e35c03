"""What lies in a folder of weights: every tensor by name, shape and type, and what the files say of the layout."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapatch.models import core_files, hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import Checkpoint, Tensor
from megapatch.models.torch_save import open_archive
from megapatch.tools.convert import contents_of_ranks
from megapatch.tools.convert.found import Contents, Item

_STATE = ("optimizer", "rng_state", "rerun_state_machine_state", "opt_param_scheduler", "generators")
_LAYER, _MOST_LAYERS = re.compile(r"[0-9]{1,9}"), 4096
_COMMON = ("iteration", "checkpoint_version", "content_metadata")


def read(path: Path) -> Contents:
    """The contents of a Hugging Face folder, a torch_dist checkpoint, a folder of ranks, or a root with a tracker."""
    if not path.is_dir():
        raise UserError(f"{path}: {'is a file' if path.exists() else 'does not exist'}; expected a folder of weights")
    folder = _of_tracker(path)
    if contents_of_ranks.rank_folders(folder):
        found = Contents("legacy", folder)
        contents_of_ranks.fill(found)
    elif (folder / core_files.METADATA).is_file():
        found = _core(folder)
    elif (folder / hf_files.CONFIG).is_file() or list(folder.glob("*.safetensors")) or list(folder.glob("*.bin")):
        found = _hf(folder)
    else:
        core_files.resolve(path)  # says what is missing
        raise UserError(f"{path}: no weights in any form known here: .safetensors, {core_files.METADATA}, mp_rank_*")
    if folder.name.startswith("iter_") and _LAYER.fullmatch(folder.name[5:]):
        found.layout.setdefault("iteration", int(folder.name[5:]))
    return found


def _of_tracker(path: Path) -> Path:
    step = None if (path / core_files.METADATA).is_file() else core_files.read_tracker(path)
    return path if step is None else core_files.iteration_folder(path, step)


def _hf(folder: Path) -> Contents:
    found = Contents("hf", folder)
    weight_map = found.attempt("complete", hf_files.index, folder)
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        return _bin(found)
    files = sorted(set(weight_map.values())) if weight_map else sorted(p.name for p in folder.glob("*.safetensors"))
    for file in files:
        tensors = found.attempt("complete", hf_files.read_header, folder / file) if (folder / file).is_file() else None
        found.items += [Item(t.name, t.dtype, t.shape, file) for t in tensors or ()]
    if not found.problems:
        found.attempt("complete", hf_files.tensors, folder)
    if code := sorted(path.name for path in folder.glob("*.py")):
        found.notes.append(f"code comes along, which only a loader runs that is told to trust it: {', '.join(code)}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        found.notes.append(f"not looked at, as nothing here reads it: {', '.join(pickles)} (pickles)")
    found.layout["files"] = len(files)
    return found


def _bin(found: Contents) -> Contents:
    """Weights in .bin files, which are pickles: mp-convert does not take them."""
    for path in sorted(found.folder.glob("*.bin")):
        contents_of_ranks.add_file(found, path, path.name)
    found.notes.append("weights in .bin files, which are pickles: mp-convert takes .safetensors only")
    found.layout["files"] = len(list(found.folder.glob("*.bin")))
    return found


def _core(folder: Path) -> Contents:
    found = Contents("core", folder)
    with Checkpoint(folder) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        found.objects = len(checkpoint.objects)
        for tensor in tensors:
            file = tensor.chunks[0].file if tensor.chunks else ""
            state = tensor.key.split(".")[0].split("/")[0] in _STATE
            found.items.append(Item(tensor.key, tensor.dtype, tensor.shape, file, len(tensor.chunks), state))
        found.attempt("safe", checkpoint.check_objects)
    found.layout |= _chunking([t for t in tensors if t.key.startswith(("decoder.", "encoder."))])
    common = found.attempt("safe", _common, found)
    found.layout |= {name: common[name] for name in _COMMON if isinstance(common, dict) and name in common}
    found.layout["files"] = len({chunk.file for tensor in tensors for chunk in tensor.chunks})
    return found


def _common(found: Contents) -> Any:
    """common.pt; problems of its own: not there, or a pickle that names what it must not."""
    path = found.folder / core_files.COMMON
    if not path.is_file():
        found.problems.append(("complete", f"{path}: missing; the folder is not a complete torch_dist checkpoint"))
        return None
    archive = open_archive(path)
    with archive.file:
        said = archive.value(found.foreign)
    backend = found.folder / core_files.BACKEND
    if not backend.is_file():
        found.problems.append(("complete", f"{backend}: missing; megatron-core does not load the folder without it"))
    return {name: value for name, value in said.items() if _plain(value)} if isinstance(said, dict) else None


def _plain(value: Any) -> bool:
    """A number or short text, or a few of them by name: what may be shown whole."""
    if type(value) is dict:
        return (
            len(value) < 100
            and all(type(key) is str and len(key) < 100 for key in value)
            and all(type(inner) is not dict and _plain(inner) for inner in value.values())
        )
    return type(value) in (int, float, bool, type(None)) or (type(value) is str and len(value) < 1000)


def _chunking(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What the chunks suggest of the layout that saved them: cuts of fused QKV, layers by the rank in file names."""
    per_layer = any(".layers.0." in tensor.key for tensor in tensors)
    said: dict[str, Any] = {"layers_are": "in the names" if per_layer else "an axis"}
    cuts = [
        len({chunk.offsets[-2] for chunk in tensor.chunks})
        for tensor in tensors
        if tensor.key.endswith("linear_qkv.weight") and len(tensor.shape) > 1
    ]
    if cuts:
        said["suggests_tensor_model_parallel_size"] = max(cuts)
    ranks = {c.file.split("_")[2] for t in tensors for c in t.chunks if c.file.startswith("__")}
    said["written_by_ranks"] = len(ranks)
    stages = {frozenset(layers) for layers in _layers_of_ranks(tensors).values()}
    if len(stages) > 1 and sum(map(len, stages)) == len(frozenset().union(*stages)):
        said["suggests_pipeline_model_parallel_size"] = len(stages)
    return said


def _layers_of_ranks(tensors: Sequence[Tensor]) -> dict[str, set[int]]:
    """Rank in the file name -> layers of which it wrote the fused QKV."""
    found: dict[str, set[int]] = {}
    for tensor in tensors:
        words = tensor.key.split(".")
        if not tensor.key.endswith("linear_qkv.weight") or not tensor.shape:
            continue
        for chunk in (c for c in tensor.chunks if c.file.startswith("__")):
            named = words[words.index("layers") + 1] if "layers" in words[:-1] else ""
            stacked = range(chunk.offsets[0], chunk.offsets[0] + min(chunk.sizes[0], _MOST_LAYERS))
            layers = [int(named)] if _LAYER.fullmatch(named) else stacked
            found.setdefault(chunk.file.split("_")[2], set()).update(layers)
    return found
