"""megatron-core's torch_dist checkpoint on disk, read: folders and trackers, tensors and where their bytes lie.

    ROOT/latest_checkpointed_iteration.txt      "release", or the number of an iteration
    ROOT/release/, ROOT/iter_0000100/           .metadata  common.pt  metadata.json  *.distcp  manifest.json
        hf/                                     config.json and the tokenizer's files, as the model came with them

``.metadata``, common.pt and the objects between the tensors are pickles, some of which core loads unprotected: here
they pass an allow-list first. Imports no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.cli import UserError
from megapatch.models.commit import staged_file
from megapatch.models.core_metadata import check_metadata
from megapatch.models.links import refuse_outside
from megapatch.models.open_files import OpenFiles
from megapatch.models.torch_save import ITEM_BYTES, Archive, open_archive

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_SUBFOLDER = "hf"
RANK_FOLDERS = "mp_rank_*"  # of Megatron-LM's checkpoints of one file for each rank
METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"


def iteration_folder(root: Path, step: str | int) -> Path:
    """The folder of "release" or of an iteration, as Megatron names it."""
    return root / (step if isinstance(step, str) else f"iter_{step:07d}")


def read_tracker(root: Path) -> str | int | None:
    """What the tracker names: "release", an iteration, or None where there is no tracker."""
    try:
        text = (root / TRACKER).read_bytes()[:100].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    if text != RELEASE and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UserError(f"{root / TRACKER}: says {text[:40]!r}; expected 'release' or the number of an iteration")
    return text if text == RELEASE else int(text)


def write_tracker(root: Path, step: str | int) -> None:
    """Make ``root`` name its newest checkpoint; the old tracker stays until the new one is durable."""
    with staged_file(root / TRACKER) as stage:
        stage.write_text(str(step))


def is_core(path: Path) -> bool:
    """True for a folder with a tracker or a torch_dist checkpoint."""
    return (path / TRACKER).is_file() or (path / METADATA).is_file()


def resolve(path: Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or what its tracker names (UserError when neither)."""
    if (path / METADATA).is_file():
        return path
    step = read_tracker(path)
    if step is None:
        raise UserError(f"{path}: not a core checkpoint: no {TRACKER} and no {METADATA}{_instead(path)}")
    folder = iteration_folder(path, step)
    if not (folder / METADATA).is_file():
        legacy = f"; it has {RANK_FOLDERS}: convert it with mp-convert --to core" if _of_ranks(folder) else older(path)
        raise UserError(f"{path / TRACKER}: names {folder.name}, but {folder / METADATA} does not exist{legacy}")
    return folder


def _of_ranks(folder: Path) -> bool:
    return any(folder.glob(RANK_FOLDERS))


def older(root: Path, damaged: Path | None = None) -> str:
    """What to write into the tracker to go on from the newest checkpoint that is there, but for ``damaged``."""
    folders = sorted(p.parent for p in root.glob(f"iter_{'[0-9]' * 7}/{METADATA}"))
    if there := [folder.name for folder in folders if folder != damaged]:
        return f"; to use {there[-1]}, write {int(there[-1][5:])} into {TRACKER}"
    return "; bring the folder back, or make it again"


def _instead(path: Path) -> str:
    if not path.exists():
        return "; the folder does not exist"
    if (path / "config.json").is_file():
        return "; it is a Hugging Face folder: convert it first with mp-convert"
    steps = sorted(p.name for p in path.iterdir() if (p / METADATA).is_file())
    return f"; it holds {', '.join(steps)}: name one of them" if steps else ""


def hf_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json that a checkpoint folder carries."""
    path = checkpoint / HF_SUBFOLDER / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; put the model's config.json (and tokenizer) there") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}; expected an object")
    return config


class Chunk(NamedTuple):
    """A rectangular part of a tensor: ``sizes`` elements from ``offsets``, saved at bytes of ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int  # of the torch.save file that holds it
    length: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, with all its chunks."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    _index: dict[int, dict[tuple[int, ...], list[Chunk]]] = field(default_factory=dict, compare=False, repr=False)

    def at(self, lead: tuple[int, ...]) -> list[Chunk]:
        """The chunks that hold elements at these indices of the first axes."""
        return self._by_lead(len(lead)).get(lead, [])

    def _by_lead(self, depth: int) -> dict[tuple[int, ...], list[Chunk]]:
        if depth not in self._index:
            found = self._index.setdefault(depth, {})
            for chunk in self.chunks:
                spans = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for lead in product(*(range(start, start + size) for start, size in spans)):
                    found.setdefault(lead, []).append(chunk)
        return self._index[depth]


