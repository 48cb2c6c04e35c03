"""What every executable shares: options from a dataclass, exit status, logging to stderr. Imports no torch.

An executable is a frozen dataclass of options, a function that does the work, and

    def main(argv=None) -> int:
        return run(Options, work, prog="mp-tool", epilog=EXAMPLES, argv=argv)
"""

import argparse
import dataclasses
import errno
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import select
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Never, TypeVar, Union, get_args, get_origin

import argparse_dataclass

T = TypeVar("T")
OK, FAILED, USAGE, INTERRUPTED, PIPE = 0, 1, 2, 130, 141
USER_ERRNOS = {  # an OSError that the user can mend
    getattr(errno, name)
    for name in "EACCES EDQUOT EEXIST EISDIR ELOOP EMFILE ENAMETOOLONG ENOENT ENOSPC ENOTDIR EPERM EROFS".split()
}
DISK_ERRNOS = {errno.EFBIG, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT}  # likewise, if of a named file


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr; the exit status."""

    status = 1


def opt(help: str, default: Any = MISSING, *, flags: Sequence[str] = (), **meta: Any) -> Any:
    """A command-line option. ``flags`` replaces the flag made from the field's name (``--like-this``).

    The default is shown in --help; a list option needs ``nargs``, and ``repeat=True`` when giving it
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
    """Refuse fields that argparse-dataclass 2.0.0 parses wrongly or not at all (TypeError)."""
    if (options.__doc__ or "").startswith(f"{options.__name__}("):  # made up by dataclass
        raise TypeError(f"{options.__name__}: no docstring; it is the description in --help")
    for f in dataclasses.fields(options):
        if wrong := _wrong_kind(f) or _wrong_default(f):
            raise TypeError(f"{options.__name__}.{f.name}: {wrong}")


def _wrong_kind(f: dataclasses.Field) -> str | None:
    kind, origin, nargs = f.type, get_origin(f.type), f.metadata.get("nargs")
    if isinstance(kind, str):
        return "annotation is a string; remove 'from __future__ import annotations'"
    if not f.metadata.get("help"):
        return "no help text"
    if "type" in f.metadata:
        return None if origin is not list or nargs else "a list needs nargs"
    if origin is list:
        item = get_args(kind)[0]
        return None if nargs and _scalar(item) else "a list needs nargs and items of int, float, str, Path or Enum"
    if origin is Literal:
        kinds = {type(choice) for choice in get_args(kind)}
        return None if kinds in ({str}, {int}) else "a Literal is of strings or of integers"
    inner = _optional(kind)
    if kind is bool or _scalar(kind) or (inner and _scalar(inner)):
        return None if not nargs or (inner and nargs == "?") else f"nargs={nargs!r} needs a list, '?' an Optional"
    return f"{kind} is not parsed; write int, float, str, Path, Enum, Literal, Optional of one type, or list"


def _wrong_default(f: dataclasses.Field) -> str | None:
    if f.type is bool and f.default is not False:
        return "name the flag so that its default is off"
    if f.default is MISSING or "type" in f.metadata:
        return None
    if get_origin(f.type) is Literal:
        return None if f.default in get_args(f.type) else f"default {f.default!r} is not one of the choices"
    kind: Any = _optional(f.type) or f.type
    if f.default is None:
        return None if kind is not f.type else "default None needs Optional"
    accepted = (int, float) if kind is float else kind
    return None if isinstance(f.default, accepted) else f"default {f.default!r} is not {kind.__name__}"


def _scalar(kind: Any) -> bool:
    return kind in (int, float, str, Path) or (isinstance(kind, type) and issubclass(kind, Enum))


