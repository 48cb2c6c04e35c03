"""Files of torch.save, read: a zip, stored without compression, whose records are a pickle and raw storages.

Here is where a tensor's bytes lie; torch_write has the other direction. Imports no torch.
"""

import io
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megapatch.models import safe_pickle
from megapatch.models.cli import UserError
from megapatch.models.stand_ins import Damaged

ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
_MOST_AXES = 64
_RECORD = re.compile(r"data\.pkl|byteorder|version|data/\d+|\.[\w./]+")
_END, _POINTER, _END64 = struct.Struct("<IHHHHIIH"), struct.Struct("<IIQI"), struct.Struct("<IQHHIIQQQQ")  # of a zip
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
        found = self.zip.infolist()
        self.records = {record.filename.partition("/")[2]: record for record in found}
        if wrong := self._other_reading(found):
            raise UserError(f"{where}: {wrong}; torch would read it in another way: do not load this file")

    def _other_reading(self, found: Sequence[zipfile.ZipInfo]) -> str | None:
        """Why torch might find something else in this file than is found here; None: it cannot.

        torch takes a file that does not start as a zip for an older format, which is a bare pickle; it looks for the
        directory where the end of the file says, and ignores case. Python's zipfile is more lenient.
        """
        if _bytes(self, 0, 4) != b"PK\x03\x04":
            return "does not start as a zip"
        directory = _directory(self)
        if directory is None or directory != self.zip.start_dir:  # type: ignore[attr-defined]
            return "its directory is not where its end says"
        if len({name.lower() for name in self.records}) < len(found):
            return "two records of one name"
        if len({record.filename.partition("/")[0] for record in found}) != 1:
            return "records in several folders"
        others = [name for name in self.records if not _RECORD.fullmatch(name)]
        return f"a record {others[0][:40]!a}" if others else None

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
                try:
                    content = held.content()
                except Damaged as error:
                    raise UserError(f"{self.where}: {error}; the file is damaged") from error
                check_bytes(content, self.where)
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


def _bytes(archive: Archive, start: int, count: int) -> bytes:
    """``count`` bytes of a zip from ``start``; fewer where it ends."""
    part = Slice(archive.file, archive.start, archive.length)
    part.seek(start)
    return part.read(count) if start >= 0 else b""


def _directory(archive: Archive) -> int | None:
    """Where the zip's directory starts by the record at its very end (by the zip64 one, where there is one)."""
    at = archive.length - _END.size
    sign, *_, start, comment_bytes = _END.unpack(_bytes(archive, at, _END.size).rjust(_END.size, b"\0"))
    if sign != 0x06054B50 or comment_bytes:
        return None
    pointer = _bytes(archive, at - _POINTER.size, _POINTER.size)
    if not pointer.startswith(b"PK\x06\x07"):
        return start
    at -= _POINTER.size + _END64.size
    sign, *_, start = _END64.unpack(_bytes(archive, at, _END64.size).rjust(_END64.size, b"\0"))
    return start if sign == 0x06064B50 and _POINTER.unpack(pointer)[2] == at else None


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
        safe_pickle.load(data, where, whole=True)


def open_archive(path: Path) -> Archive:
    """A whole file as an Archive (the file stays open as long as it)."""
    return Archive(path.open("rb"), 0, path.stat().st_size, str(path))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
