"""Outputs that are either old or new, never torn: staged beside the target, fsynced, renamed into place.

A finished folder holds ``manifest.json``: size and xxh3-128 of each file, the tool and the versions that wrote it,
and a digest of itself. Neither safetensors nor megatron-core's checkpoints carry checksums of their own.
"""

import ctypes
import errno
import glob
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError, versions

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_OWN = "xxh3_128"  # the manifest's digest of the rest of itself
_BUFFER_BYTES = 8 << 20
_THREADS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDisk(UserError):
    """No space left for an output."""


def fsync(path: Path) -> None:
    """Make a file's data, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system that names no file this path."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def staging_name(target: Path) -> Path:
    """Where this process stages ``target``: beside it, so that the rename stays on one file system."""
    return target.with_name(f"{target.name}.tmp-{platform.node()}-{os.getpid()}")


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it is made durable and renamed to ``target``, on failure removed."""
    target = real(target)
    if target.exists() and not target.is_file():
        raise UserError(f"{target}: is not a regular file; choose another output")
    stage = _make_room(target)
    try:
        with naming_full_disks(target):
            yield stage
            fsync(stage)
            os.replace(stage, target)
            fsync(target.parent)
    finally:
        stage.unlink(missing_ok=True)


def refuse_unwritable(target: Path) -> None:
    """Find out before long work, not after it, that ``staged_file`` cannot write (OSError that names ``target``)."""
    try:
        stage = _make_room(real(target))
        stage.touch()
        stage.unlink()
    except OSError as error:
        error.filename = str(target)
        raise


@contextmanager
def staged_folder(
    target: Path,
    *,
    tool: str,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
    stage: Path | None = None,
) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it gets a manifest, and replaces ``target``.

    An existing target is refused unless ``force``; it stays until the new one takes its place.
    ``about``: what else the manifest should say (layout, step); ``digests``: the xxh3-128 of files whose content was
    digested while it was written. Both are read when the block ends. ``stage``: the folder to fill, of the caller's
    making; when the block fails it is left to the caller.
    """
    refuse_existing(target, force)
    target = real(target)
    folder = stage or _make_room(target)
    folder.mkdir(exist_ok=stage is not None)
    try:
        with naming_full_disks(target):
            yield folder
            seal(folder, tool=tool, about=about, digests=digests)
            _put(folder, target)
    except BaseException:
        if stage is None:
            remove(folder)
        raise
    remove(folder)  # what the target was before


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse a target that exists and is not an empty folder, unless ``force``."""
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not force:
        raise UserError(f"{target}: exists already; remove it, choose another output, or pass --force")


def real(target: Path) -> Path:
    """The target itself where a symbolic link is given, so that the link stays."""
    target = Path(os.path.realpath(target))
    if target == Path.cwd() or not target.name:
        raise UserError(f"{target}: is the current folder; name a folder inside it")
    return target


def _make_room(target: Path) -> Path:
    """The free staging path of ``target``, whose parents exist durably."""
    make_parents(target)
    stage = staging_name(target)
    remove(stage)  # of an earlier process with this id
    for other in target.parent.glob(f"{glob.escape(target.name)}.tmp-*"):
        log.warning("%s: of an interrupted run, or another one is writing; remove it if not", other)
    return stage


def make_parents(target: Path) -> None:
    """Make the folders around ``target``, durably."""
    if wrong := [p for p in target.parents if p.exists() and not p.is_dir()]:
        raise UserError(f"{wrong[0]}: is a file, expected a folder; choose another output than {target}")
    for parent in reversed([p for p in target.parents if not p.exists()]):
        parent.mkdir(exist_ok=True)
        fsync(parent.parent)


def remove(path: Path) -> None:
    """Remove a file or folder that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(stage: Path, target: Path) -> None:
    """Rename ``stage`` to ``target``; what was there takes the staging name."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        os.rename(stage, target)
    elif not _exchange(stage, target):
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        log.info("%s: no atomic exchange on this file system; until done the old one is %s", target, old)
        os.rename(target, old)
        os.rename(stage, target)
        fsync(target.parent)
        remove(old)
    fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def seal(
    folder: Path,
    *,
    tool: str,
    about: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
) -> None:
    """fsync every file of ``folder``, then write its manifest, then fsync the folders; ``digests`` known so far."""
    known = {folder / name: value for name, value in (digests or {}).items()}

    def entry(path: Path) -> dict[str, Any]:
        fsync(path)
        return {"bytes": path.stat().st_size, "xxh3_128": known.get(path) or digest(path)}

    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    assert known.keys() <= set(paths), f"digests of files that were not written: {known.keys() - set(paths)}"
    with ThreadPoolExecutor(_THREADS) as pool:
        files = {p.relative_to(folder).as_posix(): e for p, e in zip(paths, pool.map(entry, paths), strict=True)}
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync(path)
    manifest = {"tool": tool, "versions": versions(), **(about or {}), "files": files}
    manifest[_OWN] = xxhash.xxh3_128_hexdigest(_json(manifest))
    with staged_file(folder / MANIFEST) as stage:
        stage.write_bytes(_json(manifest))


def _json(manifest: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(manifest, indent=1)}\n".encode()


def digest(path: Path) -> str:
    """xxh3-128 of a file, as hex digits."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while n := file.readinto(buffer):
            state.update(buffer[:n])
    return state.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``, None when it has none; one that is damaged or not ours is a UserError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        manifest = None
    own = manifest.pop(_OWN, None) if isinstance(manifest, dict) else None
    if own is None or own != xxhash.xxh3_128_hexdigest(_json(manifest)):
        raise UserError(f"{path}: damaged, or not written by megapatch; remove it to read the folder unverified")
    return manifest


def verify(folder: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> bool:
    """True when ``folder`` is what its manifest says, False when it has none; a difference is a UserError.

    ``share`` = (i, n): of n processes that verify together, this one is number i and digests its share of the files.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    files = {folder / name: said for name, said in manifest["files"].items()}
    for path, said in files.items():
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {MANIFEST}; the folder is damaged")
        if path.stat().st_size != said["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {said['bytes']}; it is damaged")
    mine = dict(list(files.items())[share[0] :: share[1]])
    if digests:
        with ThreadPoolExecutor(_THREADS) as pool:
            for (path, said), found in zip(mine.items(), pool.map(digest, mine), strict=True):
                if found != said["xxh3_128"]:
                    raise UserError(f"{path}: content differs from {MANIFEST}; it is damaged")
    return True


@contextmanager
def naming_full_disks(target: Path) -> Iterator[None]:
    """Turn 'no space left' into a message that names the target and the free bytes."""
    try:
        yield
    except Exception as error:  # libraries written in Rust raise kinds of their own
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number not in _FULL:
            raise
        free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
        raise FullDisk(f"{target}: disk full ({free:,} bytes free); free space and run again") from error
