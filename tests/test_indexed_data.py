"""Indexed data: byte-identical to megatron-core's own builder, read by its reader, and damage is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_pairs import peak_growth_bytes
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megapatch.models.cli import UserError
from megapatch.models.data_formats import format_of, pairs_of, parallel
from megapatch.models.indexed_data import (
    IndexedDocuments,
    bin_path,
    dtype_for,
    idx_path,
    manifest_path,
    read_index,
    read_manifest,
    write_index,
)

LENGTHS = [[], [1], [0], [3, 1, 0, 5], [7] * 1000]


def documents(lengths: list[int], dtype: np.dtype) -> list[np.ndarray]:
    return [np.arange(n, dtype=dtype) + i % 100 for i, n in enumerate(lengths)]


def write_ours(prefix: Path, docs: list[np.ndarray], dtype: np.dtype) -> None:
    bin_path(prefix).write_bytes(b"".join(doc.tobytes() for doc in docs))
    write_index(idx_path(prefix), np.array([len(doc) for doc in docs], np.int64), dtype)


def write_theirs(prefix: Path, docs: list[np.ndarray], dtype: np.dtype) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype.type)
    for doc in docs:
        builder.add_document(torch.from_numpy(doc.astype(np.int64)), [len(doc)])
    builder.finalize(str(idx_path(prefix)))


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_501, 65_536, 65_537, 200_000])
def test_dtype_is_the_one_megatron_core_takes(vocab_size: int) -> None:
    assert dtype_for(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("lengths", LENGTHS, ids=[str(len(one)) for one in LENGTHS])
@pytest.mark.parametrize("dtype", [np.dtype(np.uint16), np.dtype(np.int32)], ids=str)
def test_files_are_those_of_megatron_core_and_each_reads_the_other(
    tmp_path: Path, lengths: list[int], dtype: np.dtype
) -> None:
    docs = documents(lengths, dtype)
    write_ours(tmp_path / "ours.v1", docs, dtype)
    write_theirs(tmp_path / "theirs.v1", docs, dtype)
    assert (tmp_path / "ours.v1.idx").read_bytes() == (tmp_path / "theirs.v1.idx").read_bytes()
    assert (tmp_path / "ours.v1.bin").read_bytes() == (tmp_path / "theirs.v1.bin").read_bytes()
    ours = IndexedDocuments(tmp_path / "theirs.v1")
    assert [doc.tolist() for doc in ours] == [doc.tolist() for doc in docs]
    assert (ours.index.dtype, ours.index.num_tokens, len(ours)) == (dtype, sum(lengths), len(lengths))
    if sum(lengths):  # megatron-core cannot open a file without tokens
        theirs = IndexedDataset(str(tmp_path / "ours.v1"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == [doc.tolist() for doc in docs]


@pytest.mark.parametrize("multimodal", [False, True])
def test_documents_of_several_sequences_are_read_whole(tmp_path: Path, multimodal: bool) -> None:
    prefix = tmp_path / "data"
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.int32, multimodal=multimodal)
    for doc, lengths in (([1, 2, 3], [1, 2]), ([], []), ([4, 5], [2])):
        modes = [0] * len(lengths) if multimodal else None
        builder.add_document(torch.tensor(doc), lengths, modes)
    builder.finalize(str(idx_path(prefix)))
    data = IndexedDocuments(prefix)
    assert [doc.tolist() for doc in data] == [[1, 2, 3], [], [4, 5]]
    assert data[-1].tolist() == [4, 5]
    with pytest.raises(IndexError):
        data[3]


def overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    """Damage to the .idx: other bytes at an offset."""

    def damage(prefix: Path) -> None:
        old = idx_path(prefix).read_bytes()
        idx_path(prefix).write_bytes(old[:at] + data + old[at + len(data) :])

    return damage


def cut(path: Callable[[Path], Path], num_bytes: int) -> Callable[[Path], None]:
    """Damage: fewer bytes in the .bin or the .idx."""
    return lambda prefix: path(prefix).write_bytes(path(prefix).read_bytes()[:num_bytes]) and None


# The index has 3 sequences: lengths at byte 34, offsets at 46, documents at 70, 102 bytes in all; the .bin has 18.
DAMAGE = [
    (lambda prefix: idx_path(prefix).unlink(), "data.idx: no such file"),
    (lambda prefix: bin_path(prefix).unlink(), "data.bin: no such file"),
    (cut(bin_path, 16), "data.bin: 16 bytes found, 18 expected"),
    (cut(bin_path, 0), "data.bin: 0 bytes found, 18 expected"),
    (lambda prefix: bin_path(prefix).write_bytes(bytes(19)), "data.bin: 19 bytes found, 18 expected"),
    (cut(idx_path, 33), "data.idx: 33 bytes found, expected a header of 34"),
    (cut(idx_path, 100), "data.idx: 100 bytes found, expected 102"),
    (overwrite(0, b"MMIDIDY"), "this is not a megatron-core index"),
    (overwrite(9, b"\x02"), "version 2, dtype code 8 found"),
    (overwrite(17, b"\x09"), "version 1, dtype code 9 found"),
    (overwrite(17, b"\x04"), "lengths and offsets contradict"),
    (overwrite(18, b"\x04"), "data.idx: 102 bytes found, expected 114"),
    (overwrite(34, b"\x05"), "lengths and offsets contradict"),
    (overwrite(34, b"\xff\xff\xff\xff"), "lengths and offsets contradict"),
    (overwrite(46, b"\x02"), "lengths and offsets contradict"),
    (overwrite(70, b"\x01"), "the document table does not run from 0 to 3"),
    (overwrite(78, b"\x03"), "the document table does not run from 0 to 3"),
    (overwrite(94, b"\x02"), "the document table does not run from 0 to 3"),
]


@pytest.mark.parametrize("damage, message", DAMAGE, ids=[f"{i}-{text[:24]}" for i, (_, text) in enumerate(DAMAGE)])
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    prefix = tmp_path / "data"
    write_ours(prefix, documents([2, 4, 3], np.dtype(np.uint16)), np.dtype(np.uint16))
    assert read_index(prefix).num_tokens == 9
    damage(prefix)
    with pytest.raises(UserError) as error:
        read_index(prefix)
    assert message in str(error.value) and str(prefix) in str(error.value)


def test_a_stale_index_beside_a_new_bin_is_refused(tmp_path: Path) -> None:
    dtype = np.dtype(np.uint16)
    write_theirs(tmp_path / "old", documents([5, 5], dtype), dtype)
    write_theirs(tmp_path / "new", documents([5, 4], dtype), dtype)
    shutil.copyfile(tmp_path / "old.idx", tmp_path / "new.idx")
    with pytest.raises(UserError, match=r"new\.bin: 18 bytes found, 20 expected by .*new\.idx"):
        IndexedDocuments(tmp_path / "new")


def test_a_manifest_must_describe_the_data_beside_it(tmp_path: Path) -> None:
    prefix = tmp_path / "data.v1"
    write_ours(prefix, documents([2], np.dtype(np.int32)), np.dtype(np.int32))
    assert read_manifest(prefix) is None
    manifest_path(prefix).write_text('{"bin_bytes": 8}')
    assert read_manifest(prefix) == {"bin_bytes": 8}
    for text, message in (("{", "not JSON"), ("[]", "does not describe"), ('{"bin_bytes": 9}', "does not describe")):
        manifest_path(prefix).write_text(text)
        with pytest.raises(UserError, match=rf"data\.v1\.manifest\.json: {message}"):
            read_manifest(prefix)


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2,147,483,648 tokens"):
        write_index(tmp_path / "data.idx", np.array([1, 1 << 31]), np.dtype(np.int32))
    assert not (tmp_path / "data.idx").exists()


def test_documents_are_read_only(tmp_path: Path) -> None:
    write_ours(tmp_path / "data", documents([2], np.dtype(np.int32)), np.dtype(np.int32))
    with pytest.raises(ValueError, match="read-only"):
        IndexedDocuments(tmp_path / "data")[0][0] = 1


def test_an_index_of_ten_million_documents_is_written_and_read_in_bounded_memory(tmp_path: Path) -> None:
    count = 10_000_000
    lengths = np.memmap(tmp_path / "lengths", np.int32, "w+", shape=(count,))
    lengths[:] = 3
    lengths.flush()
    mapped = np.memmap(tmp_path / "lengths", np.int32, "r")
    del lengths
    with bin_path(tmp_path / "data").open("wb") as file:
        file.truncate(count * 3 * 2)
    assert peak_growth_bytes(lambda: write_index(idx_path(tmp_path / "data"), mapped, np.dtype(np.uint16))) < 30 << 20
    assert peak_growth_bytes(lambda: read_index(tmp_path / "data")) < 30 << 20
    assert idx_path(tmp_path / "data").stat().st_size == 34 + 12 * count + 8 * (count + 1)
    assert read_index(tmp_path / "data").starts(count - 1, count).tolist() == [3 * count - 3, 3 * count]


def test_an_interrupted_run_is_named_where_its_data_are_missing(tmp_path: Path) -> None:
    (tmp_path / "data.partial").mkdir()
    with pytest.raises(UserError, match=r"data\.idx: no such file, but .*data\.partial is there.* --resume"):
        read_index(tmp_path / "data")


@pytest.mark.parametrize(
    "manifest, expected",
    [
        (None, "corpus"),
        ({"format": "corpus"}, "corpus"),
        ({"format": "chat"}, "chat"),
        ({"format": "preference"}, "preference"),
        ({"format": "prompts"}, "prompts"),
    ],
)
def test_a_manifest_says_what_data_are_for(manifest: dict[str, str] | None, expected: str) -> None:
    assert format_of("data", manifest) == expected


@pytest.mark.parametrize("manifest", [{}, {"format": None}, {"format": "parquet"}])
def test_a_format_that_is_not_known_is_refused(manifest: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"data\.manifest\.json: format .*; expected one of corpus, chat, "):
        format_of("data", manifest)


def test_pairs_of_one_prefix(tmp_path: Path) -> None:
    assert pairs_of(tmp_path / "data", "chat") == ["", "_mask"]
    (tmp_path / "data_weight.idx").touch()
    assert pairs_of(tmp_path / "data", "chat") == ["", "_mask", "_weight"]
    assert pairs_of(tmp_path / "data", "corpus") == [""]


def test_a_mask_has_a_value_for_each_token(tmp_path: Path) -> None:
    int32, uint8 = np.dtype(np.int32), np.dtype(np.uint8)
    write_ours(tmp_path / "data", documents([2, 3], int32), int32)
    write_ours(tmp_path / "data_mask", documents([2, 3], uint8), uint8)
    write_ours(tmp_path / "data_weight", documents([3, 2], uint8), uint8)
    data = IndexedDocuments(tmp_path / "data")
    assert [mask.tolist() for mask in parallel(data, tmp_path / "data", "_mask")] == [[0, 1], [1, 2, 3]]
    with pytest.raises(UserError, match=r"data_weight\.idx: its documents are not as long as those of .*data\.idx"):
        parallel(data, tmp_path / "data", "_weight")
