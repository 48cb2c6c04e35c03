"""Inputs of every kind with the same records, for the tests of reading them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megapatch.tools.preprocess.reading.inputs import InputDigests, InputOptions, LineNumbers, chunks, find_sources
from megapatch.tools.preprocess.reading.records import Bad, place_of, read_records, text_of

TEXTS = [f"{i} é漢😀 " + "x" * (i * 37 % 101) + "\n" * (i % 3) for i in range(60)]
NUM_ROWS = len(TEXTS)
LINES = [json.dumps({"text": text, "meta": {"text": text[::-1]}, "n": i}).encode() for i, text in enumerate(TEXTS)]
JSONL = b"\n".join(LINES) + b"\n"
WANTED = [(text, text[::-1]) for text in TEXTS]
KEYS = ("text", "meta.text")


def packed(packing: str, data: bytes) -> bytes:
    """``data`` in two members, with padding where the format has it."""
    first, second = data[: len(data) // 3], data[len(data) // 3 :]
    if packing == "zst":
        import zstandard

        pack = zstandard.ZstdCompressor(write_checksum=True).compress
        skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
        return skippable + pack(first) + pack(second) + skippable
    pad = {"gz": b"\0" * 512, "xz": b"\0" * 8, "bz2": b""}[packing]
    compress: Any = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[packing]
    return compress(first) + compress(second) + pad


def table() -> Any:
    """The records as a table, with a column that is not read."""
    import pyarrow as pa

    meta = [{"text": reverse} for _, reverse in WANTED]
    return pa.table({"text": TEXTS, "meta": meta, "n": list(range(NUM_ROWS))})


def write_all(folder: Path) -> list[Path]:
    """The records in every kind of file."""
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    paths = [folder / f"a.jsonl{suffix}" for suffix in ("", ".gz", ".zst", ".xz", ".bz2")]
    for path in paths:
        path.write_bytes(JSONL if path.suffix == ".jsonl" else packed(path.suffix[1:], JSONL))
    pyarrow.parquet.write_table(table(), folder / "a.parquet", row_group_size=7)
    with pa.ipc.new_stream(folder / "stream.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=11)
    with pa.ipc.new_file(folder / "file.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=25)
    pyarrow.feather.write_feather(table(), folder / "a.feather")
    return [*paths, *(folder / name for name in ("a.parquet", "stream.arrow", "file.arrow", "a.feather"))]


def options(inputs: Iterable[Path | str], **more: Any) -> InputOptions:
    return InputOptions(**{"input": [str(one) for one in inputs], "text_key": list(KEYS), **more})


def read(
    inputs: Sequence[Path | str],
    chunk_bytes: int = 1 << 20,
    *,
    skip: int = 0,
    digests: InputDigests | None = None,
    **more: Any,
) -> list[tuple[str, ...]]:
    """The texts of all inputs, none of them bad."""
    texts, bad = read_with_bad(inputs, chunk_bytes, skip=skip, digests=digests, **more)
    assert bad == []
    return texts


def read_with_bad(
    inputs: Sequence[Path | str],
    chunk_bytes: int = 1 << 20,
    *,
    skip: int = 0,
    digests: InputDigests | None = None,
    keep_raw: bool = False,
    **more: Any,
) -> tuple[list[tuple[str, ...]], list[tuple[str, Bad]]]:
    """The texts of all inputs, and what is bad with its place."""
    asked, lines = options(inputs, **more), LineNumbers()
    take = text_of(asked.text_key)
    texts, bad = [], []
    for chunk in chunks(find_sources(asked), chunk_bytes, shard=asked.part, skip=skip, hashes=digests):
        for piece in chunk:
            records = read_records(piece, take, keep_raw=keep_raw)
            tally = records.tally
            assert tally.num_lines == len(records.taken) + tally.num_blank + tally.num_bad
            texts += records.taken
            bad += [(place_of(one, tally.piece, lines), one) for one in tally.bad]
    return texts, bad
