"""The shell scripts: strict, short, runnable from any folder, clean for shellcheck."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *sorted((ROOT / "scripts").rglob("*.sh")),
    *sorted((ROOT / "scripts").rglob("*.sbatch")),
    ROOT / ".ci" / "run",
]
NAMES = [str(path.relative_to(ROOT)) for path in SCRIPTS]


@pytest.fixture(params=SCRIPTS, ids=NAMES)
def script(request) -> Path:
    """One of the scripts."""
    return request.param


def test_is_strict_short_and_says_what_it_does(script):
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" or (script.suffix == ".sbatch" and lines[0] == "#!/bin/bash")
    assert lines[1].startswith("#") and "set -euo pipefail" in lines
    assert len(lines) <= 60


def test_can_be_run(script):
    assert os.access(script, os.X_OK)
    mode = subprocess.check_output(["git", "ls-files", "-s", str(script)], cwd=ROOT, text=True)[:6]
    assert mode in ("100755", ""), "git add --chmod=+x"


def test_takes_no_positional_arguments(script):
    text = script.read_text().replace('if [ "${1:-}" = --', "")  # a flag; arguments of functions are indented
    assert [line for line in text.splitlines() if re.match(r"[^ #].*\$\{?[1-9]", line)] == []


def test_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", "-P", ".", str(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == ""


def test_an_environment_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine").touch()
    done = subprocess.run(
        ["bash", "-c", 'source "$0" && make_env "$1" nothing', ROOT / "scripts" / "env.sh", tmp_path / "env"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "was not made by this script; remove it" in done.stderr
    assert (tmp_path / "env" / "mine").exists()


def test_an_unfinished_environment_is_made_again_and_a_finished_one_used(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".megapatch").write_text("unfinished\n")
    (tmp_path / "env" / "half").touch()
    command = [
        "bash",
        "-c",
        'source "$0" && make_env "$1" --no-index pip',
        ROOT / "scripts" / "env.sh",
        tmp_path / "env",
    ]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0 and "is ready" in first.stderr, first.stderr
    assert not (tmp_path / "env" / "half").exists() and (tmp_path / "env" / "bin" / "python").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input"], "--input needs a text file"),
        (["--input", "--steps", "9"], "--input needs a text file"),
        (["--steps", "5"], "--steps 5: expected 6 or more"),
        (["--steps", "many"], "--steps many: expected 6 or more"),
        (["--outputs", "x"], "unknown: --outputs"),
    ],
)
def test_a_wrong_option_of_the_quickstart_is_told_before_anything_starts(arguments, said, tmp_path):
    done = subprocess.run(
        [ROOT / "scripts" / "quickstart.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert said in done.stderr


STEPS = """
source "$0" && begin_steps out
step "one that is killed" killed_after 9 out/log {python} -c '
import signal, sys, time
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
open("out/started", "w").close()
time.sleep(30)'
"""


@pytest.mark.timeout(25)
def test_ctrl_c_ends_the_step_that_is_to_be_killed_too(tmp_path):
    started = subprocess.Popen(
        ["bash", "-c", STEPS.format(python=sys.executable), ROOT / "scripts" / "steps.sh"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (tmp_path / "out" / "started").exists():
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(10) == 130
    log = tmp_path / "out" / "logs" / "01.log"
    while "KeyboardInterrupt" not in log.read_text():  # or the test's timeout
        time.sleep(0.05)


def test_a_step_that_fails_names_its_log_and_shows_its_end(tmp_path):
    script = 'source "$0" && begin_steps out && step "list" ls nowhere'
    done = subprocess.run(
        ["bash", "-c", script, ROOT / "scripts" / "steps.sh"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "FAILED, log out/logs/01.log: ls nowhere" in done.stderr
    assert "No such file" in done.stderr.splitlines()[-1]
