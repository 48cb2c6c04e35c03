"""Every command teaches: --help is quick and complete, its examples are true, --version says what ran."""

import argparse
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from megapatch.models import cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SLOWEST_S = 2.0  # 0.2 s where nothing else runs; the bound leaves room for a busy machine


@pytest.fixture(params=SCRIPTS)
def command(request) -> str:
    """The name of a command."""
    return request.param


@pytest.fixture
def frame(command, monkeypatch) -> SimpleNamespace:
    """What a command gives to cli.run: options, prog, epilog; and its parser."""
    module = importlib.import_module(SCRIPTS[command].split(":")[0])
    given = SimpleNamespace()

    def record(options, work, *, prog, epilog="", argv=None):
        vars(given).update(options=options, prog=prog, epilog=epilog, argv=argv)
        return 0

    monkeypatch.setattr(module, "run", record)
    assert module.main(["--given"]) == 0 and given.argv == ["--given"]
    given.parser = cli.parser(given.options, prog=given.prog, epilog=given.epilog)
    return given


def start(command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command as its users do, in a process of its own."""
    module = SCRIPTS[command].split(":")[0]
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd="/")


def test_torchrun_takes_no_option_of_ours_for_an_abbreviation_of_its_own(command, frame):
    """Of commands that it starts; one that it would is given after ``--``, as the examples do."""
    theirs = [flag for action in torchrun_parser()._actions for flag in action.option_strings]
    ours = {flag for action in frame.parser._actions for flag in action.option_strings}
    taken = {flag for flag in ours if len([flag for other in theirs if other.startswith(flag)]) > 1}
    assert "--tp" not in ours or (taken <= {"--n"} and (not taken or "--no-python -- mp-generate" in frame.epilog))


def test_help_answers_at_once(command):
    seconds = []
    for _ in range(3):
        before = time.perf_counter()
        done = start(command, "--help")
        seconds.append(time.perf_counter() - before)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {command} ")
    print(f"{command} --help: {min(seconds):.2f} s")
    assert min(seconds) < SLOWEST_S


def test_version_is_one_line(command):
    done = start(command, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{command} megapatch \S+ megatron-core \S+ torch \S+ git \S+\n", done.stdout)


def test_an_unknown_flag_is_wrong_usage(command):
    done = start(command, "--no-such-flag")
    assert (done.returncode, done.stdout) == (2, "") and f"{command}: error: " in done.stderr


def test_the_command_is_the_program_named_in_its_messages(command, frame):
    assert frame.prog == command


def test_every_option_is_parsed_well_and_explained(frame):
    cli.check(frame.options)
    shown = frame.parser.format_help()
    for field in dataclasses.fields(frame.options):
        flag = field.metadata.get("args", [f"--{field.name.replace('_', '-')}"])[0]
        assert flag in shown or field.metadata.get("metavar") in shown, field.name
        assert len(field.metadata["help"]) > 3, field.name
    assert all(flag == flag.lower() and "_" not in flag for flag in re.findall(r"--[\w-]+", shown))


def commands_in(text: str, name: str) -> list[list[str]]:
    """The arguments of each call of ``name`` in shell lines; other commands of a pipe are left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if name not in line:
            continue  # prose has apostrophes
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        words.whitespace_split = True
        call: list[str] | None = None
        for word in [*words, ";"]:
            if set(word) <= set("|&;<>()"):
                found += [call] if call is not None else []
                call = None
            elif call is not None:
                call.append(word)
            elif word == name:
                call = []
    return found


def test_the_examples_are_true(command, frame):
    assert frame.epilog.startswith("examples:\n")
    examples = commands_in(frame.epilog, command)
    assert len(examples) >= 2, "two real examples"
    for words in examples:
        arguments = words[: words.index("--")] if "--" in words else words  # what follows is for another tool
        here = [word for word in arguments if not word.startswith("@")]
        if here == arguments:
            frame.parser.parse_args(arguments)
        else:  # what is required may stand in the @file; the words that are here must still be flags
            flags_only(frame.parser).parse_args(here)


def flags_only(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A plain parser with the same flags, none required, and no dataclass made from them."""
    plain = argparse.ArgumentParser(parents=[parser], conflict_handler="resolve", allow_abbrev=False)
    for action in plain._actions:
        action.required = False
    return plain


def test_examples_are_cut_from_the_shell_around_them():
    line = "torchrun --nproc-per-node 2 --no-python mp-x --a 1 \\\n  'b c' | mp-x --d > out && echo mp-y # mp-x\n"
    assert commands_in(line, "mp-x") == [["--a", "1", "b c"], ["--d"]]
