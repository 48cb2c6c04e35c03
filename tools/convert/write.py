"""A plan written: staged, sealed with a manifest, put in place; then whatever shall name it."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megapatch.models.commit import refuse_existing, staged_folder
from megapatch.tools.convert.execute import execute
from megapatch.tools.convert.plan import Plan


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
    from tqdm import tqdm

    refuse_existing(root, force)
    total = sum(entry.size for entry in plan.entries)
    digests: dict[str, str] = {}
    with (
        removing_empty(root),
        staged_folder(target, tool="mp-convert", force=force, about=about, digests=digests) as stage,
        tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        digests |= execute(plan, stage, jobs, bar.update)
    name_it()


@contextlib.contextmanager
def removing_empty(root: Path) -> Iterator[None]:
    """When the block fails, remove the folder if it is empty."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            root.rmdir()
        raise
