"""A conversion that was interrupted goes on; one with other options or another source starts anew, and says so."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from test_convert_failures import CONFIG, command, large
from transformers import AutoConfig

from megapatch.models import commit, core_files
from megapatch.tools.convert import execute, journal, progress
from megapatch.tools.convert.convert import main
from megapatch.tools.convert.plan import Plan

__all__ = ["large"]  # a fixture
SHARDS = ("--max-shard-size", "30MB")


@pytest.fixture(scope="module")
def core(large, tmp_path_factory) -> Path:
    """The core checkpoint of the large folder."""
    target = tmp_path_factory.mktemp("core") / "core"
    assert main(["--source", str(large), "--target", str(target)]) == 0
    return target


def interrupted(source: Path, target: Path, *more: str, after: int = 2) -> Path:
    """The journal of a conversion to ``target`` that was killed when ``after`` files were finished."""
    path, stage = journal.paths(target)
    target = target if core_files.is_core(source) else target.parent
    slow = "import os, time; real = os.write; os.write = lambda *a: (time.sleep(0.01), real(*a))[1]; "
    code = slow + "import sys; from megapatch.tools.convert.convert import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, *command(source, target)[3:], "-j", "2", *more])
    while not [*stage.glob("*.distcp"), *stage.glob("*.safetensors")] or path.read_bytes().count(b"\n") <= after:
        time.sleep(0.002)
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return path


def exported(source: Path, target: Path, *more: str) -> dict[str, str]:
    """Run the export; the digests of its files."""
    assert main(["--source", str(source), "--target", str(target), *more]) == 0
    assert commit.verify(target) and not list(target.parent.glob(f"{target.name}.tmp-*"))
    return {name: said["xxh3_128"] for name, said in commit.read_manifest(target)["files"].items()}


def test_a_killed_run_goes_on_and_ends_with_the_same_digests(core, tmp_path, capsys):
    whole = exported(core, tmp_path / "whole", *SHARDS)
    path = interrupted(core, tmp_path / "out", *SHARDS)
    stage = tmp_path / "out.tmp-stage"
    noted = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    before = {said["file"]: (stage / said["file"]).stat() for said in noted}
    capsys.readouterr()
    assert exported(core, tmp_path / "out", *SHARDS) == whole
    size = sum(said["bytes"] for said in noted)
    assert (
        f"{stage}: going on with {len(noted)} files ({size:,} bytes) of an interrupted run" in capsys.readouterr().err
    )
    for name, stat in before.items():  # the very same files
        assert os.path.samestat(stat, (tmp_path / "out" / name).stat())


def test_what_is_staged_is_taken_by_no_loader(core, large, tmp_path):
    interrupted(core, tmp_path / "out", *SHARDS)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoConfig.from_pretrained(tmp_path / "out.tmp-stage")
    assert list((tmp_path / "out.tmp-stage").glob("model-*.safetensors"))
    faulty = tmp_path / "core" / "release"
    interrupted(large, faulty, after=0)
    stage = faulty.with_name("release.tmp-stage")
    with pytest.raises(FileNotFoundError, match=r"\.metadata"):
        dcp.FileSystemReader(stage).read_metadata()
    assert list(stage.glob("*.distcp")) and not core_files.is_core(stage)


def changed_source(core: Path) -> None:
    os.utime(next(core.glob("release/*.distcp")))


CHANGES = {
    "other options": (lambda core: None, ("--dtype", "fp32", *SHARDS)),
    "other files": (lambda core: None, ("--max-shard-size", "40MB")),
    "changed source": (changed_source, SHARDS),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_means_a_fresh_start_and_is_said(case, core, tmp_path, capsys):
    change, options = CHANGES[case]
    interrupted(core, tmp_path / "out", *SHARDS)
    change(core)
    capsys.readouterr()
    exported(core, tmp_path / "out", *options)
    told = capsys.readouterr().err
    assert "out.tmp-journal: of an interrupted run with other options or another source; starting anew" in told
    assert "going on" not in told


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


DAMAGE = {
    "staged file cut short": lambda stage: os.truncate(stage, stage.stat().st_size - 1),
    "staged file rewritten": rewritten,
    "staged file missing": Path.unlink,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_finished_file_that_changed_is_written_again(case, core, tmp_path, capsys):
    path = interrupted(core, tmp_path / "out", *SHARDS)
    noted = [json.loads(line)["file"] for line in path.read_text().splitlines()[1:]]
    DAMAGE[case](tmp_path / "out.tmp-stage" / noted[0])
    capsys.readouterr()
    assert exported(core, tmp_path / "out", *SHARDS)
    assert f"going on with {len(noted) - 1} files" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b'{"file": "model-0', b"", b"\x00\x00"])
def test_a_line_that_was_being_written_is_not_read(torn, core, tmp_path, capsys):
    path = interrupted(core, tmp_path / "out", *SHARDS)
    noted = path.read_text().count("\n") - 1
    with path.open("ab") as file:
        file.write(torn)
    capsys.readouterr()
    assert exported(core, tmp_path / "out", *SHARDS)
    assert f"going on with {noted} files" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"\x00" * 50])
def test_a_journal_that_is_none_means_a_fresh_start(content, core, tmp_path):
    (tmp_path / "out.tmp-journal").write_bytes(content)
    (tmp_path / "out.tmp-stage" / "deep").mkdir(parents=True)
    (tmp_path / "out.tmp-stage" / "deep" / "config.json").write_text("x")
    assert exported(core, tmp_path / "out", *SHARDS)
    assert not (tmp_path / "out" / "deep").exists()


def test_two_at_a_time_are_refused_and_the_first_is_not_disturbed(core, tmp_path, capsys):
    _, stage = journal.paths(tmp_path / "out")
    living = journal.Journal(tmp_path / "out", "identity")
    living.make_stage()
    (stage / "half").write_text("x")
    try:
        assert main(["--source", str(core), "--target", str(tmp_path / "out")]) == 1
    finally:
        living.close()
    said = f"mp-convert: error: {tmp_path}/out: another mp-convert is writing it; wait, or choose another target\n"
    assert capsys.readouterr().err.endswith(said)
    assert (stage / "half").read_text() == "x"


def test_a_file_system_without_locks_is_refused_by_name(core, tmp_path, monkeypatch, capsys):
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(journal.fcntl, "flock", none)
    assert main(["--source", str(core), "--target", str(tmp_path / "out")]) == 1
    assert "out.tmp-journal: its file system has no locks (Function not implemented)" in capsys.readouterr().err


def test_a_failed_run_keeps_what_is_worth_it_and_the_next_one_goes_on(core, tmp_path, monkeypatch, capsys):
    real, left = os.write, [100_000_000]

    def full(file: int, data: bytes) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        left[0] = 40_000_000  # one file
        assert main(["--source", str(core), "--target", str(tmp_path / "out"), "-j", "1", *SHARDS]) == 1
        assert list(tmp_path.iterdir()) == [], "too little to keep"
        left[0] = 100_000_000
        assert main(["--source", str(core), "--target", str(tmp_path / "out"), "-j", "1", *SHARDS]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out.tmp-journal", "out.tmp-stage"}
    kept, error = capsys.readouterr().err.splitlines()[-2:]
    assert "out.tmp-stage: kept 4 finished files (" in kept and "the same command goes on from them" in kept
    assert error.startswith(f"mp-convert: error: {tmp_path}/out: disk full (")
    assert exported(core, tmp_path / "out", *SHARDS)
    assert "going on with 4 files" in capsys.readouterr().err


def test_a_source_that_changes_meanwhile_is_told(core, tmp_path, monkeypatch, capsys):
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (changed_source(core), real(file)))
    monkeypatch.setattr(execute, "_FLUSH_S", 0.001)
    assert main(["--source", str(core), "--target", str(tmp_path / "out"), *SHARDS]) == 1
    assert "distcp: changed while it was copied; run again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_that_only_the_flusher_is_told_fails_the_file(tmp_path, monkeypatch):
    """The system reports once that data was lost: to whichever fsync comes first."""

    def lost(file: int) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "a").write_bytes(bytes(20 << 20))
    plan = Plan()
    plan.add_file(tmp_path / "a", "b")
    monkeypatch.setattr(os, "fdatasync", lost)
    monkeypatch.setattr(execute, "_FLUSH_S", 0.0001)
    real = os.write
    monkeypatch.setattr(os, "write", lambda *given: (time.sleep(0.01), real(*given))[1])
    (tmp_path / "out").mkdir()
    noted: list[object] = []
    with pytest.raises(OSError, match="Input/output error") as told:
        execute.execute(plan.finish(), tmp_path / "out", 1, lambda size: None, note=lambda *said: noted.append(said))
    assert told.value.filename == str(tmp_path / "out" / "b") and noted == []


@pytest.mark.parametrize("there, here", [("/dev/shm", None), (None, "/dev/shm")])
def test_across_file_systems(there, here, large, tmp_path):
    import shutil
    import tempfile

    with contextlib.ExitStack() as stack:
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory(dir=p or tmp_path))) for p in (there, here)]
        if places[0].stat().st_dev == places[1].stat().st_dev:
            pytest.skip("one file system")
        source = shutil.copytree(large, places[0] / "hf", copy_function=lambda a, b: os.symlink(a, b))
        (source / "config.json").unlink()
        (source / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
        (source / "model.safetensors").unlink()
        small_weights(source / "model.safetensors")
        assert main(["--source", str(source), "--target", str(places[1] / "core")]) == 0
        back = exported(places[1] / "core", places[0] / "back")
        assert back["model.safetensors"] == commit.digest(source / "model.safetensors")


def small_weights(path: Path) -> None:
    """One layer of random numbers."""
    from megapatch.models import hf_files, shapes
    from megapatch.models.family import placed_rules

    config = CONFIG | {"num_hidden_layers": 1}
    letters = shapes.sizes(config)
    named = {n: s for p in placed_rules(config) for n, s in zip(p.hf, shapes.part_shapes(p.rule, letters), strict=True)}
    header, _, size = hf_files.header(hf_files.saved_order([(n, "bfloat16", s) for n, s in named.items()]))
    path.write_bytes(header + os.urandom(size - len(header)))


def test_a_log_gets_a_line_now_and_then(caplog, monkeypatch):
    clock = iter([100.0, 110.0, 131.0, 131.0, 140.0, 170.0, 170.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"), progress.Progress(10**10, 10**9) as counted:
        for _ in range(4):
            counted.add(10**9)
    assert [record.message for record in caplog.records] == [
        "3.0 of 10.0 GB, 0.06 GB/s, 108 s left",
        "5.0 of 10.0 GB, 0.06 GB/s, 88 s left",
    ]
