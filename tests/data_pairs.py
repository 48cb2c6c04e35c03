"""Pairs, manifests and a tokenizer of bytes for tests of what stands around the data; nothing here needs torch."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from megapatch.models.commit import digest
from megapatch.models.indexed_data import bin_path, idx_path, manifest_path, write_index
from megapatch.models.tokenizer import Tokenizer

EOD = 256
SPECIAL = ["<eos>", "<|user|>", "<|assistant|>"]  # 256 to 258


def byte_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> Path:
    """A tokenizer whose first 256 ids are the bytes in order of their value; then the special tokens."""
    shown, others = set(pre_tokenizers.ByteLevel.alphabet()), iter(range(256, 512))
    pieces = [chr(byte) if chr(byte) in shown else chr(next(others)) for byte in range(256)]
    made = Engine(models.BPE(vocab={piece: byte for byte, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0]}))
    return folder


def write_pair(prefix: Path, documents: Sequence[Sequence[Any]], dtype: Any = np.uint16) -> Path:
    """PREFIX.bin and PREFIX.idx, one sequence a document."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path(prefix).write_bytes(np.array([one for ids in documents for one in ids], dtype).tobytes())
    write_index(idx_path(prefix), np.array([len(ids) for ids in documents], np.int64), np.dtype(dtype))
    return prefix


def write_tables(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], modes: bytes = b"") -> Path:
    """PREFIX.bin and PREFIX.idx in uint16 of documents of several sequences, byte by byte as the format has it."""
    sequences = [ids for sequences in documents for ids in sequences]
    lengths = np.array([len(ids) for ids in sequences], "<i4")
    table = np.cumsum([0, *(len(sequences) for sequences in documents)]).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sequences), len(table))
    offsets = 2 * (np.cumsum(lengths, dtype="<i8") - lengths)
    idx_path(prefix).write_bytes(header + lengths.tobytes() + offsets.tobytes() + table.tobytes() + modes)
    bin_path(prefix).write_bytes(np.array([one for ids in sequences for one in ids], "<u2").tobytes())
    return prefix


def about(prefix: Path) -> dict[str, Any]:
    """What a manifest says of a pair."""
    files = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    return {
        "bin_bytes": files["bin"].stat().st_size,
        "xxh3_128": {name: digest(path) for name, path in files.items()},
    }


def write_manifest(prefix: Path, folder: Path | None, documents: Sequence[Sequence[int]], **more: Any) -> None:
    """PREFIX.manifest.json, with as much of mp-preprocess's as tools ask for."""
    said: dict[str, Any] = {"tool": "mp-preprocess", "format": "corpus", **about(prefix)}
    if folder is not None:
        made = Tokenizer(folder)
        numbers = {"digest": made.digest, "vocab_size": made.vocab_size, "eod_id": made.eod_id}
        said["tokenizer"] = {"folder": str(folder), **numbers}
    said["counts"] = {"documents": len(documents), "tokens": sum(map(len, documents))}
    manifest_path(prefix).write_text(json.dumps(said | more, indent=1))


def text(words: str) -> list[int]:
    """The ids of ``words``, which may hold special tokens by name, in the byte tokenizer."""
    ids: list[int] = []
    while words:
        name = next((name for name in SPECIAL if words.startswith(name)), None)
        if name is None:
            ids += words[0].encode()
        else:
            ids.append(EOD + SPECIAL.index(name))
        words = words[len(name or words[0]) :]
    return ids


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """How far the resident memory of this process rises above where it is while ``work`` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now

    def status(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    before = status("VmRSS")
    work()
    return status("VmHWM") - before