class Checkpoint:
    """The tensors of a torch_dist folder; a with-block closes the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = load_metadata(folder)
        self.objects = [k for k, v in self.metadata.state_dict_metadata.items() if not hasattr(v, "chunks")]
        self.tensors = {t.key: t for t in _tensors(self.metadata, folder / METADATA)}
        self._files = OpenFiles()
        self._located: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def archive(self, file: str, start: int, length: int, what: str) -> Archive:
        """The torch.save file at a place in one of the folder's files."""
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{path}: missing, but {METADATA} names it for {what}; the checkpoint is incomplete")
        refuse_outside(path, self.folder)
        size = path.stat().st_size
        if start < 0 or start + length > size:
            raise UserError(f"{path}: {size} bytes, but {what} ends at byte {start + length}; the file is cut short")
        return Archive(self._files[path], start, length, f"{path}: {what}")

    def locate(self, tensor: Tensor, chunk: Chunk) -> int:
        """The offset in ``chunk.file`` of the chunk's first element; its elements follow contiguously."""
        known = self._located.get((chunk.file, chunk.start))
        if known is not None:
            return known
        region = self.archive(chunk.file, chunk.start, chunk.length, tensor.key).tensor()
        if (region.dtype, prod(region.shape)) != (tensor.dtype, prod(chunk.sizes)):
            raise UserError(
                f"{self.folder / chunk.file}: {tensor.key}: {region.dtype} {list(region.shape)} in the file, "
                f"{tensor.dtype} {list(chunk.sizes)} in {METADATA}; the checkpoint is damaged"
            )
        self._located[chunk.file, chunk.start] = region.offset
        return region.offset

    def check_objects(self) -> None:
        """Refuse objects whose pickles name what the allow-list lacks: core loads them unprotected (UserError)."""
        places = {key.fqn: at for key, at in self.metadata.storage_data.items() if key.offset is None}
        seen = set()
        for key in self.objects:
            file, start, length = _place(places.get(key), key, self.folder / METADATA)
            if (file, start) in seen:
                continue
            seen.add((file, start))
            archive = self.archive(file, start, length, key)
            value = archive.value()
            if "_extra_state" in key:  # Transformer Engine keeps a pickle in a tensor of bytes, or in a BytesIO
                archive.check_nested(value)


def load_metadata(folder: Path) -> Any:
    """``.metadata`` of a torch_dist folder, read without running anything."""
    path = folder / METADATA
    try:
        found = safe_pickle.load(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the folder is not a complete torch_dist checkpoint") from None
    check_metadata(found, path)
    return found


def load_metadata_safely(folder: Path) -> None:
    """Refuse (UserError) a torch_dist folder whose pickles could run code when megatron-core loads it."""
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_objects()
    common = folder / COMMON
    if not common.is_file():
        raise UserError(f"{common}: missing; the folder is not a complete torch_dist checkpoint")
    archive = open_archive(common)
    with archive.file:
        archive.value()


def _tensors(metadata: Any, where: Path) -> Iterator[Tensor]:
    places: dict[Any, Any] = metadata.storage_data
    for key, saved in metadata.state_dict_metadata.items():
        if not hasattr(saved, "chunks"):
            continue
        dtype, shape = saved.properties.dtype, tuple(saved.size)
        if dtype not in ITEM_BYTES:
            raise UserError(f"{where}: {key}: unknown dtype {dtype!r}")
        chunks = []
        for chunk in saved.chunks:
            file, start, length = _place(places.get(safe_pickle.Index(key, tuple(chunk.offsets))), key, where)
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, start, length))
        yield Tensor(key, dtype, shape, tuple(chunks))


def _place(saved: Any, key: str, where: Path) -> tuple[str, int, int]:
    if saved is None:
        raise UserError(f"{where}: says nothing of where {key} is stored; the checkpoint is incomplete")
    if getattr(saved, "transform_descriptors", None):
        raise UserError(f"{where}: {key} is stored compressed ({saved.transform_descriptors}); save it without")
    return saved.relative_path, saved.offset, saved.length
