"""mp-preprocess --resume: after a kill at any point the same bytes, manifest and counts as without."""

import fcntl
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from preprocess_data import left, make_tokenizer, run

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.tools.preprocess.preprocess import main

# A run in a process of its own: slowed down, with a state on the disk after every chunk, killed by itself at a call.
CODE = """
import os, signal, sys, time
from megapatch.models import commit
from megapatch.tools.preprocess.run import run_state
from megapatch.tools.preprocess.corpus.job import Corpus
from megapatch.tools.preprocess.preprocess import main

run_state.EVERY_S, run_state._SHARE = 0.0, 0
pause_s, name, number = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
begin, calls = Corpus.begin, 0

def slow(self, chunk):
    time.sleep(pause_s)
    return begin(self, chunk)

def counted(original):
    def call(*args, **named):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **named)
    return call

Corpus.begin = slow
places = {"replace": (os, "replace")}
places |= {"unlink": (os, "unlink"), "fsync": (commit, "fsync"), "ftruncate": (os, "ftruncate")}
if name in places:
    setattr(*places[name], counted(getattr(*places[name])))
sys.exit(main(sys.argv[4:]))
"""


class Case:
    """A run with all that a state must carry, and what it gives when nothing interrupts it."""

    def __init__(self, folder: Path, tok: Path) -> None:
        self.folder, self.prefix = folder, folder / "out" / "data"
        plain, packed = folder / "a.jsonl", folder / "b.jsonl.gz"
        texts = [json.dumps({"text": f"document {n % 150} of many", "of": f"s{n % 3}"}) for n in range(400)]
        texts[7::40] = ["{bad"] * len(texts[7::40])
        plain.write_text("\n".join(texts) + "\n")
        packed.write_bytes(gzip.compress(plain.read_bytes()[::-1].replace(b"\n", b" \n") + plain.read_bytes()))
        quarantine = f"quarantine={folder / 'out' / 'bad'}"
        self.argv = ["--input", str(plain), str(packed), "--tokenizer", str(tok), "--output-prefix", str(self.prefix)]
        self.argv += ["--chunk-bytes", "1500", "--deduplicate", "--split", "80,20", "--on-bad-line", quarantine]
        self.argv += ["--source-key", "of", "--max-document-tokens", "18"]
        assert main([*self.argv, "--workers", "2"]) == 0
        self.expected = self.files()

    def files(self) -> dict[str, Any]:
        """The files of the output folder; manifests without versions, which change with every commit of a checkout."""
        found: dict[str, Any] = {}
        for path in self.prefix.parent.iterdir():
            if path.name.endswith(".manifest.json"):
                found[path.name] = json.loads(path.read_bytes()) | {"versions": None}
            elif path.is_file():
                found[path.name] = path.read_bytes()
        return found

    def clear(self) -> None:
        """An empty output folder."""
        for path in sorted(self.prefix.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def start(self, pause_s: float, *more: str, at: tuple[str, int] = ("", 0)) -> subprocess.Popen[bytes]:
        """A run in a process of its own."""
        words = [str(pause_s), at[0], str(at[1]), *self.argv, *more]
        return subprocess.Popen([sys.executable, "-c", CODE, *words], stderr=subprocess.PIPE)

    def resume(self, workers: str = "2") -> None:
        """Go on, here, and compare with a run that was never interrupted."""
        assert main([*self.argv, "--workers", workers, "--resume"]) == 0
        assert self.files() == self.expected
        assert not Path(f"{self.prefix}.partial").exists()


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("preprocess"))


@pytest.fixture(scope="module")
def case(tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("resume"), tok)


def wait_for_state(case: Case, chunks: int) -> None:
    """Until so many chunks are on the disk."""
    state, deadline = Path(f"{case.prefix}.partial") / "state.json", time.monotonic() + 60
    while time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_bytes())["chunks"] >= chunks:
            return
        time.sleep(0.01)
    raise AssertionError("no state on the disk")


def test_a_run_killed_at_random_times_gives_the_same_files(case: Case) -> None:
    case.clear()
    chance = random.Random(4)
    for number in range(4):
        more = ["--resume"] if number else []
        with case.start(0.03, "--workers", str(1 + number % 3), *more) as run:
            wait_for_state(case, 1)
            time.sleep(chance.random() * 0.4)
            run.kill()
        assert set(case.files()) in (set(), set(case.expected))
        if case.files():
            break
    if Path(f"{case.prefix}.partial").exists():
        case.resume("3")
    assert case.files() == case.expected


PLACES = [*(("replace", n) for n in (1, 2, 9, 40, -1, -2, -3, -6)), ("unlink", 1), ("fsync", 3), ("fsync", -2)]


