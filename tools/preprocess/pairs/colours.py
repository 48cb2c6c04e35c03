"""Colours on a terminal that wants them, and text that cannot disturb one."""

import os
import sys

GREEN, DIM, REVERSE = "32", "2", "7"


def wanted() -> bool:
    """Is stdout a terminal, and NO_COLOR (https://no-color.org) not set?"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, codes: str) -> str:
    """``text`` in colours (numbers with ; between), each line for itself so that a pager keeps them."""
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def printable(text: str) -> str:
    """``text`` with control characters, line ends and tabs aside, spelled out: data may hold what moves a cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
