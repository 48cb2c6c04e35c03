"""megatron-core's torch_dist checkpoint on disk, written: everything but the tensors' bytes, which are copied in.

The folder loads through unmodified megatron.core.dist_checkpointing.load at any layout. Imports no torch.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.core_files import BACKEND, COMMON, METADATA
from megapatch.models.safe_pickle import Call, Global
from megapatch.models.torch_write import object_blob, tensor_blob

_DCP = "torch.distributed.checkpoint."
_METADATA, _TENSOR, _CHUNK, _PROPERTIES, _OBJECT, _INDEX = (
    Global(_DCP + "metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "MetadataIndex",
    )
)
_STORED = Global(_DCP + "filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_DTYPES = {name: Global("torch", name) for name in safe_pickle.DTYPES.split()}


class Bytes(NamedTuple):
    """``data`` at byte ``offset`` of ``file``."""

    file: str
    offset: int
    data: bytes


class CoreWriter:
    """Lays tensors out in ``num_files`` files for each stage of a pipeline; ``sizes`` are those of the files.

    ``rest()`` gives all that is not tensor data.
    """

    def __init__(self, num_files: int, num_stages: int = 1) -> None:
        self._files = [[f"__{stage}_{n}.distcp" for n in range(num_files)] for stage in range(num_stages)]
        self.sizes = {name: 0 for names in self._files for name in names}
        self.tensors: dict[str, tuple[str, tuple[int, ...], list[Call]]] = {}
        self.objects: list[str] = []
        self._places: list[tuple[Call, Call]] = []
        self._bytes: list[Bytes] = []

    def tensor(
        self,
        key: str,
        dtype: str,
        shape: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        stage: int = 0,
    ) -> tuple[str, int]:
        """Add the chunk at ``offsets`` of a tensor of ``shape``; file and byte offset where its data goes."""
        file = min(self._files[stage], key=self.sizes.__getitem__)
        base = self.sizes[file]
        blob = tensor_blob(dtype, tuple(sizes))
        self._bytes += [Bytes(file, base + at, data) for at, data in blob.parts]
        self.sizes[file] += blob.size
        offset = _SIZE(tuple(offsets))
        known = self.tensors.setdefault(key, (dtype, tuple(shape), []))
        assert known[:2] == (dtype, tuple(shape)), f"{key}: two shapes or dtypes"
        known[2].append(_CHUNK(offset, _SIZE(tuple(sizes))))
        self._places.append((_INDEX(key, offset), _STORED(file, base, blob.size)))
        return file, base + blob.data_offset

    def dtype(self, key: str) -> str | None:
        """The dtype of a tensor that has a chunk already."""
        return self.tensors[key][0] if key in self.tensors else None

    def object(self, key: str) -> None:
        """Add an empty object (what a module without extra state saves)."""
        self.objects.append(key)

    def rest(self, common: dict[str, Any]) -> Iterator[Bytes]:
        """All bytes but the tensors'; ``common`` is what core returns beside the tensors. Call once, at the end."""
        yield from self._bytes
        empty, file = object_blob([None]), next(iter(self.sizes))
        at = self.sizes[file]
        if self.objects:  # all of them are the same bytes
            yield Bytes(file, at, empty)
            self.sizes[file] += len(empty)
        self._places += [(_INDEX(key), _STORED(file, at, len(empty))) for key in self.objects]
        described = {
            key: _TENSOR(_PROPERTIES(_DTYPES[dtype]), _SIZE(shape), chunks)
            for key, (dtype, shape, chunks) in self.tensors.items()
        }
        described |= {key: _OBJECT() for key in self.objects}
        backend = {name: value for part in ("sharded", "common") for name, value in _backend(part)}
        for name, data in (
            (METADATA, safe_pickle.dump(_METADATA(described, None, dict(self._places)))),
            (COMMON, object_blob(common)),
            (BACKEND, json.dumps(backend).encode()),
        ):
            self.sizes[name] = len(data)
            yield Bytes(name, 0, data)


def _backend(part: str) -> list[tuple[str, Any]]:
    return [(f"{part}_backend", "torch_dist" if part == "sharded" else "torch"), (f"{part}_backend_version", 1)]
