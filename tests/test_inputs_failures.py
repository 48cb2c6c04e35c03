"""Inputs that cannot be read are named in one line: where, what was found, what to do."""

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from input_files import JSONL, LINES, options, packed, read, read_with_bad, table

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.reading.inputs import InputDigests, chunks, find_sources
from megapatch.tools.preprocess.reading.records import read_records, text_of
from megapatch.tools.preprocess.train_tokenizer import main

pytest.importorskip("pyarrow", reason="extra `data` is not installed")
pytest.importorskip("zstandard", reason="extra `data` is not installed")
NAMES = {"gz": "gzip", "zst": "zstd", "xz": "xz", "bz2": "bzip2"}


@pytest.mark.parametrize("suffix", NAMES)
def test_a_compressed_file_cut_short_is_named_with_its_byte(tmp_path: Path, suffix: str) -> None:
    whole = packed(suffix, JSONL)
    padding = {"gz": 512, "zst": 12, "xz": 8, "bz2": 0}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    refused = []
    for size in range(0, len(whole) - padding, 7):
        path.write_bytes(whole[:size])
        try:
            read([path])
        except UserError as error:
            refused.append(size)
            assert str(error) == (
                f"{path}: {NAMES[suffix]} data cut short: it ends at byte {size:,} inside a stream; "
                "get the complete file again"
            )
    kept = set(range(0, len(whole) - padding, 7)) - set(refused)
    assert len(kept) <= 1  # the cut is just between the two members


@pytest.mark.parametrize("suffix", NAMES)
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = packed(suffix, JSONL)
    path = tmp_path / f"a.jsonl.{suffix}"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: (damaged|{NAMES[suffix]} data cut short)"):
        read_with_bad([path])
    path.write_bytes(JSONL)
    with pytest.raises(UserError, match=rf"is not {NAMES[suffix]} data, at byte 0 .*get the file again"):
        read([path])
    path.write_bytes(whole + b"garbage")
    with pytest.raises(UserError) as error:
        read([path])
    assert f"damaged {NAMES[suffix]} data, at byte {len(whole):,} or up to 7 bytes after it" in str(error.value) or (
        suffix == "xz"
        and f"xz data cut short: it ends at byte {len(whole) + 7:,}" in str(error.value)  # too few to tell
    )


def write_parquet(path: Path) -> bytes:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(), path)
    return path.read_bytes()


def write_arrow(path: Path) -> bytes:
    import pyarrow as pa

    with pa.ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=11)
    return path.read_bytes()