def _optional(kind: Any) -> Any:
    """int for Optional[int]; None for all else, also for int | None, which argparse-dataclass cannot call."""
    inner = [a for a in get_args(kind) if a is not type(None)]
    return inner[0] if get_origin(kind) is Union and len(inner) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every executable has."""

    verbose: bool = opt("show a traceback for errors, and debug messages", False, flags=["--verbose", "-v"])


class _Parser(argparse_dataclass.ArgumentParser):
    """One option per line in @files, # comments, blank lines and shell quotes allowed."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise ValueError(f"@file: {arg_line.strip()}: {error}; quote it as for a shell") from error

    def error(self, message: str) -> Never:  # type: ignore[misc]
        message = f"@file: {message.partition('] ')[2]}" if message.startswith("[Errno ") else message
        tell_torchrun(line := f"{_label(self.prog)}: error: {message}")
        told = os.environ.get("LOCAL_RANK", "0") == "0"  # under torchrun, the first process of a node tells
        self.exit(USAGE, f"{line}\n" if told else None)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # what is unknown is refused before the options refuse what they lack for it
        found, others = argparse.ArgumentParser.parse_known_args(self, args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others

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
        **{"prog": prog, "epilog": epilog, "description": inspect.cleandoc(options.__doc__ or "")},
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
    return found | {"git": _git_commit()}


@functools.cache  # the code that runs is the one of the start
def _git_commit() -> str:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():  # an installed wheel may lie inside somebody else's repository
        return "-"
    git = ["git", "--no-optional-locks", "-C", str(checkout)]  # describe --dirty (2.39) locks the index all the same
    asked = (["describe", "--always"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=5).stdout.strip() for words in asked
        )
        return f"{commit}-dirty" if commit and changed else commit or "-"
    except (OSError, subprocess.TimeoutExpired):
        return "-"


def run(
    options: type[T], work: Callable[[T], int | None], *, prog: str, epilog: str = "", argv: Sequence[str] | None = None
) -> int:
    """Parse argv into ``options``, do the work, and return the exit status.

    ``work`` returns None or an exit status. Usage errors exit with 2 (also ValueError from __post_init__),
    UserError and full disks give one line on stderr and 1, Ctrl-C 130; a closed pipe ends quietly with 141.
    """
    adopt_slurm()
    made, verbose = parser(options, prog=prog, epilog=epilog), False
    try:
        args: Any = _parse(made, argv)
        verbose = getattr(args, "verbose", False)
        log_to_stderr(prog, verbose)
        status = work(args) or OK
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        return status
    except UserError as error:
        return _fail(prog, str(error), verbose, error.status)
    except BrokenPipeError:
        if not _stdout_is_closed():  # a worker's pipe, say
            raise
        _drop_stdout()
        return PIPE
    except OSError as error:
        if error.errno not in USER_ERRNOS and not (error.errno in DISK_ERRNOS and error.filename):
            raise
        _drop_stdout()
        return _fail(prog, f"{error.filename or 'output'}: {error.strerror}", verbose)
    except KeyboardInterrupt:
        return INTERRUPTED


def adopt_slurm() -> None:
    """Under srun without torchrun, take rank and number of processes from the job step."""
    step = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        os.environ.update({name: os.environ[theirs] for name, theirs in step.items()})


def _parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> Any:
    try:
        return made.parse_args(argv)
    except ValueError as error:  # from __post_init__
        made.error(str(error))
    except RecursionError:
        made.error("an @file names itself")


def _stdout_is_closed() -> bool:
    """Has the reader of the pipe that is our stdout gone?"""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _drop_stdout() -> None:
    """Send nowhere what stdout cannot take, or Python complains about it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(prog: str, message: str, verbose: bool, status: int = FAILED) -> int:
    if verbose:
        traceback.print_exc()
    line = f"{_label(prog)}: error: {' '.join(message.splitlines())}"
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # names come from files of others
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    return status


def tell_torchrun(line: str) -> None:
    """Leave a message with which torchrun, where it started this process, ends its own report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def _label(prog: str) -> str:
    return f"{prog}[{os.environ['RANK']}]" if "RANK" in os.environ else prog


def log_to_stderr(prog: str, verbose: bool = False) -> None:
    """Send log messages to stderr: INFO from rank 0, WARNING and above from every rank, with its rank."""
    level = logging.DEBUG if verbose else logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{_label(prog)}: %(message)s", force=True)
    for name in ("megapatch", "__main__"):  # an executable's own name under python -m and torchrun -m
        logging.getLogger(name).setLevel(level)
