"""mp-preprocess: bad input, full disks and dead workers are told in one line; what is left can be gone on with."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from preprocess_data import DOCUMENTS, GOOD, left, make_tokenizer, outputs, run, write_jsonl

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.tools.preprocess.corpus.job import Corpus
from megapatch.tools.preprocess.preprocess import main
from megapatch.tools.preprocess.reading.inputs import Chunk

TOOL = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess"]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("preprocess"))


BAD = [  # name, content, place and message
    ("a.jsonl", GOOD * 3 + b'{"text": "x"\n' + GOOD, ":4 (byte 63): not JSON (Expecting ',' delimiter)"),
    ("a.jsonl", GOOD + b"\n" + b'{"text": tru}\n', ":3 (byte 27): not JSON (Expecting value)"),
    ("a.jsonl", '{"é€": tru}'.encode(), ":1 (byte 10): not JSON (Expecting value)"),
    ("a.jsonl", b'{"text": "a", "x": NaN}\n', ":1 (byte 0): not JSON (NaN is not a JSON value)"),
    ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", ":2 (byte 17): not JSON that can be read (nested more than 1,024 deep)"),
    ("a.jsonl", GOOD + b"[1]\n", ":2 (byte 17): an array found, expected an object with the key 'text'"),
    ("a.jsonl", b"null\n", ":1 (byte 0): null found, expected an object"),
    ("a.jsonl", GOOD + b'{"id": 1, "body": "x"}\n', ":2 (byte 17): no key 'text'; keys found: 'id', 'body'"),
    ("a.jsonl", b"{}\n", ":1 (byte 0): no key 'text'; keys found: none"),
    ("a.jsonl", b'{"text": null}\n', ":1 (byte 0): 'text' is null, expected a string"),
    ("a.jsonl", b'{"text": 12}\n', ":1 (byte 0): 'text' is a number, expected a string"),
    ("a.jsonl", b'{"text": ["a"]}\n', ":1 (byte 0): 'text' is an array, expected a string"),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ":2 (byte 17): lone surrogate \\ud800"),
    ("a.jsonl", GOOD + b'{"text": "a\xffb"}\n', ":2 (byte 28): not UTF-8 (byte 0xff: invalid start byte)"),
    ("a.txt", b"abc\n\xe9t\xe9", " (byte 4): not UTF-8 (byte 0xe9: invalid continuation byte)"),
    ("a.txt", "né".encode("utf-16"), " (byte 0): not UTF-8 (byte 0xff: invalid start byte)"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=[f"{i}-{one[2][:24]}" for i, one in enumerate(BAD)])
def test_bad_input_is_named_with_its_place_and_leaves_nothing(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    bad = tmp_path / name
    bad.write_bytes(content)
    for chunk_bytes in ("1", "100000"):
        assert run(tok, tmp_path / "out" / "data", good, bad, good, more=("--chunk-bytes", chunk_bytes)) == 1
        *_, error = capfd.readouterr().err.strip().split("\n")
        assert error.startswith(f"mp-preprocess: error: {bad}{message}")
        assert "--on-bad-line skip" in error
        assert left(tmp_path / "out") == []


def test_nothing_that_is_read_or_written_is_written_over(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, prefix = tmp_path / "in.jsonl", tmp_path / "data"
    source.write_bytes(GOOD + b"bad\n")
    (tmp_path / "there").write_text("mine")
    cases = {"in.jsonl": "is an input", "data.bin": "is written", "data.idx": "is written", "there": "exists already"}
    for name, words in cases.items():
        more = ("--on-bad-line", f"quarantine={tmp_path / name}", *(["--force"] if name == "in.jsonl" else []))
        assert run(tok, prefix, source, more=more) == 1
        error = capfd.readouterr().err
        assert f"{tmp_path / name}: {words}" in error and "choose another quarantine=FILE" in error
    assert source.read_bytes() == GOOD + b"bad\n" and left(tmp_path) == ["in.jsonl", "there"]
    binary = tmp_path / "x.bin"
    binary.write_bytes(GOOD)
    assert run(tok, tmp_path / "x", binary, more=("--format", "jsonl", "--force")) == 1
    assert f"{binary}: is an input" in capfd.readouterr().err and binary.read_bytes() == GOOD


def test_a_prefix_that_is_no_name_or_cannot_be_made_is_refused(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for prefix in ("", ".", "a/.."):
        with pytest.raises(SystemExit, match="2"):
            main(["--input", str(source), "--tokenizer", str(tok), "--output-prefix", prefix])
        assert "--output-prefix" in capfd.readouterr().err
    assert run(tok, Path("folder"), source) == 1
    assert "--output-prefix folder: is a folder; add a name" in capfd.readouterr().err
    assert run(tok, Path("/proc/data"), source) == 1
    assert "/proc/data.partial: cannot be made (" in capfd.readouterr().err
    assert left(tmp_path) == ["folder", "in.jsonl"] and left(tmp_path / "folder") == []


def test_json_lines_by_another_name_are_not_taken_for_text(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl.1", DOCUMENTS)
    assert run(tok, tmp_path / "data", source) == 1
    assert f"{source}: text by its name, but its first line is a JSON object; say --format" in capfd.readouterr().err
    assert run(tok, tmp_path / "data", source, more=("--format", "text")) == 0
    assert run(tok, tmp_path / "data", source, more=("--format", "jsonl", "--force")) == 0
    (tmp_path / "c.txt").write_text("{\n  a: b\n}\n")
    assert run(tok, tmp_path / "c", tmp_path / "c.txt") == 0


def test_a_key_of_sources_that_no_record_has_is_told(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    for key, told in (("nope", True), ("id", False)):
        assert run(tok, tmp_path / key, source, more=("--source-key", key)) == 0
        assert (f"--source-key {key}: no record has this key" in capfd.readouterr().err) == told


def test_what_belonged_to_the_replaced_set_goes(tok: Path, tmp_path: Path) -> None:
    source, prefix = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS), tmp_path / "data"
    manifest = {"format": "chat", "bin_bytes": 0}
    stale = ["data_mask.bin", "data_mask.idx", "data_weight.bin", "data.pack-64.npz", "data.pack-64-m4.npz"]
    others = ["data2.pack-64.npz", "data_more.bin"]
    for name in ("data.bin", "data.idx", *stale, *others):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "data.manifest.json").write_text(json.dumps(manifest))
    assert run(tok, prefix, source, more=("--force",)) == 0
    made = ["data.args", "data.bin", "data.idx", "data.manifest.json"]
    assert left(tmp_path) == sorted([*made, *others, "in.jsonl"])


def test_skipped_input_is_counted_and_named(tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i, (name, content, _) in enumerate(BAD):
        (tmp_path / f"{i:02}{name}").write_bytes(content)
    more = ("--glob", "*a.*", "--on-bad-line", "skip", "--chunk-bytes", "64")
    assert run(tok, tmp_path / "out", tmp_path, more=more) == 0
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    num_good = sum(content.count(GOOD) for _, content, _ in BAD)
    assert (counts["bad"], counts["documents"]) == (len(BAD), num_good)
    assert counts["lines"] == counts["documents"] + counts["empty"] + counts["bad"]
    error = capfd.readouterr().err
    assert error.count("; skipped\n") == 10 and f" + {len(BAD)} bad + 0 filtered + 0 duplicate\n" in error
    assert f"00a.jsonl{BAD[0][2]}" in error


USAGE = [
    (["--workers", "0"], "--workers 0: expected 1 or more"),
    (["--chunk-bytes", "0"], "--chunk-bytes 0: expected 1 or more"),
    (["--format", "csv"], "invalid choice: 'csv'"),
]


@pytest.mark.parametrize("more, message", USAGE)
def test_wrong_usage_is_exit_status_2(capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--input", "a", "--tokenizer", "t", "--output-prefix", "p", *more])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


INPUTS = [
    (("missing.txt",), (), "missing.txt: no such file"),
    (("folder",), (), "folder: is a folder; say which of its files with --glob"),
    (("folder",), ("--glob", "*.md"), "folder: holds no file that matches --glob *.md"),
    (("folder/a.txt",), ("--glob", "*.txt"), "--glob *.txt: no folder among --input"),
    (("folder/a.jsonl.gz",), ("--format", "parquet"), "folder/a.jsonl.gz: gzip around parquet"),
    (("folder/empty.txt",), (), "no documents in --input (1 lines = 0 documents + 1 empty"),
]


@pytest.mark.parametrize("inputs, more, message", INPUTS, ids=[one[2][:20] for one in INPUTS])
def test_inputs_that_give_nothing_are_errors(
    tok: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    inputs: tuple[str, ...],
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "empty.txt").write_text("")
    (tmp_path / "folder" / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert run(tok, tmp_path / "out" / "data", *inputs, more=more) == 1
    assert f"mp-preprocess: error: {message}" in capfd.readouterr().err
    assert left(tmp_path / "out") == []


def test_existing_files_stay_unless_forced_and_when_a_forced_run_fails(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    assert run(tok, tmp_path / "out" / "data", source) == 0
    old = outputs(tmp_path / "out" / "data")
    assert run(tok, tmp_path / "out" / "data", source) == 1
    assert "data.bin: exists already" in capfd.readouterr().err
    assert run(tok, tmp_path / "out" / "data", source, bad, more=("--force",)) == 1
    assert outputs(tmp_path / "out" / "data") == old
    assert left(tmp_path / "out") == ["data.args", "data.bin", "data.idx", "data.manifest.json"]
    assert run(tok, tmp_path / "out" / "data", source, source, more=("--force",)) == 0
    assert len(IndexedDocuments(tmp_path / "out" / "data")) == 2


def test_a_killed_worker_ends_the_run_at_once_and_what_is_done_is_kept(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = Corpus.begin

    def dying(self: Corpus, chunk: Chunk) -> object:
        (path,) = [piece.path for piece in chunk]
        if path.endswith("kill.txt"):
            time.sleep(0.5)  # a.txt is written by then
            (tmp_path / "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        if path.endswith("slow.txt"):
            time.sleep(60)
        return begin(self, chunk)

    monkeypatch.setattr(Corpus, "begin", dying)
    names = ["a.txt", "slow.txt", "kill.txt", "b.txt"]
    for name in names:
        (tmp_path / name).write_text("some text")
    before = psutil.Process().children()
    inputs = [tmp_path / name for name in names]
    assert run(tok, tmp_path / "out" / "data", *inputs, more=("--chunk-bytes", "1")) == 1
    assert time.monotonic() - float((tmp_path / "killed").read_text()) < 10  # quiet machine: 0.02 s
    error = capfd.readouterr().err
    assert "was killed by signal 9 at or after" in error and "kill.txt (byte 0); if memory ran out" in error
    assert f"is kept in {tmp_path / 'out' / 'data.partial'}: go on with --resume" in error
    assert psutil.Process().children() == before
    monkeypatch.undo()
    assert run(tok, tmp_path / "out" / "data", *inputs, more=("--chunk-bytes", "1", "--resume")) == 0
    assert "going on after 1 lines = 1 documents" in capfd.readouterr().err
    assert len(IndexedDocuments(tmp_path / "out" / "data")) == 4


def test_a_worker_that_dies_while_a_pipe_is_waited_for_ends_the_run(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Corpus, "begin", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    reading, writing = os.pipe()
    os.write(writing, GOOD * 2000)  # all that a pipe takes, about
    with open(reading) as stream, open(writing, "wb"):
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(tok, tmp_path / "out" / "data", "-", more=("--chunk-bytes", "20")) == 1
    found = re.search(r"was killed by signal 9 at or after stdin \(byte (\d+)\)", capfd.readouterr().err)
    assert found and int(found[1]) % len(GOOD) == 0  # all workers died; one of them is named
    assert left(tmp_path / "out") == []


def test_a_bug_in_a_worker_is_shown_with_its_place(tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Corpus, chunk: Chunk) -> object:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Corpus, "begin", broken)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ZeroDivisionError) as error:
        run(tok, tmp_path / "out" / "data", tmp_path / "a.txt")
    assert "in broken" in error.value.__notes__[0]
    assert left(tmp_path / "out") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_a_larger_one_is_gone_on_with(
    tok: Path, tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 3000)
    assert run(tok, small_disk / "data", source, more=("--chunk-bytes", "100000")) == 1
    *_, error = capfd.readouterr().err.strip().split("\n")
    assert error.startswith(f"mp-preprocess: error: {small_disk / 'data.partial'}: disk full (")
    assert error.endswith("data.partial: go on with --resume") and " bytes free); free space" in error
    assert left(small_disk) == ["data.partial"]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert run(tok, small_disk / "data", source, more=("--chunk-bytes", "100000", "--resume")) == 0
    assert "going on after" in capfd.readouterr().err
    assert run(tok, tmp_path / "other", source) == 0
    assert outputs(small_disk / "data") == outputs(tmp_path / "other")


def test_a_bad_line_of_standard_input_has_its_number(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD * 50 + b"{}\n" + GOOD)))
    assert run(tok, tmp_path / "out" / "data", "-", more=("--chunk-bytes", "50")) == 1
    assert "error: stdin:51 (byte 850): no key 'text'" in capfd.readouterr().err
    assert left(tmp_path / "out") == []


def test_workers_end_when_their_parent_is_killed(tok: Path, tmp_path: Path) -> None:
    argv = [*TOOL, "--input", "-", "--tokenizer", str(tok), "--output-prefix", str(tmp_path / "data")]
    with subprocess.Popen([*argv, "--chunk-bytes", "100", "--workers", "3"], stdin=subprocess.PIPE) as run:
        assert run.stdin
        run.stdin.write(GOOD * 1000)
        run.stdin.flush()
        deadline = time.monotonic() + 60
        while len(workers := psutil.Process(run.pid).children()) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(workers) == 3
        run.kill()
        assert psutil.wait_procs(workers, timeout=10)[1] == []
