"""mp-convert as a process whose system calls fail or kill it: old or new is there, and the next run completes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from convert_faults import tree
from model_folders import make
from test_commit import needs_strace

from megapatch.models.core_files import TRACKER
from megapatch.tools.convert.convert import main

CODE = "import sys; from megapatch.tools.convert.convert import main; sys.exit(main(sys.argv[1:]))"
KILLED = ("write", "fsync", "fdatasync", "mkdir", "ftruncate", "rename", "renameat2", "unlink", "unlinkat", "flock")
CASES = [
    *((call, "signal=KILL") for call in KILLED),
    *((call, f"error={error}") for call in ("write", "fsync", "fdatasync") for error in ("ENOSPC", "EIO")),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model of two files."""
    return make(tmp_path_factory.mktemp("hf") / "hf", "qwen3", "20KB", num_hidden_layers=1)


def traced(source: Path, target: Path, *options: str) -> int:
    """Exit status of mp-convert --force under strace; negative or above 128: killed."""
    run = [sys.executable, "-Bc", CODE, "--source", str(source), "--target", str(target), "--force"]
    done = subprocess.run(["strace", "-f", "-qq", *options, *run], capture_output=True, text=True)
    message_failed = "print(line, file=sys.stderr" in done.stderr  # strace counts the calls of each thread apart
    assert "Traceback" not in done.stderr or message_failed, done.stderr
    return done.returncode


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("call, fault", CASES)
def test_a_fault_at_every_system_call_leaves_old_or_new(call, fault, source, tmp_path, capsys):
    old = tmp_path / "old"
    (old / "release").mkdir(parents=True)
    (old / "release" / "precious").write_text("x")
    (old / TRACKER).write_text("release")
    shutil.copytree(old, tmp_path / "new")
    log = tmp_path / "calls"
    assert traced(source, tmp_path / "new", "-o", str(log), "-e", f"trace={call}") == 0
    count = sum(f" {call}(" in f" {line.partition(' ')[2].strip()}" for line in log.read_text().splitlines())
    assert count or call in ("rename", "fdatasync"), "which are not always there"
    new = tree(tmp_path / "new")
    faults = 0
    for step in range(1, count + 1):
        target = shutil.copytree(old, tmp_path / f"{step}" / "out")
        status = traced(source, target, "-o", os.devnull, "-e", f"inject={call}:{fault}:when={step}")
        faults += status != 0
        found = {name: said for name, said in tree(target).items() if ".tmp-" not in name}
        assert weights(found) in (weights(tree(old)), weights(new)), f"{call} number {step}: {status}"
        assert main(["--source", str(source), "--target", str(target), "--force"]) == 0
        done = {name: said for name, said in tree(target).items() if not name.startswith(f"{TRACKER}.tmp-")}
        assert weights(done) == weights(new)
    assert faults or not count


def weights(found: dict[str, str]) -> dict[str, str]:
    """All but the manifest, whose plan names its source's time of change."""
    return {name: said for name, said in found.items() if "manifest" not in name}
