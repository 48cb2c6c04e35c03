"""The output file: complete under its name, or so far under NAME.partial, where a killed run left whole lines.

Beside NAME.partial lies NAME.partial.json, which says what decided the lines; a run that goes on must agree with it.
"""

import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megapatch.models.cli import UserError
from megapatch.models.commit import fsync, make_parents, naming, naming_full_disks, real

log = logging.getLogger(__name__)


class Journal:
    """Rows into a file, or to stdout for '-'; ``rows`` are those that an interrupted run had written."""

    def __init__(self, target: str, settings: Mapping[str, Any], *, force: bool = False, resume: bool = False) -> None:
        """``settings``: all that decides a row besides its prompt."""
        self.rows: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._finished_bytes = 0  # of a finished file that gets further rows
        if target == "-":
            return
        self.target, self.partial = _paths(target)
        self._about = self.target.with_name(f"{self.partial.name}.json")
        refuse_existing(target, force=force, resume=resume)
        make_parents(self.target)
        with naming(self.partial):
            self._file = self.partial.open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.partial}: another run is writing it; wait, or choose another --output") from error
        if resume:
            self._go_on(settings)
        else:
            self._file.truncate(0)
        if not (resume and self._about.exists()):  # never torn by a kill once there are rows
            self._about.write_text(json.dumps(settings, indent=1) + "\n")

    def _go_on(self, settings: Mapping[str, Any]) -> None:
        """Take over what is there: of the interrupted run, or of a finished one that gets further prompts."""
        assert self._file is not None
        if self._about.exists():
            self._compare(settings)
        elif self.target.exists():
            finished = self.target.read_bytes()
            self._file.truncate(0)
            self._write(finished)
            self._finished_bytes = len(finished)
            log.info("%s: is finished; whether its rows were made with the same options is not known", self.target)
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.info("%s: cut %d bytes of a torn last line", self.partial, len(content) - whole)
            self._file.truncate(whole)
        self.rows = list(_rows(content[:whole].splitlines(), self.partial))
        log.info("%s: %d rows are there already", self.partial, len(self.rows))

    def _compare(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._about.read_bytes())
        except ValueError as error:
            raise UserError(f"{self._about}: not JSON ({error}); start again with --force") from error
        now = json.loads(json.dumps(settings))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self.partial}: made with {name} {_brief(before.get(name))}, now {_brief(now.get(name))}; "
                    "give the same options, or start again with --force"
                )

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line, whole, and where a reader or the next run sees it."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if self._file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        self._write(line.encode("utf-8", "replace"))

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        rest = memoryview(content)
        with naming_full_disks(self.target):
            while rest:  # a nearly full disk takes a part
                rest = rest[self._file.write(rest) :]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Give a complete file its name; leave another one where --resume finds it."""
        if self._file is None:
            return
        if kind is None:
            fsync(self.partial)
            os.replace(self.partial, self.target)
            self._about.unlink()
            fsync(self.target.parent)
        elif self._file.seek(0, os.SEEK_END) > self._finished_bytes:
            log.info("%s: has what was done; the same command with --resume goes on", self.partial)
        else:
            self.partial.unlink()
            self._about.unlink(missing_ok=True)
        self._file.close()


def _paths(target: str) -> tuple[Path, Path]:
    path = real(Path(target))
    return path, path.with_name(f"{path.name}.partial")


def refuse_existing(target: str, *, force: bool, resume: bool) -> None:
    """Refuse what would be overwritten, before any work."""
    if target == "-":
        return
    path, partial = _paths(target)
    if path.exists() and not path.is_file():
        raise UserError(f"{target}: is not a regular file; choose another output")
    if force or resume:
        return
    if path.exists():
        raise UserError(f"{target}: exists already; remove it, choose another --output, or pass --force")
    if partial.exists():
        raise UserError(
            f"{partial}: of a run that was interrupted or still writes; go on with it by --resume, start again with "
            "--force, or choose another --output"
        )


def _rows(content: Iterable[bytes], path: Path) -> Iterable[dict[str, Any]]:
    for number, raw in enumerate(content, start=1):
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); start again with --force") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: JSON {type(row).__name__} found, expected an object; is it our output?")
        yield row


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