@pytest.fixture(scope="module")
def calls(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often a whole run calls what it may be killed at."""
    code = CODE.replace("sys.exit(main(sys.argv[4:]))", "main(sys.argv[4:]); print(calls)")
    counts = {}
    for name in {name for name, _ in PLACES}:
        case.clear()
        argv = [sys.executable, "-c", code, "0", name, "0", *case.argv, "--workers", "1"]
        counts[name] = int(subprocess.run(argv, capture_output=True, check=True).stdout)
    return counts


@pytest.mark.parametrize("name, number", PLACES)
def test_a_run_killed_at_a_call_gives_the_same_files(case: Case, calls: dict[str, int], name: str, number: int) -> None:
    case.clear()
    at = (name, number if number > 0 else calls[name] + 1 + number)
    with case.start(0, "--workers", "1", at=at) as run:
        assert run.wait(60) == -signal.SIGKILL
    names = {path.name.split(".idx")[0] for path in case.prefix.parent.glob("*.idx")}
    assert all(len(IndexedDocuments(case.prefix.parent / one)) for one in names)  # what is there is whole
    case.resume()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_leaves_what_can_be_gone_on_with(case: Case, number: int, status: int) -> None:
    case.clear()
    with case.start(0.02, "--workers", "2") as run:
        wait_for_state(case, 3)
        os.kill(run.pid, number)
        assert run.wait(20) == status
        assert run.stderr and b"go on with --resume" in run.stderr.read()
    assert left(case.prefix.parent) == ["data.partial"]
    case.resume("1")


def interrupted(case: Case) -> None:
    """An interrupted run."""
    case.clear()
    with case.start(0.02, "--workers", "2") as run:
        wait_for_state(case, 3)
        run.terminate()


def test_an_interrupted_run_is_gone_on_with_or_replaced_only_when_asked(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(case)
    assert main(case.argv) == 1
    assert "data.partial: of an interrupted run; go on with it by --resume, or start anew with --force" in (
        capfd.readouterr().err
    )
    for more, said in (
        (["--split", "50,50"], "of a run with another split: 80,20 then, 50,50 now; go on with what it had"),
        (["--chunk-bytes", "99"], "of a run with another chunk_bytes: 1500 then, 99 now"),
        (["--on-bad-line", "skip"], "--on-bad-line skip: the interrupted run found"),
    ):
        assert main([*case.argv, *more, "--resume"]) == 1
        assert said in capfd.readouterr().err
    case.resume()
    before = case.files()
    assert main([*case.argv, "--resume"]) == 0
    assert "data: complete already, by the same options and inputs" in capfd.readouterr().err
    assert case.files() == before and not Path(f"{case.prefix}.partial").exists()
    assert main([*case.argv, "--max-tokens", "9", "--resume"]) == 1
    assert "exists already" in capfd.readouterr().err
    interrupted(case)
    assert main([*case.argv, "--force"]) == 0
    assert case.files() == case.expected


def test_an_input_that_changed_is_refused(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    interrupted(case)
    source = case.folder / "a.jsonl"
    before = source.read_bytes()
    source.write_bytes(before.replace(b"document 0 of", b"document 1 of", 1))
    assert main([*case.argv, "--resume"]) == 1
    assert "have changed since the interrupted run read them" in capfd.readouterr().err
    source.write_bytes(before)
    case.resume()


def test_two_runs_on_one_prefix_are_refused(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    interrupted(case)
    with open(f"{case.prefix}.partial/lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ("--resume", "--force"):
            assert main([*case.argv, more]) == 1
            assert "data.partial: another run is writing" in capfd.readouterr().err
    case.resume()


def test_resume_without_an_interrupted_run_starts_one(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert run(tok, tmp_path / "data", tmp_path / "a.txt", more=("--resume",)) == 0
    assert "no interrupted run to go on with; starting anew" in capfd.readouterr().err
    assert len(IndexedDocuments(tmp_path / "data")) == 1


def test_standard_input_is_gone_on_with_when_it_is_given_again(tok: Path, tmp_path: Path) -> None:
    data = b"".join(b'{"text": "line %d"}\n' % number for number in range(3000))
    (tmp_path / "all.jsonl").write_bytes(data)
    assert run(tok, tmp_path / "plain", tmp_path / "all.jsonl", more=("--chunk-bytes", "1000")) == 0
    argv = ["--input", "-", "--tokenizer", str(tok), "--output-prefix", str(tmp_path / "piped")]
    argv = [sys.executable, "-c", CODE, "0.01", "", "0", *argv, "--chunk-bytes", "1000", "--workers", "2"]
    with (tmp_path / "all.jsonl").open("rb") as stdin, subprocess.Popen(argv, stdin=stdin) as first:
        state = tmp_path / "piped.partial" / "state.json"
        while not state.exists() and first.poll() is None:
            time.sleep(0.01)
        first.kill()
    with (tmp_path / "all.jsonl").open("rb") as stdin:
        assert subprocess.run([*argv, "--resume"], stdin=stdin).returncode == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"piped.{suffix}").read_bytes() == (tmp_path / f"plain.{suffix}").read_bytes()


def test_a_signal_that_was_ignored_at_the_start_stays_so(case: Case) -> None:
    case.clear()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    try:
        run = case.start(0.01, "--workers", "2")
    finally:
        signal.signal(signal.SIGINT, before)
    with run:
        wait_for_state(case, 2)
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(60) == 0
    assert case.files() == case.expected
