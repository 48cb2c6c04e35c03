"""Outputs are old or new, never torn: killed at every step, on a full disk, with flipped bits."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megapatch.models import commit
from megapatch.models.cli import UserError

OLD, NEW = {"a": b"old"}, {"a": b"new", "sub/b": b"new too"}
WRITES = ("write", "fsync", "mkdir", "rename", "renameat2", "unlink", "unlinkat", "rmdir")


def write_folder(target: Path, files: dict[str, bytes] = NEW) -> None:
    """A staged folder with ``files``."""
    with commit.staged_folder(target, tool="test", force=True, about={"step": 7}) as stage:
        for name, content in files.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(content)


def write_file(target: Path, content: bytes = b"new") -> None:
    """A staged file with ``content``."""
    with commit.staged_file(target) as stage:
        stage.write_bytes(content)


def found(target: Path) -> object:
    """What a reader finds: None, a file's bytes, or a verified folder's files."""
    if not target.exists() or target.is_file():
        return target.read_bytes() if target.exists() else None
    if not commit.verify(target):
        return {p.name: p.read_bytes() for p in target.rglob("*")}
    return {name: (target / name).read_bytes() for name in json.loads((target / commit.MANIFEST).read_text())["files"]}


def no_output(target: Path) -> None:
    """Nothing at the target before."""


# what stood at the target, what is written, and what a reader may find at any moment
CASES = {
    "file over nothing": (no_output, write_file, (None, b"new")),
    "file over old": (lambda t: t.write_bytes(b"old"), write_file, (b"old", b"new")),
    "folder over nothing": (no_output, write_folder, (None, NEW)),
    "folder over an empty folder": (Path.mkdir, write_folder, ({}, NEW)),
    "folder over old": (lambda t: write_folder(t, OLD), write_folder, (OLD, NEW)),
    "folder over a file": (lambda t: t.write_bytes(b"old"), write_folder, (b"old", NEW)),
}


def killed_at(step: int, write, target: Path) -> bool:
    """Write in a child that is killed before its ``step``-th audited operation; False when it had fewer."""
    child = os.fork()
    if child == 0:
        left = [step]

        def count(event: str, _: object) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym", "shutil.rmtree"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            write(target)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_operation_leaves_old_or_new(name, tmp_path):
    before, write, allowed = CASES[name]
    seen = []
    for step in range(1, 200):
        target = tmp_path / str(step) / "out"
        target.parent.mkdir()
        before(target)
        if not killed_at(step, write, target):
            break
        seen.append(found(target))
        assert seen[-1] in allowed, f"killed at operation {step}"
        write(target)
        assert found(target) == allowed[1], f"written again after operation {step}"
    assert len(seen) >= 3 and allowed[0] in seen
    assert found(target) == allowed[1] and os.listdir(target.parent) == ["out"]


def strace(inject: str, target: Path, kind: str) -> int:
    """Write the new output under strace with a fault; the exit status (negative: killed)."""
    code = f"import sys, test_commit; from pathlib import Path; test_commit.write_{kind}(Path(sys.argv[1]))"
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={inject}", sys.executable, "-Bc", code, target]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL).returncode


def strace_works() -> bool:
    """Can this machine trace a process?"""
    run = shutil.which("strace") and subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True)
    return bool(run) and run.returncode == 0


needs_strace = pytest.mark.skipif(not strace_works(), reason="strace is not installed or not permitted")


@needs_strace
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_a_fault_at_every_system_call_leaves_old_or_new(kind, fault, tmp_path):
    before, _, (old, new) = CASES[f"{kind} over old"]
    faults = 0
    for call in WRITES if "KILL" in fault else ("write", "fsync"):
        for step in range(1, 100):
            target = tmp_path / f"{call}{step}" / "out"
            target.parent.mkdir()
            before(target)
            if strace(f"{call}:{fault}:when={step}", target, kind) == 0:  # it has no such call
                assert found(target) == new
                break
            faults += 1
            assert found(target) in (old, new), f"{fault} at {call} number {step}"
        else:
            pytest.fail(f"{call}: never done without a fault")
    assert faults >= 3


SMALL_DISK = """
import sys
from pathlib import Path
from megapatch.models import commit
from megapatch.models.cli import UserError

