"""Files of torch.save, written: everything around the tensors' data, which are copied in afterwards.

torch checks no CRC of a storage. Imports no torch.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.safe_pickle import Call, Global, Persistent
from megapatch.models.torch_save import ITEM_BYTES, contiguous

_STORAGE_OF = {dtype: Global("torch", storage) for storage, dtype in safe_pickle.STORAGES.items()}
_ALIGN_BYTES = 64
_BIG, _MANY = 0xFFFFFFFF, 0xFFFF


class Blob(NamedTuple):
    """A torch.save file without its tensors: ``parts`` at their offsets, and where each tensor's bytes go."""

    parts: tuple[tuple[int, bytes], ...]
    holes: tuple[int, ...]
    size: int

    @property
    def data_offset(self) -> int:
        """Where the bytes of the only tensor go."""
        (hole,) = self.holes
        return hole


class Tensors:
    """Contiguous tensors of one torch.save file, each with a storage of its own; numbered in the order of adding."""

    def __init__(self) -> None:
        self._bytes: list[int] = []

    def add(self, dtype: str, shape: tuple[int, ...]) -> Call:
        """What stands for the next tensor in the value that is saved."""
        storage = Persistent(("storage", _STORAGE_OF[dtype], str(len(self._bytes)), "cpu", prod(shape)))
        self._bytes.append(prod(shape) * ITEM_BYTES[dtype])
        hooks = Global("collections", "OrderedDict")()
        return Global("torch._utils", "_rebuild_tensor_v2")(storage, 0, shape, contiguous(shape), False, hooks)

    def blob(self, value: Any) -> Blob:
        """What torch.save writes for a value, with holes for the tensors' data."""
        return _zip(safe_pickle.dump(value), self._bytes)


@lru_cache(4096)
def tensor_blob(dtype: str, shape: tuple[int, ...]) -> Blob:
    """What torch.save writes for a contiguous tensor, with a hole for the data."""
    tensors = Tensors()
    return tensors.blob(tensors.add(dtype, shape))


def object_blob(value: Any) -> bytes:
    """What torch.save writes for plain values (no tensors)."""
    blob = Tensors().blob(value)
    return b"".join(data for _, data in blob.parts)


def _zip(data_pkl: bytes, storages: Sequence[int]) -> Blob:
    records: list[tuple[str, bytes | int]] = [("data.pkl", data_pkl), ("byteorder", b"little")]
    records += [(f"data/{n}", size) for n, size in enumerate(storages)]
    records += [("version", b"3\n")]
    parts: list[tuple[int, bytes]] = []
    directory, holes, at = [], [], 0
    for name, data in records:
        head, entry = _headers(f"archive/{name}".encode(), data, at)
        parts.append((at, head))
        directory.append(entry)
        at += len(head)
        if isinstance(data, int):
            holes.append(at)
            at += data
        else:
            parts.append((at, data))
            at += len(data)
    end = b"".join([*directory, *_end(len(records), sum(map(len, directory)), at)])
    return Blob(tuple(_joined([*parts, (at, end)])), tuple(holes), at + len(end))


def _headers(name: bytes, data: bytes | int, at: int) -> tuple[bytes, bytes]:
    """Local header, padded so that the content is aligned, and directory entry of a record at offset ``at``."""
    size, crc = (data, 0) if isinstance(data, int) else (len(data), zlib.crc32(data))
    shown, version = (size, 0) if size < _BIG else (_BIG, 45)
    sizes = b"" if size < _BIG else struct.pack("<HHQQ", 1, 16, size, size)
    pad = -(at + 30 + len(name) + len(sizes) + 4) % _ALIGN_BYTES
    extra = sizes + struct.pack("<HH", 0x4246, pad) + b"Z" * pad  # 'FB', as torch pads
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, version, 0, 0, 0, 0, crc, shown, shown, len(name), len(extra))
    wide = sizes[4:] + (b"" if at < _BIG else struct.pack("<Q", at))
    more = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    entry = struct.pack("<IHHHHHHIII", 0x02014B50, version, version, 0, 0, 0, 0, crc, shown, shown)
    entry += struct.pack("<HHHHHII", len(name), len(more), 0, 0, 0, 0, min(at, _BIG))
    return head + name + extra, entry + name + more


def _end(count: int, directory_bytes: int, at: int) -> Iterator[bytes]:
    """End of the zip's directory, which starts at ``at``; with the zip64 form where offsets or the count need it."""
    if at >= _BIG or count >= _MANY:
        yield struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, directory_bytes, at)
        yield struct.pack("<IIQI", 0x07064B50, 0, at + directory_bytes, 1)
    shown = min(count, _MANY)
    yield struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, shown, shown, directory_bytes, min(at, _BIG), 0)


def _joined(parts: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The same bytes, neighbours joined."""
    start, data = parts[0]
    for at, more in parts[1:]:
        if at == start + len(data):
            data += more
        else:
            yield start, data
            start, data = at, more
    yield start, data
