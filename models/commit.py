"""Outputs that are either old or new, never torn: staged beside the target, fsynced, renamed into place.

A finished folder holds ``manifest.json``: size and xxh3-128 of each file, the tool and the versions that wrote it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError, versions

MANIFEST = "manifest.json"
_BUFFER_BYTES = 8 << 20


def fsync(path: Path) -> None:
    """Make a file's data, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staging_name(target: Path) -> Path:
    """Where this process stages ``target``: beside it, so that the rename stays on one file system."""
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it is made durable and renamed to ``target``, on failure removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = staging_name(target)
    try:
        with naming_full_disks(target):
            yield stage
            fsync(stage)
            os.replace(stage, target)
            fsync(target.parent)
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def staged_folder(
    target: Path, *, tool: str, force: bool = False, about: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it gets a manifest, and replaces ``target``.

    An existing target is refused unless ``force``; it is removed only after the new one is in place.
    ``about``: what else the manifest should say (layout, step), read when the block ends.
    """
    refuse_existing(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = staging_name(target)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        with naming_full_disks(target):
            yield stage
            seal(stage, tool=tool, about=about)
            _swap(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse a target that exists and is not an empty folder, unless ``force``."""
    empty = target.is_dir() and not any(target.iterdir())
    if (target.exists() or target.is_symlink()) and not empty and not force:
        raise UserError(f"{target}: exists already; remove it, choose another --target, or pass --force")


def _swap(stage: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(stage, target)
    fsync(target.parent)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def seal(folder: Path, *, tool: str, about: Mapping[str, Any] | None = None) -> None:
    """fsync every file of ``folder``, then write its manifest, then fsync the folders."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
        fsync(path)
    manifest = {"tool": tool, "versions": versions(), **(about or {}), "files": files}
    with staged_file(folder / MANIFEST) as stage:
        stage.write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync(path)


def digest(path: Path) -> str:
    """xxh3-128 of a file, as hex digits."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while n := file.readinto(buffer):
            state.update(buffer[:n])
    return state.hexdigest()


def verify(folder: Path, *, digests: bool = True) -> bool:
    """True when ``folder`` is what its manifest says, False when it has none; a difference is a UserError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: not JSON ({error}); the folder is damaged") from error
    for name, said in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {MANIFEST}; the folder is damaged")
        if path.stat().st_size != said["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {said['bytes']}; the file is damaged"
            )
        if digests and digest(path) != said["xxh3_128"]:
            raise UserError(f"{path}: content differs from {MANIFEST}; the file is damaged")
    return True


@contextmanager
def naming_full_disks(target: Path) -> Iterator[None]:
    """Turn 'no space left' into a message that names the target and the free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (28, 122):  # ENOSPC, EDQUOT
            raise
        free = shutil.disk_usage(target.parent).free
        raise UserError(
            f"{target}: disk full ({free:,} bytes free); nothing was kept, free some space and run again"
        ) from error