target = Path(sys.argv[1]) / "out"
try:
    with commit.staged_folder(target, tool="test") as stage:
        (stage / "big").write_bytes(bytes(1 << 20))
except UserError as error:
    print(error)
assert not any(target.parent.iterdir()), "something was left"
"""


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "-", sys.executable, "-c", SMALL_DISK, tmp_path]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"{tmp_path}/out: disk full (") and told.stdout.count("\n") == 1


@pytest.mark.parametrize("kind", [Exception, RuntimeError])  # of tokenizers, and what safetensors' own is made of
def test_a_full_disk_that_a_rust_library_met_is_told_and_no_other_failure_is(kind, tmp_path):
    with pytest.raises(UserError, match="out: disk full"), commit.staged_file(tmp_path / "out"):
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(kind, match="os error 5"), commit.staged_file(tmp_path / "out"):
        raise kind("Input/output error (os error 5)")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def steps(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """What is fsynced and renamed from here on, in order, by short names: (call, path)."""
    done: list[tuple[str, str]] = []
    stage = str(commit.staging_name(tmp_path / "deep" / "er" / "out"))

    def spy(call: str, real):
        def noted(*paths):
            done.append((call.strip("_"), str(paths[0]).replace(stage, "STAGE").replace(str(tmp_path), "")))
            return real(*paths)

        return noted

    for owner, call in ((commit, "fsync"), (commit, "_exchange"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, call, spy(call, getattr(owner, call)))
    return done


@pytest.mark.parametrize("name", CASES)
def test_all_is_durable_before_the_rename_and_the_name_after(name, tmp_path, steps):
    before, write, (_, new) = CASES[name]
    target = tmp_path / "deep" / "er" / "out"
    if name.endswith("nothing"):
        write(target)
        assert steps[:2] == [("fsync", ""), ("fsync", "/deep")], "the folders that were made"
    else:
        target.parent.mkdir(parents=True)
        before(target)
        steps.clear()
        write(target)
    *earlier, (rename, what), last = steps
    assert rename in ("rename", "replace", "exchange") and what == "STAGE" and last == ("fsync", "/deep/er")
    durable = {path for call, path in earlier if call == "fsync"}
    inside = {"STAGE"} if isinstance(new, bytes) else {"STAGE", "STAGE/a", "STAGE/sub", "STAGE/sub/b"}
    assert durable >= inside


def test_an_error_while_writing_keeps_the_old_output(tmp_path):
    write_file(tmp_path / "f", b"old")
    write_folder(tmp_path / "d", OLD)
    for staged, part in (
        (commit.staged_file(tmp_path / "f"), ""),
        (commit.staged_folder(tmp_path / "d", tool="t", force=True), "a"),
    ):
        with pytest.raises(ZeroDivisionError), staged as stage:
            (stage / part).write_bytes(b"half")
            raise ZeroDivisionError
    assert (found(tmp_path / "f"), found(tmp_path / "d")) == (b"old", OLD)
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_an_existing_output_needs_force_and_an_empty_folder_does_not(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with commit.staged_folder(target, tool="test"):
        pass
    with pytest.raises(UserError, match=r"out: exists already; .* --force"):
        with commit.staged_folder(target, tool="test"):
            raise AssertionError("not reached")


def test_a_link_stays_a_link(tmp_path):
    for write, name, new in ((write_file, "f", b"new"), (write_folder, "d", NEW)):
        (tmp_path / f"link-{name}").symlink_to(tmp_path / "far" / name)
        for _ in range(2):
            write(tmp_path / f"link-{name}")
        assert (tmp_path / f"link-{name}").is_symlink() and found(tmp_path / "far" / name) == new
    assert sorted(os.listdir(tmp_path / "far")) == ["d", "f"]


def test_a_device_a_file_as_folder_and_the_current_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="/dev/null: is not a regular file"):
        write_file(Path("/dev/null"))
    (tmp_path / "file").touch()
    for write in (write_file, write_folder):
        with pytest.raises(UserError, match=f"{tmp_path}/file: is a file, expected a folder"):
            write(tmp_path / "file" / "below" / "out")
    with pytest.raises(UserError, match="is the current folder"):
        write_folder(Path("."))


def test_what_an_interrupted_run_left_is_named(tmp_path, caplog):
    (tmp_path / "out.tmp-elsewhere-1").mkdir()
    with caplog.at_level(logging.WARNING):
        write_folder(tmp_path / "out")
    assert "out.tmp-elsewhere-1: of an interrupted run" in caplog.text
    assert (tmp_path / "out.tmp-elsewhere-1").is_dir()


def test_without_an_exchange_the_old_folder_is_moved_aside_first(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    write_folder(tmp_path / "out", OLD)
    write_folder(tmp_path / "out")
    assert found(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]


def test_the_manifest_says_what_was_written(tmp_path):
    write_folder(tmp_path / "out")
    manifest = commit.read_manifest(tmp_path / "out")
    assert manifest and manifest["tool"] == "test" and manifest["step"] == 7 and "torch" in manifest["versions"]
    assert manifest["files"]["sub/b"] == {"bytes": 7, "xxh3_128": commit.digest(tmp_path / "out" / "sub" / "b")}
    assert commit.verify(tmp_path / "out") is True
    (tmp_path / "foreign").mkdir()
    assert commit.verify(tmp_path / "foreign") is False


def test_a_manifest_inside_a_folder_is_a_file_like_others(tmp_path):
    write_folder(tmp_path / "out", {"sub/manifest.json": b"{}", "manifest.json": b"{}"})
    assert list(commit.read_manifest(tmp_path / "out")["files"]) == ["sub/manifest.json"]


def test_a_digest_that_is_known_is_taken_over_and_a_wrong_one_is_found(tmp_path):
    right = commit.xxhash.xxh3_128_hexdigest(b"new")
    for name, given in (("right", {"a": right}), ("wrong", {"a": "0" * 32})):
        with commit.staged_folder(tmp_path / name, tool="test", digests=given) as stage:
            (stage / "a").write_bytes(b"new")
    assert commit.verify(tmp_path / "right")
    with pytest.raises(UserError, match="wrong/a: content differs"):
        commit.verify(tmp_path / "wrong")
    with pytest.raises(AssertionError, match="not written"):
        with commit.staged_folder(tmp_path / "none", tool="test", digests={"b": right}):
            pass


def test_processes_that_verify_together_read_every_file_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", {f"f{i}": bytes([i]) for i in range(7)})
    real, read = commit.digest, []
    monkeypatch.setattr(commit, "digest", lambda path: (read.append(path.name), real(path))[1])
    for i in range(3):
        assert commit.verify(tmp_path / "out", share=(i, 3))
    assert sorted(read) == [f"f{i}" for i in range(7)]


def test_every_flipped_bit_is_found(tmp_path):
    write_folder(tmp_path / "out", {"a": random.Random(1).randbytes(5000), "b/c": bytes(100)})
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 3
    chosen = random.Random(2)
    for path in files:
        whole = path.read_bytes()
        for bit in chosen.sample(range(8 * len(whole)), 300):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged"):
                commit.verify(tmp_path / "out")
        path.write_bytes(whole)
    assert commit.verify(tmp_path / "out")


@pytest.mark.parametrize("length", [0, 1, 499])
def test_truncation_is_found_without_reading(length, tmp_path):
    write_folder(tmp_path / "out", {"a": bytes(500)})
    os.truncate(tmp_path / "out" / "a", length)
    with pytest.raises(UserError, match=f"out/a: {length} bytes, manifest.json says 500"):
        commit.verify(tmp_path / "out", digests=False)


def test_a_missing_file_is_named(tmp_path):
    write_folder(tmp_path / "out")
    (tmp_path / "out" / "sub" / "b").unlink()
    with pytest.raises(UserError, match=r"out/sub/b: missing"):
        commit.verify(tmp_path / "out", digests=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', '{"files": 5, "xxh3_128": "0"}', "\xff"])
def test_a_manifest_of_somebody_else_is_refused(text, tmp_path):
    (tmp_path / commit.MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="damaged, or not written by megapatch"):
        commit.verify(tmp_path)
