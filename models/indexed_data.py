"""megatron-core's indexed data: PREFIX.bin holds the ids of all documents, PREFIX.idx where each begins.

Layout of the .idx, little-endian: b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences u64, length of
the document table u64, lengths i32[n], byte offsets i64[n], document table i64[m] (first sequence of each document, and
the end), and for multimodal data modes i8[n]. megatron-core never compares the two files; this module does.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin (the prefix may hold dots)."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx (the prefix may hold dots)."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.manifest.json, written by mp-preprocess."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """What mp-preprocess says of its tokenizer, options and inputs; None for data made by another program."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or make the data again with mp-preprocess") from error
    expected = bin_path(prefix).stat().st_size if bin_path(prefix).is_file() else None
    if not isinstance(found, dict) or found.get("bin_bytes") != expected:
        raise UserError(
            f"{path}: does not describe {bin_path(prefix)} ({expected} bytes); make both with mp-preprocess"
        )
    return found


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype that megatron-core's DType.optimal_dtype gives: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write a .idx for documents of ``lengths`` tokens [n], each one sequence, one after another in the .bin."""
    if lengths.size and not 0 <= lengths.min() <= lengths.max() < 1 << 31:
        raise UserError(f"{path}: a document of {lengths.max():,} tokens; the format holds at most {(1 << 31) - 1:,}")
    code = next(code for code, name in DTYPES.items() if name == dtype.name)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(_offsets(lengths, dtype).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _offsets(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where each sequence begins, in bytes, int64 [n]."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    return np.concatenate([np.zeros(min(1, len(ends)), "<i8"), ends[:-1]])


@dataclass(frozen=True)
class Index:
    """What a .idx says: ``lengths`` in tokens int32 [n], ``documents`` int64 [m], a table of first sequences."""

    dtype: np.dtype
    lengths: np.ndarray
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        """Documents (a document may hold several sequences, or none)."""
        return len(self.documents) - 1


def read_index(prefix: str | Path) -> Index:
    """Read PREFIX.idx and check it, and PREFIX.bin's size against it; anything wrong is a UserError."""
    path = idx_path(prefix)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the index of {bin_path(prefix)}: make both with mp-preprocess")
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
    return _checked(prefix, np.dtype(DTYPES[code]), raw, num_sequences, table)


def _checked(prefix: str | Path, dtype: np.dtype, raw: np.ndarray, num_sequences: int, table: int) -> Index:
    at = [_HEADER.size, _HEADER.size + 4 * num_sequences, _HEADER.size + 12 * num_sequences]
    lengths = raw[at[0] : at[1]].view("<i4")
    offsets = raw[at[1] : at[2]].view("<i8")
    documents = raw[at[2] : at[2] + 8 * table].view("<i8")
    if (lengths.size and lengths.min() < 0) or not np.array_equal(offsets, _offsets(lengths, dtype)):
        raise UserError(f"{idx_path(prefix)}: lengths and offsets contradict each other; the file is damaged")
    if not table or documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{idx_path(prefix)}: the document table does not run from 0 to {num_sequences}; it is damaged")
    index = Index(dtype, lengths, documents)
    _check_bin(prefix, index)
    return index


def _check_bin(prefix: str | Path, index: Index) -> None:
    path = bin_path(prefix)
    if not path.is_file():
        raise UserError(f"{path}: no such file, but {idx_path(prefix)} is there; make both again with mp-preprocess")
    found, expected = path.stat().st_size, index.num_tokens * index.dtype.itemsize
    if found != expected:
        raise UserError(
            f"{path}: {found:,} bytes found, {expected:,} expected by {idx_path(prefix)}; "
            "the two files are not of one run: make both again with mp-preprocess"
        )


class IndexedDocuments:
    """The documents of PREFIX.bin/.idx, mapped into memory: ``data[i]`` is a read-only array of ids [tokens]."""

    def __init__(self, prefix: str | Path) -> None:
        self.index = read_index(prefix)
        ends = np.cumsum(self.index.lengths, dtype=np.int64)
        self._ends = np.concatenate([np.zeros(1, np.int64), ends])[self.index.documents]
        empty = self.index.num_tokens == 0  # an empty file cannot be mapped
        self.ids = np.zeros(0, self.index.dtype) if empty else np.memmap(bin_path(prefix), self.index.dtype, "r")

    def __len__(self) -> int:
        return self.index.num_documents

    def __getitem__(self, position: int) -> np.ndarray:
        if not -len(self) <= position < len(self):
            raise IndexError(f"document {position} of {len(self)}")
        position %= len(self)
        return self.ids[self._ends[position] : self._ends[position + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[position] for position in range(len(self)))
