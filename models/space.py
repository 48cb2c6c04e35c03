"""Sizes as people write them, and how much memory this process may still take."""

import argparse
from pathlib import Path

import psutil

from megapatch.models.cli import UserError

SUFFIXES = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
UNLIMITED = 2**60  # cgroup v1 says 'no limit' with a number about as large as this


class DoesNotFit(UserError):
    """More memory is needed than there is; the message has the numbers."""

    status = 3


def count(text: str) -> int:
    """'65536', '64Ki' or '64KiB' as a whole number of at least 1."""
    plain = text.strip().removesuffix("B")
    suffix = plain[-2:] if plain[-2:] in SUFFIXES else ""
    digits = plain.removesuffix(suffix)
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number such as 65536, 64Ki, 32Mi or 1GiB")
    return int(digits) * SUFFIXES[suffix]


def short(number: float) -> str:
    """65536 as '64Ki', 1.5 * 2**30 as '1.5Gi'."""
    suffix = next((s for s in ("Gi", "Mi", "Ki") if number >= SUFFIXES[s]), "")
    return f"{number / SUFFIXES[suffix]:.4g}{suffix}"


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can still allocate: the machine's available memory, or less under a cgroup limit."""
    return min([int(psutil.virtual_memory().available), *_cgroup_free(root)])


def _cgroup_free(root: Path) -> list[int]:
    """What the cgroups of this process (v2, else v1) leave free, in bytes; empty without a limit."""
    found = []
    for folder, names in _cgroups(root):
        try:
            limit, used = ((folder / name).read_text().strip() for name in names)
        except OSError:  # the top group has no limit, and other hierarchies no such file
            continue
        if limit == "max" or int(limit) >= UNLIMITED:
            continue
        found.append(max(0, int(limit) - int(used) + _reclaimable(folder)))
    return found


def _cgroups(root: Path) -> list[tuple[Path, tuple[str, str]]]:
    """Folders of this process's memory groups and their parents, with the file names of limit and usage."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        here = top / path.lstrip("/")
        found += [(folder, names) for folder in (here, *here.parents) if folder.is_relative_to(top)]
    return found


def _reclaimable(folder: Path) -> int:
    """Bytes of page cache counted as used that the kernel gives back on demand."""
    try:
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
