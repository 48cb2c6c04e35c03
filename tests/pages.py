"""Commands and outputs that a page shows, run in one shell and compared with what they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.M | re.S)
MARK = "=== end of block"
FIGURE = re.compile(r"\d+(?:[,.:]\d+)*(?:e[+-]?\d+)?")


def shown(page: str) -> list[tuple[str, str | None]]:
    """Each bash block with the text block that follows it at once, None where there is none."""
    found = [(m[1], m[2], m.start(), m.end()) for m in BLOCK.finditer(page)]
    pairs = []
    for i, (kind, text, _, end) in enumerate(found):
        follows = i + 1 < len(found) and found[i + 1][0] == "text" and not page[end : found[i + 1][2]].strip()
        if kind == "bash":
            pairs.append((text, found[i + 1][1] if follows else None))
    return pairs


def printed(commands: list[str], folder: Path, more: dict[str, str] | None = None, timeout_s: float = 300) -> list[str]:
    """What each of the commands prints, stdout and stderr together, all in one shell; every one must succeed."""
    script = "set -euo pipefail\n" + "".join(f"{text}\necho '{MARK}'\n" for text in commands)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    fixed = {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}  # pytest-xdist sets 80
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=os.environ | fixed | (more or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.split(f"{MARK}\n")


def plain(text: str) -> str:
    """Figures as #, and blanks and rulers, whose widths follow from figures, as one."""
    return re.sub(r"-{3,}", "-", re.sub(r"[ \t]+", " ", FIGURE.sub("#", text)))


def matches(shown: str, printed: str) -> bool:
    """Whether the words are the same; '...' stands for anything, on a line of its own for any lines."""
    lines = [
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, plain(line).split("..."))) + r"\n"
        for line in shown.splitlines()
    ]
    return re.fullmatch("".join(lines), plain(printed)) is not None
