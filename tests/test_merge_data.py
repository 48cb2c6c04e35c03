"""mp-merge-data: the bytes of megatron-core's own builder, manifests added up, all or nothing, and no surprises."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_pairs import about, byte_tokenizer, peak_growth_bytes, text, write_manifest, write_pair, write_tables
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megapatch.models.indexed_data import (
    IndexedDocuments,
    bin_path,
    idx_path,
    manifest_path,
    partial_path,
    read_index,
    read_manifest,
    write_index,
)
from megapatch.tools.preprocess.inspect_data import main as inspect
from megapatch.tools.preprocess.merge_data import main
from megapatch.tools.preprocess.pairs import append


def merge(inputs: Sequence[Path], output: Path, *more: str) -> int:
    return main(["--input", *map(str, inputs), "--output-prefix", str(output), *more])


def by_core(inputs: Sequence[Path], output: Path, dtype: Any, multimodal: bool = False) -> None:
    """The same by megatron-core's own builder."""
    builder = IndexedDatasetBuilder(str(bin_path(output)), dtype=dtype, multimodal=multimodal)
    for prefix in inputs:
        builder.add_index(str(prefix))
    builder.finalize(str(idx_path(output)))


def files(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


SHAPES = {  # documents of each input
    "one": [[[1, 2], [3]]],
    "two": [[[1, 2], [3]], [[4], [], [5, 6]]],
    "empty among them": [[], [[1]], [], [[2, 3], []], []],
    "none": [[], []],
    "large": [[[n % 60000] * (n % 50) for n in range(3000)], [[7] * 400_000, [1]], [[9]] * 2000],
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("more", [[], ["--skip-digests"]], ids=["digests", "kernel"])
def test_the_bytes_are_those_of_megatron_cores_builder(tmp_path: Path, case: str, dtype: Any, more: list[str]) -> None:
    inputs = [write_pair(tmp_path / f"in.{i}", documents, dtype) for i, documents in enumerate(SHAPES[case])]
    by_core(inputs, tmp_path / "theirs", dtype)
    assert merge(inputs, tmp_path / "ours", *more) == 0
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    expected = [ids for documents in SHAPES[case] for ids in documents]
    assert [ids.tolist() for ids in IndexedDocuments(tmp_path / "ours")] == expected


def test_blocks_of_an_index_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapatch.models.indexed_data._BLOCK", 3)
    test_the_bytes_are_those_of_megatron_cores_builder(tmp_path, "two", np.uint16, [])
    test_documents_of_several_sequences_stay_whole(tmp_path)


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    inputs = [
        write_tables(tmp_path / "one", [[[1, 2], [3]], [], [[4]]]),
        write_tables(tmp_path / "two", [[[5], [6, 7], []], [[8]]]),
    ]
    by_core(inputs, tmp_path / "theirs2", np.uint16)
    assert merge(inputs, tmp_path / "ours2") == 0
    assert files(tmp_path / "ours2") == files(tmp_path / "theirs2")


def test_modes_of_multimodal_data_are_kept(tmp_path: Path) -> None:
    inputs = [
        write_tables(tmp_path / "one", [[[1, 2], [3]]], b"\0\1"),
        write_tables(tmp_path / "two", [[[4]], [[5]]], b"\1\0"),
    ]
    by_core(inputs, tmp_path / "theirs", np.uint16, multimodal=True)
    assert merge(inputs, tmp_path / "ours") == 0
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    plain = write_tables(tmp_path / "plain", [[[1]]])
    assert merge([inputs[0], plain], tmp_path / "no") == 1


PARTS = [[text("one<eos>"), text("two<eos>")], [text("three<eos>")]]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two corpora of one tokenizer, with manifests."""
    tok = byte_tokenizer(tmp_path / "tok")
    found = []
    for i, documents in enumerate(PARTS):
        prefix = write_pair(tmp_path / f"shard{i}", documents)
        counts = {"lines": 5 + i, "documents": len(documents), "bad": 5 + i - len(documents), "share": 0.5}
        write_manifest(
            prefix,
            tok,
            documents,
            engine={"engine": "gigatoken", "differed": i},
            options={"eod": "yes", "shard": i},
            counts=counts | {"filtered_by_reason": {"too_short": i}},
            sources={"a.jsonl": {"lines": 5}} | ({"b.jsonl": {"lines": 1}} if i else {}),
            inputs=[{"path": "a.jsonl", "bytes": 7}],
            template="same in all",
            truncation={"records": i, "examples": [i]},
        )
        found.append(prefix)
    return found


def test_manifests_are_added_up(tmp_path: Path, shards: list[Path]) -> None:
    assert merge(shards, tmp_path / "all") == 0
    said, first = read_manifest(tmp_path / "all"), read_manifest(shards[0])
    assert said is not None and first is not None
    assert (said["tool"], said["format"], said["dtype"]) == ("mp-merge-data", "corpus", "uint16")
    assert said["tokenizer"] == first["tokenizer"] and said["options"] == {"eod": "yes"}
    assert said["counts"] == {"lines": 11, "documents": 3, "bad": 8, "filtered_by_reason": {"too_short": 1}}
    assert said["sources"] == {"a.jsonl": {"lines": 10}, "b.jsonl": {"lines": 1}}
    assert said["truncation"] == {"records": 1, "examples": [0, 1]}
    assert said["inputs"] == [{"path": "a.jsonl", "bytes": 7}] * 2
    assert said["engine"] == [{"engine": "gigatoken", "differed": i} for i in (0, 1)]
    assert [(one["prefix"], one["documents"], one["engine"]["differed"]) for one in said["merged"]] == [
        (str(shards[0]), 2, 0),
        (str(shards[1]), 1, 1),
    ]
    assert (said["documents"], said["tokens"], said["template"]) == (3, 14, "same in all")
    assert {name: said[name] for name in ("bin_bytes", "xxh3_128")} == about(tmp_path / "all")
    assert inspect([str(tmp_path / "all"), "--verify"]) == 0


def test_parts_without_manifest_are_merged_and_told(
    tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_pair(tmp_path / "other", [[1, 2]])
    assert merge([*shards, other], tmp_path / "all") == 0
    assert f"{other}: no tokenizer is named" in capsys.readouterr().err
    said = read_manifest(tmp_path / "all")
    assert said is not None and "tokenizer" not in said and said["counts"]["documents"] == 4


def chat(prefix: Path, tok: Path, documents: list[list[int]], weight: bool = False) -> Path:
    write_pair(prefix, documents)
    pairs = {"_mask": np.uint8} | ({"_weight": np.float32} if weight else {})
    for end, dtype in pairs.items():
        write_pair(Path(f"{prefix}{end}"), [[1] * len(ids) for ids in documents], dtype)
    said = {end: about(Path(f"{prefix}{end}")) for end in pairs}
    write_manifest(prefix, tok, documents, format="chat", pairs=said)
    return prefix


def test_chats_are_merged_with_their_masks_and_weights(tmp_path: Path, shards: list[Path]) -> None:
    tok = tmp_path / "tok"
    inputs = [chat(tmp_path / f"chat{i}", tok, documents, weight=True) for i, documents in enumerate(PARTS)]
    assert merge(inputs, tmp_path / "all") == 0
    for end, dtype in (("", np.uint16), ("_mask", np.uint8), ("_weight", np.float32)):
        by_core([Path(f"{one}{end}") for one in inputs], tmp_path / "theirs", dtype)
        assert files(tmp_path / f"all{end}") == files(tmp_path / "theirs")
    said = read_manifest(tmp_path / "all")
    assert said is not None and said["format"] == "chat"
    assert said["pairs"]["_mask"] == about(tmp_path / "all_mask") | {"dtype": "uint8"}
    assert inspect([str(tmp_path / "all"), "--verify"]) == 0
    (bin_path(tmp_path / "all_mask")).write_bytes(b"\1" * 13 + b"\0")
    assert inspect([str(tmp_path / "all"), "--verify"]) == 1


def test_preference_data_are_merged_pair_by_pair(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for end, dtype in (("_chosen", np.uint16), ("_rejected", np.uint16)):
            write_pair(tmp_path / f"{name}{end}", [[1, 2]], dtype)
            write_pair(tmp_path / f"{name}{end}_mask", [[0, 1]], np.uint8)
        manifest_path(tmp_path / name).write_text('{"format": "preference"}')
    assert merge([tmp_path / "one", tmp_path / "two"], tmp_path / "all") == 0
    said = read_manifest(tmp_path / "all")
    assert said is not None and sorted(said["pairs"]) == ["_chosen", "_chosen_mask", "_rejected", "_rejected_mask"]
    assert [ids.tolist() for ids in IndexedDocuments(tmp_path / "all_rejected_mask")] == [[0, 1]] * 2
    assert (said["documents"], said["tokens"]) == (2, 8)


def retold(**changes: Any) -> Callable[[Path], Any]:
    """Other words in the manifest; ``tokenizer`` is added to."""

    def change(prefix: Path) -> None:
        said = json.loads(manifest_path(prefix).read_text())
        tokenizer = said["tokenizer"] | changes.get("tokenizer", {})
        manifest_path(prefix).write_text(json.dumps(said | changes | {"tokenizer": tokenizer}))

    return change


def flip(path: Callable[[Path], Path], at: int, data: bytes) -> Callable[[Path], Any]:
    def change(prefix: Path) -> None:
        old = path(prefix).read_bytes()
        path(prefix).write_bytes(old[:at] + data + old[at + len(data) :])

    return change


def to_int32(prefix: Path) -> None:
    write_pair(prefix, PARTS[1], np.int32)
    retold(**about(prefix))(prefix)


def moved_end(prefix: Path) -> None:
    """The same .bin cut into documents elsewhere: whole, but not what the manifest says."""
    write_index(idx_path(prefix), np.array([2, 4]), np.dtype(np.uint16))


REFUSED = {  # what is done to the second: part of the message
    "another tokenizer": (retold(tokenizer={"digest": "e" * 32}), "tokenizer digest " + "e" * 32 + ", but "),
    "another end": (retold(tokenizer={"eod_id": None}), "tokenizer eod_id None, but "),
    "another format": (retold(format="chat"), "shard1: format chat, but "),
    "another dtype": (to_int32, "shard1: int32, but "),
    "a flipped bit": (flip(bin_path, 0, b"\0"), "shard1.bin: xxh3-128 "),
    "another cut": (moved_end, "shard1.idx: xxh3-128 "),
    "a short .bin": (lambda prefix: os.truncate(bin_path(prefix), 4), "shard1.manifest.json: does not describe"),
    "nothing there": (lambda prefix: [p(prefix).unlink() for p in (bin_path, idx_path, manifest_path)], "no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_one_is_refused_by_name(
    tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = REFUSED[case]
    damage(shards[1])
    before = sorted(tmp_path.iterdir())
    assert merge(shards, tmp_path / "all") == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_another_format_is_refused_by_name(
    tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = chat(tmp_path / "chat", tmp_path / "tok", PARTS[0])
    assert merge([shards[0], other], tmp_path / "all") == 1
    assert f"{other}: format chat, but {shards[0]} has corpus" in capsys.readouterr().err


@pytest.mark.parametrize("order", [1, -1])
def test_without_weights_a_token_counts_as_its_mask_says(tmp_path: Path, shards: list[Path], order: int) -> None:
    tok = tmp_path / "tok"
    plain, weighted = chat(tmp_path / "plain", tok, PARTS[0]), chat(tmp_path / "weighted", tok, PARTS[1], weight=True)
    write_pair(Path(f"{plain}_mask"), [[0, 1, 1, 1], [1, 0, 0, 1]], np.uint8)
    retold(pairs={"_mask": about(Path(f"{plain}_mask"))})(plain)
    assert merge([plain, weighted][::order], tmp_path / "all") == 0
    parts = [[[0, 1, 1, 1], [1, 0, 0, 1]], [[1] * 6]]
    expected = [weights for part in parts[::order] for weights in part]
    assert [weights.tolist() for weights in IndexedDocuments(tmp_path / "all_weight")] == expected
    assert read_index(tmp_path / "all_weight").dtype == np.float32
    assert inspect([str(tmp_path / "all"), "--verify"]) == 0
    assert merge([plain], tmp_path / "all", "--force") == 0
    assert not idx_path(tmp_path / "all_weight").exists() and not bin_path(tmp_path / "all_weight").exists()


def test_without_answers_they_are_empty(tmp_path: Path, shards: list[Path]) -> None:
    write_pair(tmp_path / "shard0_answer", [[52], [50, 51]], np.uint8)
    for prefix in shards:
        retold(format="prompts")(prefix)
    assert merge(shards, tmp_path / "all") == 0
    assert [bytes(ids.tolist()) for ids in IndexedDocuments(tmp_path / "all_answer")] == [b"4", b"23", b""]


def test_what_exists_is_replaced_only_by_force(
    tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(shards, tmp_path / "all") == 0
    before = files(tmp_path / "all")
    assert merge(shards[:1], tmp_path / "all") == 1
    assert "all.idx: exists already" in capsys.readouterr().err and files(tmp_path / "all") == before
    assert merge(shards[:1], tmp_path / "all", "--force") == 0
    assert files(tmp_path / "all") == files(shards[0])
    partial_path(tmp_path / "all").mkdir()
    assert merge(shards, tmp_path / "all", "--force") == 1
    assert "all.partial: a run of mp-preprocess writes" in capsys.readouterr().err


def test_an_input_is_not_the_output(tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        merge(shards, tmp_path / "." / "shard1", "--force")
    assert caught.value.code == 2 and "is also an input" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert merge(shards, tmp_path / "all", "--dry-run") == 0
    said = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.iterdir()) == before
    assert (said["documents"], said["tokens"], said["bytes"], said["dtype"]) == (3, 14, 28, "uint16")
    assert [one["prefix"] for one in said["inputs"]] == list(map(str, shards))


def test_the_index_appears_last_and_an_old_one_goes_first(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merge(shards[:1], tmp_path / "all") == 0
    seen, replace = [], os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append((Path(target).name, idx_path(tmp_path / "all").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert merge(shards, tmp_path / "all", "--force") == 0
    assert seen == [("all.bin", False), ("all.manifest.json", False), ("all.idx", False)]


@pytest.mark.parametrize("failing", range(3))
def test_a_failure_between_the_renames_leaves_nothing_that_looks_finished(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    assert merge(shards[:1], tmp_path / "all") == 0
    calls, replace = [], os.replace

    def failed(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failed)
    assert merge(shards, tmp_path / "all", "--force") == 130
    assert [path for path in tmp_path.iterdir() if path.name.startswith("all")] == []


def test_a_failure_while_copying_leaves_the_old(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(shards[:1], tmp_path / "all") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    status = merge(shards, tmp_path / "all", "--force")
    monkeypatch.undo()
    assert status == 1 and "all.bin: disk full (" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("how", ["another file system", "cannot", "says the end", "half"])
def test_where_the_kernel_cannot_copy_a_buffer_does(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    calls: list[int] = []

    def copy(source: int, target: int, count: int, offset: int) -> int:
        calls.append(count)
        if how == "says the end" or (how == "half" and len(calls) % 2 == 0):
            return 0
        if how == "half":
            return os.write(target, os.pread(source, 3, offset))
        raise OSError(errno.EXDEV if how == "another file system" else errno.EOPNOTSUPP, "no")

    assert merge(shards, tmp_path / "expected") == 0
    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(append, "_BUFFER_BYTES", 5)
    assert merge(shards, tmp_path / "all", "--skip-digests") == 0
    assert calls and files(tmp_path / "all") == files(tmp_path / "expected")
    said = read_manifest(tmp_path / "all")
    assert said is not None and "xxh3_128" not in said


def test_a_source_that_shrinks_is_named(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    with append.Appender(tmp_path / "out", lambda n: None, digests=True) as target:
        with pytest.raises(Exception, match="short: ended at byte 3 of 5"):
            target.add(tmp_path / "short", 5)


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    count, inputs = 2_000_000, [tmp_path / "one", tmp_path / "two"]
    for prefix in inputs:
        write_index(idx_path(prefix), np.full(count, 3, np.int32), np.dtype(np.uint16))
        with bin_path(prefix).open("wb") as file:
            file.truncate(count * 6)
    grown = peak_growth_bytes(lambda: merge(inputs, tmp_path / "all"))
    assert grown < 25 << 20, f"{grown / (2 * count):.1f} bytes a document"
    assert len(IndexedDocuments(tmp_path / "all")) == 2 * count
