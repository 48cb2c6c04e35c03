"""Is ``.metadata`` of a torch_dist checkpoint what torch writes? Checked before anything in it is believed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.safe_pickle import Index, Record

_LARGEST = 1 << 62


def check_metadata(found: Any, path: Path) -> None:
    """Refuse (UserError) a description with a value of the wrong kind, or with a part outside its tensor or folder."""
    described, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(described, Mapping) or not isinstance(places, Mapping):
        raise UserError(f"{path}: does not describe a checkpoint; the file is damaged")
    for key, saved in described.items():
        if type(key) is not str or not isinstance(saved, Record):
            raise UserError(f"{path}: {_shown(key)}: not described as torch does; the file is damaged")
        if hasattr(saved, "chunks"):
            _tensor(key, saved, path)
    for index, place in places.items():
        if not isinstance(index, Index) or not isinstance(place, Record):
            raise UserError(f"{path}: a place that belongs to no tensor ({_shown(index)}); the file is damaged")
        _place(index.fqn, place, path)


def _tensor(key: str, saved: Any, path: Path) -> None:
    size: Any = getattr(saved, "size", None)
    dtype = getattr(getattr(saved, "properties", None), "dtype", None)
    if not _sizes(size) or type(dtype) is not str or type(saved.chunks) is not list:
        raise UserError(f"{path}: {_shown(key)}: no tensor as torch describes it; the file is damaged")
    for chunk in saved.chunks:
        offsets: Any = getattr(chunk, "offsets", None)
        sizes: Any = getattr(chunk, "sizes", None)
        fits = _sizes(offsets) and _sizes(sizes) and len(offsets) == len(sizes) == len(size)
        if not fits or any(at + n > whole for at, n, whole in zip(offsets, sizes, size, strict=True)):
            raise UserError(
                f"{path}: {_shown(key)}: a chunk of {_shown(sizes)} at {_shown(offsets)} "
                f"in a tensor of {_shown(size)}; the file is damaged"
            )


def _place(key: str, place: Any, path: Path) -> None:
    name = getattr(place, "relative_path", None)
    if type(name) is not str or Path(name).name != name or "\0" in name:
        raise UserError(f"{path}: {_shown(key)} is said to be in {_shown(name)}; expected a file of this folder")
    changed = getattr(place, "transform_descriptors", None) or ()
    if type(changed) not in (tuple, list) or not all(type(step) is str for step in changed):
        raise UserError(f"{path}: {_shown(key)}: stored in a way that torch does not name; the file is damaged")
    if not _sizes((getattr(place, "offset", None), getattr(place, "length", None))):
        raise UserError(f"{path}: {_shown(key)}: no place in {_shown(name)}; the file is damaged")


def _sizes(numbers: Any) -> bool:
    """Are these counts of elements or bytes?"""
    return type(numbers) is tuple and all(type(n) is int and 0 <= n < _LARGEST for n in numbers)


def _shown(value: Any) -> str:
    plain = type(value) in (int, type(None)) or (type(value) is tuple and all(type(n) is int for n in value))
    text = value if type(value) is str else repr(value) if plain else f"a {type(value).__name__}"
    return text if text.isprintable() and len(text) < 200 else ascii(text[:200])
