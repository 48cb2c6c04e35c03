"""Training straight from files: mp-preprocess or mp-preprocess-chat, run once for the same content and options."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError
from megapatch.models.commit import digest
from megapatch.models.indexed_data import manifest_path, partial_path
from megapatch.trainer import signals
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.saving.locks import alone_in

log = logging.getLogger(__name__)
ABOUT = ("chat_template*", "tokenizer*", "special_tokens_map.json", "additional_chat_templates/*")  # of a tokenizer


@dataclass(frozen=True)
class Maker:
    """The executable that makes indexed data of files, which runs in a process of its own."""

    tool: str
    module: str
    name: str  # with which those of the data begin
    words: tuple[str, ...]  # its arguments that decide the content
    others: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # whose content decides too

    @property
    def command(self) -> list[str]:
        """Without its arguments."""
        return [sys.executable, "-m", self.module]


def idle_words(options: Any) -> tuple[str, ...]:
    """Arguments that do not decide the content, of options for files."""
    workers = ("--workers", str(options.workers)) if options.workers else ()
    return (*workers, "--trust-remote-code") if options.trust_remote_code else workers


def refuse_missing(files: list[str], flag: str) -> None:
    """UserError where a file is not there."""
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; {flag} takes files, by themselves or as WEIGHT FILE WEIGHT FILE ..."
            )


def prefix_for(options: TrainOptions, maker: Maker, files: list[str], tokenizer: Path) -> Path:
    """Where the data made of these files lie: named by what decides their content."""
    about = sorted(path for pattern in ABOUT for path in tokenizer.glob(pattern) if path.is_file())
    contents = [digest(path) for path in (*map(Path, files), *about, *maker.files)]
    key = xxhash.xxh3_128_hexdigest(json.dumps([maker.tool, contents, maker.words]).encode())
    return options.data_cache / f"{maker.name}-{key}"


def make(options: TrainOptions, maker: Maker, files: list[str], tokenizer: Path) -> Path:
    """The prefix of the data made of these files, made now if they are not there; runs that want the same wait."""
    prefix = prefix_for(options, maker, files, tokenizer)
    if manifest_path(prefix).exists():
        return prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(prefix.parent, signals.asked) as lock:
            if not manifest_path(prefix).exists():
                _make(options, maker, files, _arguments(maker, files, tokenizer, prefix), lock)
    finally:
        if signals.asked() and options.requeue_file:  # what is read so far is kept
            options.requeue_file.touch()
    return prefix


def _make(options: TrainOptions, maker: Maker, files: list[str], arguments: list[str], lock: int) -> None:
    named = " ".join(files)
    log.info("%s: through %s, into %s", named, maker.tool, options.data_cache)
    status = _run([*maker.command, *arguments], lock)
    if signals.asked():
        raise UserError(f"signal {signals.asked()}: left while {named} was read; run again to go on")
    if status:
        raise UserError(
            f"{named}: {maker.tool} ended with status {status}; it said why above "
            "(for options that only it has, run it first, and give --data-path)"
        )


def _arguments(maker: Maker, files: list[str], tokenizer: Path, prefix: Path) -> list[str]:
    words = ["--input", *files, "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    return [*words, *maker.words, *maker.others, *(["--resume"] if partial_path(prefix).is_dir() else [])]


def _run(command: list[str], lock: int) -> int:
    """The exit status; a signal to this process is passed on, and what is done by then is kept for the next run.

    The process holds the lock too: where this one is killed, the next run waits for what still goes on.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=[lock]) as process:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if signals.asked():
                    process.terminate()
