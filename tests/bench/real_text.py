"""Real text that a machine has: documentation, man pages and sources, as JSON lines in an order fixed by a seed."""

import gzip
import hashlib
import html
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megapatch.models.cli import UserError

ROOTS = (
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/perl",
    "/usr/include",
    "/usr/lib/python3",
    "/usr/src",
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
)
PAGES = (".html", ".htm", ".xhtml")
KINDS = (*PAGES, ".txt", ".md", ".rst", ".py", ".c", ".h", ".hpp", ".cpp", ".pl", ".pm", ".js", ".css", ".xml", "")
MAN = re.compile(r"\.\d\w*$")  # open.2, printf.3p
NO_TEXT = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.S | re.I)
BLANKS = re.compile(r"[ \t]*\n\s*\n\s*")
MAX_BYTES = 4 << 20  # of a file: what is longer is a table or generated
PACKAGES = "python3-doc debian-handbook linux-doc manpages manpages-de manpages-fr manpages-es manpages-ru rust-doc"


def collect(path: Path, num_bytes: float, seed: int) -> None:
    """Write about ``num_bytes`` of JSON lines with a text each; too little text on the machine is a UserError."""
    paths = sorted({os.path.realpath(one) for root in ROOTS for one in _files(root)})
    random.Random(seed).shuffle(paths)
    seen: set[bytes] = set()
    written = 0
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for one in paths:
            text = _text(one)
            name = hashlib.sha1(text.encode()).digest()
            if len(text) < 200 or name in seen:
                continue  # licences and stubs, many times over
            seen.add(name)
            written += file.write(json.dumps({"text": text, "path": one}, ensure_ascii=False).encode() + b"\n")
            if written >= num_bytes:
                break
    if written < num_bytes:
        raise UserError(
            f"{written / 1e6:.0f} MB of text found under {' '.join(ROOTS)}, {num_bytes / 1e6:.0f} expected; install "
            f"more documentation, such as (Debian) {PACKAGES}, or ask for less with --megabytes"
        )
    partial.rename(path)


def _files(root: str) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            plain = name.removesuffix(".gz")
            if os.path.splitext(plain)[1].lower() in KINDS or MAN.search(plain):
                yield os.path.join(folder, name)


def _text(path: str) -> str:
    """The text of a file, without the tags of a page; empty for what is not UTF-8."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            text = file.read(MAX_BYTES).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    if path.removesuffix(".gz").lower().endswith(PAGES):
        text = BLANKS.sub("\n\n", html.unescape(NO_TEXT.sub("", text))).strip()
    return "" if "\0" in text else text


def cut(source: Path, target: Path, num_bytes: float) -> None:
    """Copy the first lines that make ``num_bytes``, the last one whole."""
    with source.open("rb") as file, target.open("wb") as out:
        written = 0
        while written < num_bytes and (line := file.readline()):
            written += out.write(line)
