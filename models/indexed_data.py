"""megatron-core's indexed data: PREFIX.bin holds the ids of all documents, PREFIX.idx where each begins.

Layout of the .idx, little-endian: b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences u64, length of
the document table u64, lengths i32[n], byte offsets i64[n], document table i64[m] (first sequence of each document, and
the end), and for multimodal data modes i8[n]. megatron-core never compares the two files; this module does.

Whatever the number of documents, a few MiB at a time are in memory: tables are mapped, and read in blocks.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 19  # entries of a table in memory at a time


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin (the prefix may hold dots)."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx (the prefix may hold dots)."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.manifest.json, written by mp-preprocess."""
    return Path(f"{prefix}.manifest.json")


def partial_path(prefix: str | Path) -> Path:
    """PREFIX.partial, the folder of a run that lives or was interrupted."""
    return Path(f"{prefix}.partial")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """What mp-preprocess says of its tokenizer, options and inputs; None for data made by another program."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or make the data again") from error
    size = bin_path(prefix).stat().st_size if bin_path(prefix).is_file() else None
    said = found.get("bin_bytes") if isinstance(found, dict) else None
    if not isinstance(found, dict) or said != size:
        there = "no such file" if size is None else f"{size} bytes found"
        tool = found.get("tool", "mp-preprocess") if isinstance(found, dict) else "mp-preprocess"
        raise UserError(
            f"{path}: does not describe {bin_path(prefix)}: {there}, {said} expected; make both with {tool}"
        )
    return found


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype that megatron-core's DType.optimal_dtype gives: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write a .idx for documents of ``lengths`` tokens [n], each one sequence, one after another in the .bin.

    ``lengths`` may be mapped from a file: what was read is not kept in memory.
    """
    _write(path, dtype, [(lengths, None, None)])


def join_indexes(path: Path, parts: "Sequence[Index]") -> None:
    """Write the .idx for the .bin files of ``parts`` (of one dtype), one after another."""
    _write(path, parts[0].dtype, [(part.lengths, part.documents, part.modes) for part in parts])


def _write(
    path: Path, dtype: np.dtype, parts: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]
) -> None:
    """From (lengths [n], document table [m] or None for one sequence a document, modes [n] or None) of each part."""
    for lengths, _, _ in parts:
        _check_lengths(path, lengths)
    code = next(code for code, name in DTYPES.items() if name == dtype.name)
    num_documents = sum(len(lengths) if table is None else len(table) - 1 for lengths, table, _ in parts)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, sum(len(lengths) for lengths, _, _ in parts), num_documents + 1))
        for lengths, _, _ in parts:
            file.writelines(block.astype("<i4").data for block in blocks(lengths))
        start = 0
        for block in (block for lengths, _, _ in parts for block in blocks(lengths)):
            ends = start + np.cumsum(block, dtype="<i8") * dtype.itemsize
            file.write((ends - block.astype("<i8") * dtype.itemsize).data)
            start = int(ends[-1])
        file.write(np.zeros(1, "<i8").data)
        start = 0
        for lengths, table, _ in parts:
            file.writelines(block.data for block in _table(lengths, table, start))
            start += len(lengths)
        for modes in (modes for _, _, modes in parts if modes is not None):
            file.writelines(block.astype("i1").data for block in blocks(modes))


def _table(lengths: np.ndarray, table: np.ndarray | None, start: int) -> Iterator[np.ndarray]:
    """The ends of documents in the document table, int64, when ``start`` sequences come before."""
    if table is not None:
        yield from ((start + block).astype("<i8") for block in blocks(table[1:]))
        return
    for at in range(0, len(lengths), _BLOCK):
        yield np.arange(start + at, start + min(at + _BLOCK, len(lengths)), dtype="<i8") + 1


def _check_lengths(path: Path, lengths: np.ndarray) -> None:
    for block in blocks(lengths):
        if not 0 <= block.min() <= block.max() < 1 << 31:
            raise UserError(f"{path}: a document of {block.max():,} tokens; the format holds at most {(1 << 31) - 1:,}")


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """``array`` [n] in parts of at most half a million entries; of a mapped one, what was read leaves the memory."""
    for at in range(0, len(array), _BLOCK):
        yield np.asarray(array[at : at + _BLOCK])
        release(array)


