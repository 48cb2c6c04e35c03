"""scripts/quickstart.sh: every check holds; with one spoiled weight it says which one does not, and fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPOILING = """#!/usr/bin/env bash
# mp-convert, but one weight of an exported folder has the wrong sign.
set -euo pipefail
"{convert}" "$@"
case "$*" in
    *exported*) "{python}" - "${{@: -1}}/model.safetensors" <<'END'
import sys
from safetensors.torch import load_file, save_file
weights = load_file(sys.argv[1])
weights["model.norm.weight"].neg_()
save_file(weights, sys.argv[1], {{"format": "pt"}})
END
esac
"""


def quickstart(folder: Path, steps: int, first_on_path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the script in the environment of the tests, on a few files of the standard library."""
    text = [str(path) for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))]
    places = [str(p) for p in (first_on_path, Path(sys.executable).parent) if p] + [os.environ["PATH"]]
    return subprocess.run(
        [ROOT / "scripts" / "quickstart.sh", "--input", *text, "--steps", str(steps), "--output", folder],
        env=os.environ | {"PATH": ":".join(places)},
        capture_output=True,
        text=True,
        timeout=500,
    )


def checks(folder: Path) -> list[dict]:
    """The table of checks."""
    return [json.loads(line) for line in (folder / "checks.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_checks_hold(tmp_path):
    done = quickstart(tmp_path / "out", 12)
    assert done.returncode == 0, done.stderr
    assert [check["ok"] for check in checks(tmp_path / "out")] == [True] * 4
    assert done.stderr.count("    holds  ") == 4 and "FAILED" not in done.stderr
    equal = checks(tmp_path / "out")[0]
    assert equal["found"] == equal["expected"] == "12 of 12 equal"
    resumed = (tmp_path / "out" / "run" / "log.jsonl").read_text()
    assert '"event": "resume"' in resumed  # it was killed, and went on
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(check["check"].split(":")[0] in page for check in checks(tmp_path / "out"))


@pytest.mark.slow
def test_a_spoiled_weight_fails_loudly(tmp_path):
    (tmp_path / "bin").mkdir()
    convert = Path(sys.executable).parent / "mp-convert"
    (tmp_path / "bin" / "mp-convert").write_text(SPOILING.format(convert=convert, python=sys.executable))
    (tmp_path / "bin" / "mp-convert").chmod(0o755)
    done = quickstart(tmp_path / "out", 6, tmp_path / "bin")
    assert done.returncode == 1
    assert "    FAILED greedy text of megatron-core and of transformers is the same" in done.stderr
    assert [check["ok"] for check in checks(tmp_path / "out")] == [True, True, False, False]
    assert (tmp_path / "out" / "report.html").exists()  # and shows what failed
