"""Conversations straight from JSON lines: mp-preprocess-chat, run once for the same files, tokenizer and options."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models.cli import UserError
from megapatch.models.commit import digest
from megapatch.models.indexed_data import manifest_path, partial_path
from megapatch.trainer import signals
from megapatch.trainer.sft_options import READING, SftOptions

log = logging.getLogger(__name__)
PREPROCESS = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess_chat"]  # the executable, in its own process
TEMPLATES = ("chat_template*", "tokenizer*", "special_tokens_map.json", "additional_chat_templates/*")


def refuse_missing(files: list[str]) -> None:
    """UserError where a file of conversations is not there."""
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(f"{path}: no such file of conversations; --data and --valid-data take files of JSON lines")


def prefix_for(options: SftOptions, files: list[str], tokenizer: Path) -> Path:
    """Where the data made of these files lie: named by what decides their content."""
    said = {name: getattr(options, name) for name in READING if name != "workers"}
    template = Path(options.template) if options.template else None
    named = [template] if template and template.is_file() else []
    about = sorted(path for pattern in TEMPLATES for path in tokenizer.glob(pattern) if path.is_file())
    refuse_missing(files)
    contents = [digest(path) for path in (*map(Path, files), *about, *named)]
    key = xxhash.xxh3_128_hexdigest(json.dumps([contents, said, options.seq_length]).encode())
    return options.save / "data-cache" / f"chats-{key}"


def make(options: SftOptions, files: list[str], tokenizer: Path) -> Path:
    """The prefix of the data made of these files, made now if they are not there; in one process."""
    prefix = prefix_for(options, files, tokenizer)
    if manifest_path(prefix).exists():
        return prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s: through the chat template, into %s", " ".join(files), prefix)
    status = _run([*PREPROCESS, *_arguments(options, files, tokenizer, prefix)])
    if signals.asked():
        if options.requeue_file:  # what is read so far is kept
            options.requeue_file.touch()
        raise UserError(f"signal {signals.asked()}: left while {' '.join(files)} was read; run again to go on")
    if status:
        raise UserError(f"{' '.join(files)}: mp-preprocess-chat ended with status {status}; it said why above")
    return prefix


def _arguments(options: SftOptions, files: list[str], tokenizer: Path, prefix: Path) -> list[str]:
    """Of mp-preprocess-chat."""
    words = ["--input", *files, "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    words += ["--max-length", str(options.seq_length)]
    for name in READING:
        value: Any = getattr(options, name)
        if value not in (None, False, ""):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [f"{flag}={value}"]
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    return words + (["--resume"] if partial_path(prefix).is_dir() else [])


def _run(command: list[str]) -> int:
    """The exit status; a signal to this process is passed on, and what is done by then is kept for the next run."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if signals.asked():
                    process.terminate()
