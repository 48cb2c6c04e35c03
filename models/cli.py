"""What every executable shares: options from a dataclass, exit status, logging to stderr. Imports no torch.

An executable is a frozen dataclass of options, a function that does the work, and

    def main(argv=None) -> int:
        return run(Options, work, prog="mp-tool", epilog=EXAMPLES, argv=argv)
"""

import argparse
import dataclasses
import errno
import importlib.metadata
import logging
import os
import shlex
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import argparse_dataclass

T = TypeVar("T")
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, exit status 1."""


def opt(help: str, default: Any = MISSING, *, flags: Sequence[str] = (), **meta: Any) -> Any:
    """A command-line option. ``flags`` replaces the flag made from the field's name (``--like-this``).

    The default is shown in --help; a list or tuple option needs ``nargs``, and ``repeat=True`` when giving it
    again shall add to it, not replace it; other keywords go to argparse.
    """
    if default is not MISSING and default is not None and default is not False and default not in ((), [], ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple | list) else default
        help += f" (default: {shown})"
    meta["help"] = help.replace("%", "%%")
    if flags:
        meta["args"] = list(flags)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


def check(options: type) -> None:
    """Refuse field types that argparse-dataclass 2.0.0 parses wrongly or not at all (TypeError)."""
    for f in dataclasses.fields(options):
        where = f"{options.__name__}.{f.name}"
        if isinstance(f.type, str):
            raise TypeError(f"{where}: annotation is a string; remove 'from __future__ import annotations'")
        if dataclasses.is_dataclass(f.type):
            raise TypeError(f"{where}: nested dataclass; flatten it or inherit")
        if get_origin(f.type) in (list, tuple) and not f.metadata.get("nargs"):
            raise TypeError(f"{where}: a list needs nargs")
        if f.type is bool and f.default is not False:
            raise TypeError(f"{where}: name the flag so that its default is off")
        if isinstance(f.type, types.UnionType) or _bad_optional(f.type):
            raise TypeError(f"{where}: write Optional[int|float|str|Path]")
        if not f.metadata.get("help"):
            raise TypeError(f"{where}: no help text")


def _bad_optional(annotation: Any) -> bool:
    if get_origin(annotation) is not Union:
        return False
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return len(inner) != 1 or inner[0] is bool or get_origin(inner[0]) is not None


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every executable has."""

    verbose: bool = opt("show a traceback for errors, and debug messages", False, flags=["--verbose", "-v"])


class _Parser(argparse_dataclass.ArgumentParser):
    """One option per line in @files, # comments, blank lines and shell quotes allowed."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:  # type: ignore[override]
        name = settings.get("dest") or flags[0].lstrip("-").replace("-", "_")
        options = getattr(self, "_options_type", None)  # absent while argparse adds --help
        if options and any(f.name == name and f.metadata.get("repeat") for f in dataclasses.fields(options)):
            settings["action"] = _Repeat
        return super().add_argument(*flags, **settings)


class _Repeat(argparse.Action):
    def __call__(self, _: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *values])


def parser(options: type, *, prog: str, epilog: str = "") -> argparse.ArgumentParser:
    """The argument parser of an options dataclass; ``@file`` reads arguments from a file."""
    check(options)
    made = _Parser(
        options,
        prog=prog,
        description=options.__doc__,
        epilog=epilog,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action=_Version, help="show versions of this tool, megatron-core, torch and git")
    return made


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} " + " ".join(f"{k} {v}" for k, v in versions().items()))
        parser.exit(OK)


def versions() -> dict[str, str]:
    """Versions of megapatch, megatron-core and torch, and the git commit of a checkout ('-' where unknown)."""
    found = {}
    for package in ("megapatch", "megatron-core", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    here = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        found["git"] = subprocess.run(git, capture_output=True, text=True, timeout=5).stdout.strip() or "-"
    except OSError:
        found["git"] = "-"
    return found


def run(
    options: type[T],
    work: Callable[[T], int | None],
    *,
    prog: str,
    epilog: str = "",
    argv: Sequence[str] | None = None,
) -> int:
    """Parse argv into ``options``, do the work, and return the exit status.

    ``work`` returns None or an exit status. Usage errors exit with 2 (also ValueError from __post_init__),
    UserError and full disks give one line on stderr and 1, Ctrl-C 130; a closed pipe ends quietly.
    """
    made = parser(options, prog=prog, epilog=epilog)
    try:
        args: Any = made.parse_args(argv)
    except ValueError as error:  # from __post_init__
        made.error(str(error))
    verbose = getattr(args, "verbose", False)
    log_to_stderr(prog, verbose)
    try:
        return work(args) or OK
    except UserError as error:
        return _fail(prog, str(error), verbose)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while closing stdout
        return OK
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.ENOENT,
            errno.EROFS,
            errno.EISDIR,
        ):
            raise
        return _fail(prog, f"{error.filename or 'output'}: {os.strerror(error.errno)}", verbose)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(prog: str, message: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    return FAILED


def log_to_stderr(prog: str, verbose: bool = False) -> None:
    """Send log messages to stderr: INFO from rank 0, WARNING and above from every rank, with its rank."""
    rank = os.environ.get("RANK", "0")
    where = f"{prog}[{rank}]" if "RANK" in os.environ else prog
    level = logging.DEBUG if verbose else logging.INFO if rank == "0" else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{where}: %(message)s", force=True)
    logging.getLogger("megapatch").setLevel(level)
