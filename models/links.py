"""Symbolic links in folders that came from elsewhere: they must not lead out."""

import os
from pathlib import Path

from megapatch.models.cli import UserError


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuse (UserError) a link out of ``folder``; a snapshot of the hub's cache may link to the cache's blobs."""
    if not path.is_symlink():
        return
    home = folder.resolve()
    within = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(root) for root in within):
        raise UserError(f"{path}: a link to {os.readlink(path)}, outside the folder; put the file itself there")
