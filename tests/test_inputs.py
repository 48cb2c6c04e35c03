"""Inputs of every kind give the same records, however they are cut, divided or gone on with."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from input_files import JSONL, LINES, NUM_ROWS, TEXTS, WANTED, options, packed, read, read_with_bad, table, write_all

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading import columnar
from megapatch.tools.preprocess.reading.inputs import InputDigests, LineNumbers, Piece, chunks, find_sources
from megapatch.tools.preprocess.reading.records import read_records, text_of

pytest.importorskip("pyarrow", reason="extra `data` is not installed")
pytest.importorskip("zstandard", reason="extra `data` is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_all(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(params=[False, True], ids=["", "large groups"])
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups as workers read them, and as large ones that are handed out in parts."""
    if request.param:
        monkeypatch.setattr(columnar, "_GROUP_BYTES", 0)


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1000, 1 << 20])
def test_all_kinds_give_the_same_records_and_digests(files: list[Path], group_bytes: None, chunk_bytes: int) -> None:
    digests = InputDigests()
    assert read(files, chunk_bytes, digests=digests) == WANTED * len(files)
    assert digests.report() == [
        {
            "path": str(path),
            "bytes": path.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        }
        for path in files
    ]
    assert read(files, chunk_bytes) == WANTED * len(files)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 100])
def test_shards_in_order_are_the_whole(files: list[Path], group_bytes: None, shards: int) -> None:
    found, entries = [], []
    for shard in range(shards):
        digests = InputDigests()
        found += read(files, 500, shards=shards, shard=shard, digests=digests)
        entries += digests.report()
    assert found == WANTED * len(files)
    by_path: dict[str, list[dict]] = {}
    for entry in entries:
        by_path.setdefault(entry["path"], []).append(entry)
    assert list(by_path) == [str(path) for path in files]
    for path, parts in by_path.items():
        data, position = Path(path).read_bytes(), 0
        for part in parts:  # they cover the file without a gap
            start, end = part.get("range", (0, len(data)))
            assert (start, part["bytes"]) == (position, end - start)
            assert part["xxh3_128"] == xxhash.xxh3_128_hexdigest(data[start:end])
            position = end
        assert position == len(data)


def test_shards_divide_the_work(files: list[Path]) -> None:
    for path in (files[0], next(path for path in files if path.suffix == ".parquet")):
        assert all(2 <= len(read([path], shards=6, shard=shard)) <= NUM_ROWS // 3 for shard in range(6))


def test_a_run_goes_on_where_it_was(files: list[Path], group_bytes: None) -> None:
    sources = find_sources(options(files))
    digests = InputDigests()
    whole = [pickle.dumps(chunk) for chunk in chunks(sources, 1000, hashes=digests)]
    marks = [pickle.loads(chunk).mark for chunk in whole]
    assert [pickle.loads(chunk).number for chunk in whole] == list(range(len(whole)))
    assert len(marks) > 40 and len(set(marks)) > 20  # a small compressed file is read at once
    end_mark = 8  # bytes of the arrow stream after its last row
    assert sum(pickle.loads(chunk).input_bytes for chunk in whole) == sum(p.stat().st_size for p in files) - end_mark
    for skip in range(0, len(whole) + 1, 3):
        again = InputDigests(expected=marks[skip - 1] if skip else "")
        assert [pickle.dumps(chunk) for chunk in chunks(sources, 1000, skip=skip, hashes=again)] == whole[skip:]
        assert again.report() == digests.report()


def test_what_is_passed_over_must_be_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    mark = [chunk.mark for chunk in chunks(find_sources(options([path])), 1000, hashes=InputDigests())][2]
    path.write_bytes(JSONL.replace(b"xx", b"yy", 1))
    sources = find_sources(options([path]))
    with pytest.raises(UserError, match=r"a\.jsonl \(up to byte .*have changed since the interrupted run"):
        list(chunks(sources, 1000, skip=3, hashes=InputDigests(expected=mark)))
    with pytest.raises(UserError, match="the interrupted run had read 3,000"):
        list(chunks(sources, 1000, skip=3000))


def test_skipped_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "' + b"x" * 10_000 + b'"}'] * 3000))
    sources, asked = find_sources(options([path])), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: asked.append(given[1]) or pread(*given))
    assert [chunk.number for chunk in chunks(sources, 4 << 20, skip=6)] == [6, 7]
    assert sum(asked) < 1_000_000 < 30_000_000 < path.stat().st_size


