"""A plan written: staged, sealed with a manifest, put in place; then whatever shall name it. A killed run goes on."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megapatch.models import commit
from megapatch.models.cli import UserError
from megapatch.tools.convert import journal
from megapatch.tools.convert.execute import execute
from megapatch.tools.convert.plan import Plan
from megapatch.tools.convert.progress import Progress

log = logging.getLogger(__name__)


def write(
    plan: Plan,
    target: Path,
    *,
    root: Path,
    force: bool,
    jobs: int,
    about: Mapping[str, Any],
    name_it: Callable[[], None] = lambda: None,
) -> None:
    """Carry out the plan into the folder ``target``, then call ``name_it`` (a tracker, say).

    ``root`` is ``target`` or the folder around it: what the user named, refused when it exists unless ``force``.
    """
    target = commit.real(target)
    path, stage = journal.paths(target)
    if not path.exists():
        commit.refuse_existing(root, force)
    sources = journal.sources(plan)
    identity = journal.identity(plan, sources)
    with removing_empty(root), commit.naming_full_disks(target), journalled(target, identity) as run:
        if run.found and _in_place(target, identity):
            log.info("%s: was complete already when the run before this one was interrupted", target)
        else:
            if root.is_dir() and {p.name for p in root.iterdir()} - {path.name, stage.name}:
                commit.refuse_existing(root, force)
            staged = {"tool": "mp-convert", "force": force, "about": {**about, "plan": identity}}
            _fill(plan, target, run, sources, jobs, staged)
        name_it()


def _fill(
    plan: Plan, target: Path, run: journal.Journal, sources: Mapping[str, Any], jobs: int, staged: Mapping[str, Any]
) -> None:
    total, done = sum(entry.size for entry in plan.entries), sum(written.bytes for written in run.kept.values())
    if run.kept:
        log.info("%s: going on with %d files (%s bytes) of an interrupted run", run.stage, len(run.kept), f"{done:,}")
    run.make_stage()
    kept, digests = dict(run.kept), dict[str, str]()
    folder = commit.staged_folder(target, stage=run.stage, digests=digests, **staged)
    with folder as stage, Progress(total, done) as progress:
        digests |= execute(plan, stage, jobs, progress.add, kept, run.note)
        for path, state in journal.sources(plan).items():
            if state != sources[path]:
                raise UserError(f"{path}: changed while it was copied; run again")


def _in_place(target: Path, identity: str) -> bool:
    """Is the target what a run with this identity wrote?"""
    try:
        manifest = commit.read_manifest(target)
    except (UserError, NotADirectoryError):
        return False
    return manifest is not None and manifest.get("plan") == identity


@contextlib.contextmanager
def journalled(target: Path, identity: str) -> Iterator[journal.Journal]:
    """The target's journal, which goes when the block succeeds, and what it names is kept or goes when it fails."""
    run = journal.Journal(target, identity)
    try:
        yield run
        run.finish()
    except BaseException:
        if not _in_place(target, identity):  # else only the tracker is missing
            run.fail()
        raise
    finally:
        run.close()


@contextlib.contextmanager
def removing_empty(root: Path) -> Iterator[None]:
    """When the block fails, remove the folder if it is empty."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            root.rmdir()
        raise
