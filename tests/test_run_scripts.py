"""scripts/pretrain.sh, sft.sh and export.sh: the command that each starts, and what each asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TORCHRUN = "torchrun --standalone --nproc-per-node {} --max-restarts 0 --no-python mp-{} @a.args --save run"
STARTED = {  # script, variables -> the command
    ("pretrain", "ARGS=a.args SAVE=run"): TORCHRUN.format(1, "pretrain"),
    ("sft", "ARGS=a.args SAVE=run RANKS=4"): TORCHRUN.format(4, "sft"),
    ("export", "SAVE=run TARGET=hf"): "mp-convert --source run --target hf --to hf --verify",
    ("export", "SAVE=run TARGET=hf ARGS=a.args"): "mp-convert --source run --target hf --to hf --verify @a.args",
}


def run(folder: Path, script: str, variables: str) -> subprocess.CompletedProcess:
    """Run a script where torchrun and mp-convert only say how they were called."""
    for name in ("torchrun", "mp-convert"):
        (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*"\n')
        (folder / name).chmod(0o755)
    given = {name: value for name, value in os.environ.items() if name not in ("ARGS", "SAVE", "TARGET", "RANKS")}
    given |= dict(word.split("=") for word in variables.split())
    given["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [SCRIPTS / f"{script}.sh"]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("script", "variables"), STARTED)
def test_what_a_script_starts(script: str, variables: str, tmp_path: Path) -> None:
    done = run(tmp_path, script, variables)
    assert (done.returncode, done.stdout) == (0, STARTED[script, variables] + "\n"), done.stderr


@pytest.mark.parametrize(
    ("script", "variables", "missing"),
    [
        ("pretrain", "SAVE=run", "ARGS"),
        ("sft", "ARGS=a.args", "SAVE"),
        ("export", "SAVE=run", "TARGET"),
    ],
)
def test_what_is_not_named_is_asked_for(script: str, variables: str, missing: str, tmp_path: Path) -> None:
    done = run(tmp_path, script, variables)
    assert done.returncode != 0 and done.stdout == "" and f"{missing}: " in done.stderr