@pytest.mark.parametrize("suffix", ["", "gz", "zst", "xz", "bz2"])
def test_standard_input_is_recognised_when_compressed(
    monkeypatch: pytest.MonkeyPatch, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = packed(suffix, JSONL) if suffix else JSONL
    digests = InputDigests()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read(["-"], 500, digests=digests) == WANTED
    assert not sys.stdin.buffer.closed
    assert digests.report() == [
        {"path": "stdin", "bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)},
    ]


def test_a_pipe_of_an_arrow_stream_is_read(tmp_path: Path, files: list[Path]) -> None:
    os.mkfifo(tmp_path / "pipe.arrow")
    stream = next(path for path in files if path.name == "stream.arrow")
    with subprocess.Popen(["sh", "-c", f"cat '{stream}' > '{tmp_path}/pipe.arrow'"]):
        digests = InputDigests()
        assert read([tmp_path / "pipe.arrow"], 500, digests=digests) == WANTED
    assert digests.report()[0]["xxh3_128"] == xxhash.xxh3_128_hexdigest(stream.read_bytes())


def test_lines_and_texts_lose_only_the_mark_at_their_start(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"one\r\n\n two \x00\n \t\r\n" + bom + b"three\rx\n\nend")
    asked = {"text_key": ["text"], "format": "lines"}
    lines = ["one", " two \0", "\ufeffthree\rx", "end"]
    for chunk_bytes in (1, 10, 1000):
        assert read([tmp_path / "a.txt"], chunk_bytes, **asked) == [(line,) for line in lines]
    assert read([tmp_path / "a.txt"], text_key=["text"]) == [
        ("one\r\n\n two \0\n \t\r\n\ufeffthree\rx\n\nend",),
    ]
    (tmp_path / "b.txt.gz").write_bytes(packed("gz", (tmp_path / "a.txt").read_bytes()))
    assert read([tmp_path / "b.txt.gz"], **asked) == [(line,) for line in lines]
    assert read([tmp_path / "b.txt.gz"], text_key=["text"]) == read([tmp_path / "a.txt"], text_key=["text"])
    (tmp_path / "b.jsonl").write_bytes(bom + JSONL)
    assert read([tmp_path / "b.jsonl"]) == WANTED


def test_a_line_may_be_as_long_as_memory_holds(tmp_path: Path) -> None:
    long = "y" * 100_000_000
    data = LINES[0] + b'\n{"text": "' + long.encode() + b'", "meta": {"text": ""}}\n' + LINES[1]
    (tmp_path / "a.jsonl").write_bytes(data)
    wanted = [WANTED[0], (long, ""), WANTED[1]]
    assert read([tmp_path / "a.jsonl"], 1 << 20, digests=InputDigests()) == wanted
    (tmp_path / "a.jsonl.zst").write_bytes(packed("zst", data))
    assert read([tmp_path / "a.jsonl.zst"], 1 << 20) == wanted


def test_places_are_right_in_every_shard_and_chunk(tmp_path: Path) -> None:
    lines = [b"" if i % 7 == 0 else b"bad" if i % 5 == 0 else line for i, line in enumerate(LINES)]
    data = b"\r\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(packed("gz", data))
    wanted = [
        f"{name}:{i + 1} (byte {len(b'  '.join([*lines[:i], b'']))})"
        for name in ("a.jsonl", "b.jsonl.gz")
        for i, line in enumerate(lines)
        if line == b"bad"
    ]
    for chunk_bytes in (1, 300, 1 << 20):
        for shards in (1, 2, 5):
            places: list[str] = []
            for shard in range(shards):
                inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
                _, bad = read_with_bad(inputs, chunk_bytes, keep_raw=True, shards=shards, shard=shard)
                places += [place.removeprefix(f"{tmp_path}/") for place, _ in bad]
                assert {one.raw for _, one in bad} <= {b"bad\r"}
            assert places == wanted
    piece = Piece(str(tmp_path / "a.jsonl"), "jsonl", len(data), 0)
    assert LineNumbers().before(piece) == len(lines) - 1


def test_rows_that_are_no_text_have_their_number(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    raw = pa.array([b"a", b"b\xff", b"", None, b"e"])
    bad = pa.Array.from_buffers(pa.string(), 5, raw.buffers())
    found = pa.table({"text": bad, "n": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(found, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_stream(tmp_path / "a.arrow", found.schema) as writer:
        writer.write_table(found)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        for chunk_bytes in (1, 1000):
            texts, told = read_with_bad([path], chunk_bytes, text_key=["text"], keep_raw=True)
            assert texts == [("a",), ("",), ("e",)]
            assert [(place, one.reason, one.offset) for place, one in told] == [
                (f"{path} (row 2)", "not UTF-8 (byte 0xff: invalid start byte)", None),
                (f"{path} (row 4)", "'text' is null, expected a string", None),
            ]
            assert [one.raw for _, one in told] == [rb'{"text": "b\\xff"}', b'{"text": null}']


def test_only_the_columns_wanted_are_read(files: list[Path]) -> None:
    for path in (path for path in files if path.suffix in (".parquet", ".arrow", ".feather")):
        for chunk in chunks(find_sources(options([path], text_key=["meta.text"])), 1 << 20):
            for piece in chunk:
                rows = read_records(piece, lambda row: row).taken
                assert {frozenset(row) for row in rows} == {frozenset({"meta"})}


def test_dictionaries_and_large_strings_are_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    words = ["red", "green", "red", "blue"] * 500
    found = pa.table({"a": pa.array(words).dictionary_encode(), "b": pa.array(words, pa.large_string())})
    pyarrow.parquet.write_table(found, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", found.schema) as writer:
        writer.write_table(found)
    for name in ("a.parquet", "a.arrow"):
        assert read([tmp_path / name], 100, text_key=["a", "b"]) == [(word, word) for word in words]


def test_repeated_values_do_not_make_one_large_piece(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["x" * 50] * 300_000}), tmp_path / "a.parquet")
    sources = find_sources(options([tmp_path / "a.parquet"], text_key=["text"]))
    assert sources[0].size is not None and sources[0].size < 100_000
    sizes = [len(read_records(piece, len).taken) for chunk in chunks(sources, 1 << 20) for piece in chunk]
    assert sum(sizes) == 300_000 and max(sizes) <= 1 << 14


@pytest.mark.parametrize("chunk_bytes", [1, 100, 777, 1 << 20])
def test_streams_are_cut_where_files_are(files: list[Path], chunk_bytes: int) -> None:
    cuts = [
        [(piece.start, piece.size) for chunk in chunks(find_sources(options([path])), chunk_bytes) for piece in chunk]
        for path in files[:5]
    ]
    assert all(one == cuts[0] for one in cuts)
    assert sum(size for _, size in cuts[0]) == len(JSONL)
    assert all(size >= chunk_bytes for _, size in cuts[0][:-1])


def test_empty_inputs_hold_nothing(tmp_path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table().slice(0, 0), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "a.jsonl.gz").write_bytes(packed("gz", b""))
    digests = InputDigests()
    inputs = [tmp_path / name for name in ("a.parquet", "a.jsonl", "a.jsonl.gz")]
    assert read(inputs, digests=digests) == []
    assert [entry["bytes"] for entry in digests.report()] == [path.stat().st_size for path in inputs]
    (tmp_path / "a.txt").write_bytes(b"")
    assert read([tmp_path / "a.txt"] * 2, text_key=["text"], shards=2, shard=1) == [("",), ("",)]
    assert read([tmp_path / "a.txt"] * 2, text_key=["text"], shards=2, shard=0) == []


def test_text_of_whole_files_counts_each_file(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt").write_text(text, newline="")
    asked = {"glob": "*.txt", "text_key": ["text"]}
    wanted = [(text,) for text in TEXTS]
    assert read([tmp_path], **asked) == wanted
    assert [one for i in range(5) for one in read([tmp_path], **asked, shards=5, shard=i)] == wanted
    assert read([f"{tmp_path}/*.txt"], text_key=["text"]) == wanted
    assert text_of(["text"])({"text": "a"}) == ("a",)