@pytest.mark.parametrize("kind, write", [("parquet", write_parquet), ("arrow", write_arrow)])
def test_damaged_rows_are_refused(tmp_path: Path, kind: str, write) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / f"a.{kind}"
    whole = write(path)
    for content in (whole[: len(whole) // 2], b"", b"PAR1", b"text", whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.{kind}: damaged, or no {kind} \(.*\); get the file again"):
            read([path])


def test_the_first_version_of_feather_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + b"\0" * 100 + b"FEA1")
    with pytest.raises(UserError, match=r"a\.feather: the first version of feather; read it with pyarrow"):
        read([tmp_path / "a.feather"])


def test_a_column_that_is_missing_is_named_beside_those_there(tmp_path: Path) -> None:
    for kind, write in (("parquet", write_parquet), ("arrow", write_arrow)):
        write(tmp_path / f"a.{kind}")
        for key in ("body", "meta.body", "text.meta", "n.text"):
            with pytest.raises(UserError) as error:
                read([tmp_path / f"a.{kind}"], text_key=[key])
            assert f"a.{kind}: no column {key!r}; columns found: text, meta, n; choose with" in str(error.value)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    message = r"a\.jsonl.*: changed while it was read; run again when nothing writes to it"
    changes = [JSONL + b"{}\n", JSONL[:-9], JSONL.replace(b"x", b"y")]
    for change in changes:
        path.write_bytes(JSONL)
        os.utime(path, ns=(1, 1))
        sources = find_sources(options([path]))
        pieces = [piece for chunk in chunks(sources, 1000) for piece in chunk]
        path.write_bytes(change)
        with pytest.raises(UserError, match=message):  # found by a worker
            read_records(pieces[-1], text_of(["text"]))
        path.write_bytes(JSONL)
        os.utime(path, ns=(1, 1))
        cutting = chunks(sources, 1000, hashes=InputDigests())
        next(cutting)
        path.write_bytes(change)
        with pytest.raises(UserError, match=message):  # found while cutting
            list(cutting)
    with pytest.raises(UserError, match=message):  # found when it is opened
        path.write_bytes(JSONL + b"\n")
        list(chunks(sources, 1000))


ARRAYS = [
    b'[\n {"text": "a"},\n {"text": "b"}\n]\n',
    b'[{\n "text": "a"\n}, {\n "text": "b"\n}]',
    b'\n[{"text": "a"},\n{"text": "b"}]',
    b'\xef\xbb\xbf{\r\n  "text": "a"\r\n}',
]


@pytest.mark.parametrize("content", ARRAYS, ids=range(len(ARRAYS)))
@pytest.mark.parametrize("on_bad_line", ["fail", "skip"])
def test_one_json_value_over_many_lines_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, on_bad_line: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    argv = ["--input", str(path), "--vocab-size", "300", "--output", str(tmp_path / "out")]
    assert main([*argv, "--on-bad-line", on_bad_line]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"{path}: one JSON value over several lines, expected JSON lines" in error
    assert "jq -c '.[]'" in error


def test_a_bad_first_line_is_only_a_bad_line(tmp_path: Path) -> None:
    for first in (b"[", b"{", b'[{"text"', b"[[[", b'[{"text": "a"}]'):
        (tmp_path / "a.jsonl").write_bytes(first + b"\n" + LINES[0] + b"\n" + LINES[1])
        texts, bad = read_with_bad([tmp_path / "a.jsonl"])
        assert (len(texts), len(bad)) == (2, 1)
    assert "an array found, expected an object with the key 'text'; if the whole file is one array" in bad[0][1].reason


SOURCES = [
    (["missing.txt"], {}, "missing.txt: no such file; expected a file, a pattern, a folder with --glob, or -"),
    (["*.md"], {}, "--input *.md: matches no file"),
    (["."], {}, ".: is a folder; say which of its files with --glob"),
    (["."], {"glob": "*.md"}, ".: holds no file that matches --glob *.md"),
    (["a.txt"], {"glob": "*.txt"}, "--glob *.txt: no folder among --input a.txt"),
    (["-", "-"], {}, "--input -: standard input is named twice"),
    (["-"], {"format": "parquet"}, "stdin: parquet is read from its end; give a file"),
    (["a.parquet.gz"], {}, "a.parquet.gz: gzip around parquet, which compresses by itself"),
    (["-"], {"shards": 2, "shard": 0}, "stdin: a stream cannot be divided by --shards"),
    (["a.txt"], {"text_key": ["body"]}, "a.txt: text has no keys, --text-key asks for body"),
    (["a.txt"], {"format": "lines", "text_key": ["text", "b"]}, "a.txt: lines has no keys"),
]


@pytest.mark.parametrize("inputs, more, message", SOURCES, ids=[one[2][:30] for one in SOURCES])
def test_what_cannot_be_an_input_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], more: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.parquet.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b""))
    with pytest.raises(UserError) as error:
        find_sources(options(inputs, **{"text_key": ["text"], **more}))
    assert str(error.value).startswith(message)


OPTIONS = [
    ({"on_bad_line": "drop"}, "--on-bad-line drop: expected fail, skip or quarantine=FILE"),
    ({"on_bad_line": "quarantine="}, "--on-bad-line quarantine=: expected a file name"),
    ({"text_key": ["a", "a"]}, "--text-key a a: one is empty or named twice"),
    ({"shards": 0}, "--shards 0: expected 1 or more"),
    ({"shards": 3}, "--shards 3 needs --shard, from 0 to 2"),
    ({"shards": 3, "shard": 3}, "--shard 3: expected 0 to 2, as --shards is 3"),
    ({"shard": 1}, "--shard 1: expected 0 to 0, as --shards is 1"),
]


@pytest.mark.parametrize("more, message", OPTIONS, ids=[one[1][:30] for one in OPTIONS])
def test_options_are_checked_together(more: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        options(["a"], **more)
    assert str(error.value).startswith(message)


def test_a_pattern_is_expanded_sorted_and_a_name_that_exists_comes_first(tmp_path: Path) -> None:
    names = ["b1.txt", "a1.txt", "c[1].txt", "c1.txt", "sub/a1.txt"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)

    def found(pattern: str) -> list[str]:
        sources = find_sources(options([f"{tmp_path}/{pattern}"], text_key=["text"]))
        return [source.path.removeprefix(f"{tmp_path}/") for source in sources]

    assert found("*1.txt") == ["a1.txt", "b1.txt", "c1.txt"]
    assert found("**/a*.txt") == ["a1.txt", "sub/a1.txt"]
    assert found("c[1].txt") == ["c[1].txt"]


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt.zst").write_bytes(packed("zst", b"text"))
    code = (
        "import sys; sys.modules['pyarrow'] = sys.modules['zstandard'] = None\n"
        "from megapatch.tools.preprocess.train_tokenizer import main; sys.exit(main(sys.argv[1:]))"
    )
    for name, library in (("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")):
        argv = ["--input", str(tmp_path / name), "--vocab-size", "300", "--output", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 1
        assert library in done.stderr and "pip install 'megapatch[data]'" in done.stderr


def test_standard_input_that_ends_inside_a_member_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed("zst", JSONL)[:300])))
    with pytest.raises(UserError, match="stdin: zstd data cut short: it ends at byte 300"):
        read(["-"])
