"""Files of torch.save: a zip, stored without compression, whose records are a pickle and raw storages.

Read: where a tensor's bytes lie. Write: everything around them, so that they can be copied in afterwards. torch
checks no CRC of a storage. Imports no torch.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.cli import UserError
from megapatch.models.safe_pickle import Call, Global, Persistent

ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
_STORAGE_OF = {dtype: Global("torch", storage) for storage, dtype in safe_pickle.STORAGES.items()}
_ALIGN_BYTES = 64
_BIG, _MANY = 0xFFFFFFFF, 0xFFFF
_MOST_AXES = 64
Shape = tuple[int, ...]


class Slice:
    """``length`` bytes of an open file from ``start``, as a file that zipfile can read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = max(0, to + (0, self.at, self.length)[whence])
        return self.at

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if count < 0 else min(count, left))
        self.at += len(data)
        return data


class Region(NamedTuple):
    """A tensor in a file: ``shape`` elements of ``dtype``, contiguous from byte ``offset`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Archive:
    """A torch.save zip in bytes [start, start + length) of an open file; ``where`` names it in errors."""

    def __init__(self, file: BinaryIO, start: int, length: int, where: str) -> None:
        self.file, self.start, self.length, self.where = file, start, length, where
        try:
            self.zip = zipfile.ZipFile(Slice(file, start, length))  # type: ignore[arg-type]
        except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, struct.error) as error:
            raise UserError(f"{where}: not a torch.save file ({error}); the file is damaged") from error
        self.records = {record.filename.partition("/")[2]: record for record in self.zip.infolist()}
        if len(self.records) < len(self.zip.infolist()):
            raise UserError(f"{where}: two records of one name; the file is damaged")

    def read(self, name: str) -> bytes:
        """A record's content."""
        start, count = self._place(name)
        self.file.seek(self.start + start)
        return self.file.read(count)

    def value(self, foreign: set[str] | None = None) -> Any:
        """The saved value, with stand-ins for tensors; names outside the allow-list are a UserError.

        ``foreign``: as safe_pickle.load says.
        """
        if "byteorder" in self.records and self.read("byteorder") != b"little":
            raise UserError(f"{self.where}: saved in big-endian byte order; convert it on a machine of that kind")
        return safe_pickle.load(self.read("data.pkl"), self.where, _storage, foreign)

    def tensor(self) -> Region:
        """Where the only tensor of this file lies."""
        value = self.value()
        if not isinstance(value, safe_pickle.StoredTensor):
            raise UserError(f"{self.where}: holds no tensor; the file is damaged")
        return self.region(value)

    def region(self, tensor: safe_pickle.StoredTensor, name: str = "") -> Region:
        """Where a tensor of the saved value lies; ``name`` is for errors. It must be contiguous (UserError)."""
        where = f"{self.where}: {name}" if name else self.where
        dtype, shape, strides, first, key = _described(tensor, where)
        if strides != contiguous(shape) and prod(shape) > 1:
            raise UserError(
                f"{where}: a tensor of dtype {dtype}, shape {shape}, strides {strides}; "
                "only contiguous tensors of plain dtypes can be converted: save it with .contiguous()"
            )
        start, count = self._place(f"data/{key}")
        item = ITEM_BYTES[dtype]
        if (first + prod(shape)) * item > count:
            raise UserError(f"{where}: {count} bytes stored for shape {shape}; the file is damaged")
        return Region(dtype, shape, self.start + start + first * item)

    def check_nested(self, value: Any) -> None:
        """Refuse foreign pickles in the bytes that ``value`` holds: Transformer Engine reads its own from there."""
        for held in _walk(value):
            if isinstance(held, safe_pickle.BytesFile):
                check_bytes(held.content(), self.where)
            elif isinstance(held, safe_pickle.StoredTensor) and _described(held, self.where)[0] == "uint8":
                region = self.region(held)
                self.file.seek(region.offset)
                check_bytes(self.file.read(prod(region.shape)), self.where)

    def _place(self, name: str) -> tuple[int, int]:
        """Offset in this zip and size of a record's content."""
        record = self.records.get(name)
        if record is None:
            raise UserError(f"{self.where}: no record {name}; not a torch.save file, or damaged")
        head = Slice(self.file, self.start, self.length)
        head.seek(record.header_offset + 26)  # lengths of name and extra field in the local header
        lengths = head.read(4)
        start = record.header_offset + 30 + sum(struct.unpack("<HH", lengths)) if len(lengths) == 4 else self.length
        inside = 0 <= record.header_offset and start + record.file_size <= self.length
        if record.compress_type != zipfile.ZIP_STORED or not inside:
            raise UserError(f"{self.where}: record {name} is compressed or cut short; the file is damaged")
        return start, record.file_size


def _storage(saved: Any) -> safe_pickle.Storage:
    """A reference to a storage; torch writes (storage, kind, record, device, count)."""
    if type(saved) is not tuple or len(saved) != 5 or saved[0] != "storage" or type(saved[2]) is not str:
        raise ValueError("a reference that is no storage")
    return safe_pickle.Storage(*saved)


def _described(tensor: safe_pickle.StoredTensor, where: str) -> tuple[str, Shape, Shape, int, str]:
    """dtype, shape, strides, first item and record of a tensor; one that torch does not write is a UserError."""
    try:
        storage, first, shape, strides = tensor.args[:4]
        _, dtype, key, _, _ = storage.args
        dtype = tensor.args[6] if len(tensor.args) > 6 else dtype  # of _rebuild_tensor_v3: its storage has none
        shape, strides = tuple(shape), tuple(strides)
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 62 for n in (first, *shape, *strides)):
            raise ValueError(f"first item, shape or strides that cannot be, {len(shape)} axes")
        if type(dtype) is not str or dtype not in ITEM_BYTES:
            raise ValueError("unknown dtype")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: no tensor as torch saves it ({error}); the file is damaged") from error
    return dtype, shape, strides, first, key


def _walk(value: Any) -> Iterator[Any]:
    """Every value inside ``value``, once."""
    left, seen = [value], set()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple | set):
            left += item
        elif isinstance(item, safe_pickle.Record) and not isinstance(item, safe_pickle.StoredTensor):
            left += vars(item).values()


def check_bytes(data: bytes, where: str) -> None:
    """Refuse (UserError) bytes that hold a pickle, bare or in a torch.save file, which names what it must not."""
    if not data:
        return
    if data.startswith(b"PK"):
        archive = Archive(io.BytesIO(data), 0, len(data), where)
        archive.value()
    else:
        safe_pickle.load(data, where)


def open_archive(path: Path) -> Archive:
    """A whole file as an Archive (the file stays open as long as it)."""
    return Archive(path.open("rb"), 0, path.stat().st_size, str(path))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


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
