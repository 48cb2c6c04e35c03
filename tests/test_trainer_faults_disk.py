"""Errors of disks become one line with path, reason, needed and free bytes, and exit status 73; all others pass."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest

from megapatch.models.cli import UserError
from megapatch.models.commit import FullDisk
from megapatch.trainer.saving import disk

FREE = "7 bytes are free; what was complete before is kept; "
FULL, BROKEN = FREE + "free space and run again", FREE + "look at the disk, or name another place and run again"


def system(name: str, path: str | None = None) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path)


TOLD = {  # error: what is said of a target /run with 9 bytes to write
    "full": (system("ENOSPC"), f"/run/x: disk full: 9 bytes needed, {FULL}"),
    "full, file named": (system("ENOSPC", "/run/x/y"), f"/run/x/y: disk full: 9 bytes needed, {FULL}"),
    "quota": (system("EDQUOT"), f"/run/x: disk full: 9 bytes needed, {FULL}"),
    "failing": (system("EIO", "/run/x/y"), f"/run/x/y: Input/output error: 9 bytes needed, {BROKEN}"),
    "read-only": (system("EROFS"), f"/run/x: Read-only file system: 9 bytes needed, {BROKEN}"),
    "told once already": (FullDisk("x"), f"/run/x: disk full: 9 bytes needed, {FULL}"),
    "torch.save": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nmore"),
        "/run/x: not written ([enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534): 9 bytes needed, "
        + BROKEN,
    ),
}
PASSED = [system("ENOENT"), system("EACCES"), RuntimeError("gloo"), ValueError("x"), UserError("x"), KeyError(1)]


@pytest.mark.parametrize("case", TOLD)
def test_an_error_of_the_disk_is_told_with_path_and_bytes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(7))
    error, expected = TOLD[case]
    with pytest.raises(disk.DiskError) as found, disk.naming(Path("/run/x"), 9):
        raise error
    assert (str(found.value), found.value.status) == (expected, 73)


@pytest.mark.parametrize("error", PASSED, ids=repr)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as found, disk.naming(Path("/run/x"), 9):
        raise error
    assert found.value is error


def test_needed_bytes_are_left_out_where_nobody_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(7))
    with pytest.raises(disk.DiskError, match="/run/x: disk full: 7 bytes are free"), disk.naming(Path("/run/x")):
        raise system("ENOSPC")
