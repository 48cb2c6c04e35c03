"""Pairs and their manifest under temporary names, that appear together: what merging, importing and exporting write."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megapatch.models.commit import staged_file


def names(ends: Sequence[str]) -> list[str]:
    """What follows PREFIX in the names of all files: those by which data are found come first, to be renamed last."""
    return [*(f"{end}.idx" for end in ends), ".manifest.json", *(f"{end}.bin" for end in ends)]


@contextmanager
def staged(prefix: Path, ends: Sequence[str], without: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Paths to write, by what follows PREFIX; all appear under their names, each .idx after what it needs, or none.

    Old indices go first: one never stands beside a new .bin; so do old pairs that the new data are ``without``.
    """
    targets = {name: Path(f"{prefix}{name}") for name in names(ends)}
    began = False
    try:
        with ExitStack() as stack:
            yield {name: stack.enter_context(staged_file(target)) for name, target in targets.items()}
            began = True
            for name in [*(f"{end}.idx" for end in [*ends, *without]), *(f"{end}.bin" for end in without)]:
                Path(f"{prefix}{name}").unlink(missing_ok=True)
    except BaseException:
        if began:  # interrupted between the renames
            for target in targets.values():
                target.unlink(missing_ok=True)
        raise