def release(array: np.ndarray) -> None:
    """Let go of the pages of a mapped array that were read; they are read again where they are asked for again."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and getattr(array, "mode", "c") != "c":
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Index:
    """What a .idx says: ``lengths`` in tokens int32 [n], ``offsets`` in bytes int64 [n], ``documents`` int64 [m], a
    table of first sequences, ``modes`` int8 [n] or None; all are mapped from the file."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray
    modes: np.ndarray | None
    num_tokens: int

    @property
    def num_sequences(self) -> int:
        """Sequences in all documents together."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents (a document may hold several sequences, or none)."""
        return len(self.documents) - 1

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where documents ``first`` to ``last`` - 1 begin, and where the last of them ends, in tokens, int64 [+ 1]."""
        sequences = np.asarray(self.documents[first : last + 1])
        found = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < self.num_sequences
        found[inside] = self.offsets[sequences[inside]] // self.dtype.itemsize
        return found

    def release(self) -> None:
        """Let go of the pages read so far."""
        release(self.lengths)


def read_index(prefix: str | Path, tool: str = "mp-preprocess") -> Index:
    """Read PREFIX.idx and check it, and PREFIX.bin's size against it; anything wrong is a UserError, which says to make
    them with ``tool``."""
    path = idx_path(prefix)
    if not path.is_file():
        refuse_suffix(prefix)
        raise _missing(prefix, tool)
    size = path.stat().st_size
    if size < _HEADER.size:
        raise UserError(f"{path}: {size} bytes found, expected a header of {_HEADER.size}; the file is damaged")
    with path.open("rb") as file:
        magic, version, code, num_sequences, table = _HEADER.unpack(file.read(_HEADER.size))
    if magic != MAGIC:
        raise UserError(f"{path}: starts with {magic!r}, expected {MAGIC!r}; this is not a megatron-core index")
    if version != VERSION or code not in DTYPES:
        raise UserError(
            f"{path}: version {version}, dtype code {code} found; expected version {VERSION}, code 1 to 8; "
            "the file is damaged or newer than this program"
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * table
    if size not in (expected, expected + num_sequences):  # the latter: with modes
        raise UserError(
            f"{path}: {size:,} bytes found, expected {expected:,} for {num_sequences:,} sequences; the file is damaged"
        )
    raw = np.memmap(path, mode="r")
    index = _mapped(np.dtype(DTYPES[code]), raw, num_sequences, table, size > expected)
    _check_offsets(prefix, index)
    _check_table(prefix, index)
    _check_bin(prefix, index, tool)
    return index


def refuse_suffix(prefix: str | Path) -> None:
    """Refuse the name of a file where its prefix is asked for."""
    name = Path(prefix)
    if name.suffix in (".bin", ".idx") and name.is_file():
        raise UserError(f"{prefix}: is a file; give its prefix, {name.with_suffix('')}, without {name.suffix}")


def _missing(prefix: str | Path, tool: str) -> UserError:
    partial = partial_path(prefix)
    if partial.is_dir():
        return UserError(
            f"{idx_path(prefix)}: no such file, but {partial} is there, of a run that was interrupted or still writes; "
            f"wait for it, or finish it with the same {tool} and --resume"
        )
    what = f"expected the index of {bin_path(prefix)}: make both with {tool}"
    return UserError(f"{idx_path(prefix)}: no such file; {what}")


def _mapped(dtype: np.dtype, raw: np.ndarray, num_sequences: int, table: int, with_modes: bool) -> Index:
    at = [_HEADER.size + size * num_sequences for size in (0, 4, 12)]
    lengths = raw[at[0] : at[1]].view("<i4")
    end = at[2] + 8 * table
    return Index(
        dtype,
        lengths,
        raw[at[1] : at[2]].view("<i8"),
        raw[at[2] : end].view("<i8"),
        raw[end:].view("i1") if with_modes else None,
        sum(int(block.sum(dtype=np.int64)) for block in blocks(lengths)),
    )


def _check_offsets(prefix: str | Path, index: Index) -> None:
    start = 0
    for at in range(0, index.num_sequences, _BLOCK):
        lengths = index.lengths[at : at + _BLOCK].astype(np.int64) * index.dtype.itemsize
        ends = start + np.cumsum(lengths)
        if lengths.min() < 0 or not np.array_equal(index.offsets[at : at + _BLOCK], ends - lengths):
            raise UserError(f"{idx_path(prefix)}: lengths and offsets contradict each other; the file is damaged")
        start = int(ends[-1])
        index.release()


def _check_table(prefix: str | Path, index: Index) -> None:
    table = index.documents
    ordered = len(table) > 0 and table[0] == 0 and table[-1] == index.num_sequences
    for at in range(0, len(table), _BLOCK):
        ordered = ordered and not (np.diff(table[at : at + _BLOCK + 1]) < 0).any()
        index.release()
    if not ordered:
        raise UserError(
            f"{idx_path(prefix)}: the document table does not run from 0 to {index.num_sequences}; it is damaged"
        )


def _check_bin(prefix: str | Path, index: Index, tool: str) -> None:
    path = bin_path(prefix)
    if not path.is_file():
        raise UserError(f"{path}: no such file, but {idx_path(prefix)} is there; make both again with {tool}")
    found, expected = path.stat().st_size, index.num_tokens * index.dtype.itemsize
    if found != expected:
        raise UserError(
            f"{path}: {found:,} bytes found, {expected:,} expected by {idx_path(prefix)}; "
            f"the two files are not of one run: make both again with {tool}"
        )


class IndexedDocuments:
    """The documents of PREFIX.bin/.idx, mapped into memory: ``data[i]`` is a read-only array of ids [tokens]."""

    def __init__(self, prefix: str | Path, tool: str = "mp-preprocess") -> None:
        self.index = read_index(prefix, tool)
        empty = self.index.num_tokens == 0  # an empty file cannot be mapped
        self.ids = np.zeros(0, self.index.dtype) if empty else np.memmap(bin_path(prefix), self.index.dtype, "r")
        self._documents, self._offsets = np.asarray(self.index.documents), np.asarray(self.index.offsets)

    def __len__(self) -> int:
        return self.index.num_documents

    def __getitem__(self, position: int) -> np.ndarray:
        if not -len(self) <= position < len(self):
            raise IndexError(f"document {position} of {len(self)}")
        position %= len(self)
        return self.ids[self._start(position) : self._start(position + 1)]

    def _start(self, position: int) -> int:
        sequence = self._documents[position]
        inside = sequence < len(self._offsets)
        return self._offsets[sequence] // self.ids.itemsize if inside else self.index.num_tokens

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[position] for position in range(len(self)))
